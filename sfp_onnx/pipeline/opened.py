"""What a run works on: the model and its data, opened, and options that are settled by them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..core import options as records
from ..core.errors import OptionError
from ..core.options import DataOptions, InspectOptions, MeasureOptions, PlanOptions, RepairOptions
from ..core.system import NEEDS, log
from ..core.types import Size
from ..coupling.analysis import Analysis, DataSource, expandable, free_share, inspect, left_out, standing, wider
from ..data.checks import opened, training_mode
from ..data.dataset import Dataset
from ..evaluation import parse_drop, reading_of
from ..evaluation.meaning import TASKS, Reading
from ..graph.load import ModelSource, load
from ..graph.save import check_output, file_bytes
from ..planning import library, parse_target
from ..scores.parts import OBS
from ..scores.scoring import default_score, parse

AS_PLANNED = RepairOptions()
WORTH_A_LOOK = 0.05  # of the MACs: expansion frees so much more, or only what cannot be met without it has it


@dataclass(frozen=True)
class Inputs:
    """A model and its data, opened. ``data`` are scored with and repaired with, ``eval_data`` (if any) are what ``max_drop`` is judged
    on, ``test_data`` what the result is measured on; ``paths`` are all files that are read. ``measures`` is what is known of the outputs,
    ``reading`` what they mean (None without data); ``auto``: what may be expanded is, where a plan needs that or is better for it."""

    analysis: Analysis
    data: Dataset | None
    eval_data: Dataset | None = None
    test_data: Dataset | None = None
    paths: tuple[Path, ...] = ()
    measures: MeasureOptions = MeasureOptions()
    reading: Reading | None = None
    auto: bool = False

    def with_groups(self) -> Inputs:
        """The same, expanded if it may be and nothing can be pruned as it stands."""
        return self if self.analysis.coupling.groups else self.wider() or self

    def wider(self, least: float = 0.0) -> Inputs | None:
        """The same with all that may be expanded (outputs if there are data to fit what gives them all channels); None where that is not
        asked for, or does not free more than a share of the MACs (``least``)."""
        whole = wider(self.analysis, self.data is not None) if self.auto and expandable(self.analysis) else None
        if whole is None or (least and free_share(whole) - free_share(self.analysis) < least):
            return None
        return replace(self, analysis=whole)

    def weighing(self, options: PlanOptions, score: str | None, repair: RepairOptions | None) -> Inputs | None:
        """The same with all that may be expanded, if that frees a real share, and a plan with this score can weigh it: errors are in one
        unit, and solved with. None otherwise."""
        asked = options.ratio is None and options.allocation in ("default", "solve") and options.library is None
        if not asked or not self.auto or self.data is None:
            return None
        text = default_score(self.data, settled(repair, self.data)) if score is None else parse(score).text
        return self.wider(WORTH_A_LOOK) if text.partition(",")[0] == OBS else None

    def standing(self) -> Inputs:
        """The same with nothing expanded."""
        return replace(self, analysis=standing(self.analysis))

    @property
    def advice(self) -> str:
        """What could leave if an expansion were not ruled out, as the end of an error; empty where nothing could."""
        ruled_out = not self.auto and expandable(self.analysis)
        whole = wider(self.analysis, self.data is not None) if ruled_out else None
        if whole is None:
            return ""
        shares = f"half of every group takes {free_share(whole):.0%} of the MACs, {free_share(self.analysis):.0%} as it stands"
        return f" Channels that an operator or an output needs may leave with --expand auto or all: {shares}."

    @property
    def expanding(self) -> frozenset[str]:
        """The groups of which a plan has to say whether they are worth what must be expanded for them."""
        return self.analysis.expanding if self.auto else frozenset()

    def read(self, data: Dataset) -> Reading:
        """What the outputs mean, told once more by the labels of other data, if these have any."""
        return reading_of(self.analysis.model, data, self.measures, self.reading, self.analysis.prepared.tokens)

    @property
    def told(self) -> MeasureOptions:
        """What is known of the outputs, with the task that was found."""
        if self.reading is None:
            return self.measures
        judged = self.reading.judged
        task = next((task for task, kind in TASKS.items() if kind is judged.kind), None)
        return replace(self.measures, task=task, output_name=judged.outputs[0] if task else self.measures.output_name)


@dataclass(frozen=True)
class Sources:
    """Where the data of a run are, and how they and the model are read. Labels, number of samples and seed of ``data_options`` are those of
    ``data``; the preprocessing is that of all. ``weighs``: what is expanded by the options is a question for the plan even so."""

    data: DataSource | None = None
    eval_data: DataSource | None = None
    test_data: DataSource | None = None
    data_options: DataOptions = DataOptions()
    inspect_options: InspectOptions = InspectOptions()
    others: Sequence[str | Path | None] = ()
    measures: MeasureOptions = MeasureOptions()
    weighs: bool = False

    def __post_init__(self) -> None:
        """Refuse options that are none."""
        records.expect(DataOptions, data_options=self.data_options)
        records.expect(InspectOptions, inspect_options=self.inspect_options)
        records.expect(MeasureOptions, measure_options=self.measures)

    def traced_as(self, inputs: Inputs) -> Sources:
        """The same for workers, who expand what was expanded here."""
        analysis = inputs.analysis
        how = replace(self.inspect_options, expand="none", cut_layernorm=analysis.expanded, expand_outputs=bool(analysis.projected))
        return replace(self, inspect_options=how)

    def paths(self) -> list[Path]:
        """All files that are named."""
        named = (self.data, self.eval_data, self.test_data, self.data_options.labels, *self.others)
        return [Path(source) for source in named if isinstance(source, (str, Path))]

    def open(self, source: ModelSource | Analysis, outputs: Sequence[Path | None] = ()) -> Inputs:
        """Open the model and the data, after a check that the outputs can be written and are none of the inputs.

        Raises:
            ModelError, DataError, OptionError: they cannot be read. OutputError: an output cannot be written.
        """
        model = source.model if isinstance(source, Analysis) else load(source, self.inspect_options.custom_ops)
        paths = [*model.paths, *self.paths()]
        for number, output in enumerate(outputs):
            if output is not None:
                check_output(Path(output), [*paths, *(Path(other) for other in outputs[:number] if other is not None)])
        for text in training_mode(model):
            log.warning(text)
        given = ", ".join(f"--{name.replace('_', '-')}" for name in self.data_options.given)
        if given and self.data is None and self.test_data is None and self.eval_data is None:
            raise OptionError(f"{given}: without --data there is nothing to read so; options for data need --data")
        if self.measures != MeasureOptions() and self.data is None and self.test_data is None and self.eval_data is None:
            raise OptionError("--task, --output-name and --metric say what is measured, which needs --data")
        beside = replace(self.data_options, labels=None, samples=None)
        test, judge = (opened(model, data, beside, self.measures) for data in (self.test_data, self.eval_data))
        only_beside = self.data is None and (test is not None or judge is not None)
        data = opened(model, self.data, DataOptions(seed=self.data_options.seed) if only_beside else self.data_options, self.measures)
        traced = self.inspect_options
        analysis = source if isinstance(source, Analysis) else inspect(model, traced.input_shapes, data, **traced.expansion)
        whole = analysis.expanded or bool(analysis.projected)
        auto = analysis is not source and (self.weighs if whole else traced.expand == "auto")
        there = [item for item in (judge, data, test) if item is not None]
        first = next((item for item in there if item.labels is not None), there[0] if there else None)
        reading = None if first is None else reading_of(analysis.model, first, self.measures, None, analysis.prepared.tokens)
        for text in () if data is None else left_out(analysis, data):
            log.info(f"Note: {text}")
        return Inputs(analysis, data, judge, test, tuple(paths), self.measures, reading, auto)


def sources_of(
    options: PlanOptions, data: DataSource | None, eval_data: DataSource | None, test_data: DataSource | None, data_options: DataOptions,
    inspect_options: InspectOptions, measures: MeasureOptions, *others: Any,
) -> Sources:  # fmt: skip
    """What a plan is made from; without data as those of its library were."""
    weighs = False
    if options.library is not None:
        recorded = library.read_library(options.library).recorded
        weighs = inspect_options.expand == "auto" and not (inspect_options.cut_layernorm or inspect_options.expand_outputs)
        if data is None:
            inspect_options = library.traced_as(recorded, inspect_options)
        elif weighs:
            inspect_options = library.expanded_as(recorded, inspect_options)
        inspect_options = as_it_stands(inspect_options)
    named = [options.device_profile, options.library, *others]
    return Sources(data, eval_data, test_data, data_options, inspect_options, named, measures, weighs)


def as_it_stands(options: InspectOptions) -> InspectOptions:
    """What was measured is of the model as it stands, or of all that may be expanded: nothing is expanded as a plan needs it."""
    return replace(options, expand="all" if options.expand == "all" else "none")


def settled(repair: RepairOptions | None, data: Dataset | None) -> RepairOptions | None:
    """The repair that follows: by default least squares where there are data; None if there is none.

    Raises:
        OptionError: a repair without data, or fine-tuning without a repair.
    """
    if repair is not None and repair.finetune and (data is None or repair.fit == "none"):
        raise OptionError("--finetune follows a repair: it needs --data, and no --repair none (`sfp-onnx finetune` does it alone)")
    for name, check in NEEDS.items():
        if getattr(repair, name, 0):
            check()
    if repair is None or repair.fit == "none" or (repair.fit == "default" and data is None):
        return None
    if data is None:
        raise OptionError(f"--repair {repair.fit} needs --data")
    return replace(repair, fit="lstsq") if repair.fit == "default" else repair


def checked_options(options: PlanOptions) -> None:
    """Refuse options that contradict each other or cannot be read, before any work."""
    records.expect(PlanOptions, options=options)
    if (options.ratio is None) == (not options.targets and options.max_drop is None):
        raise OptionError("give either --ratio or --target (or --max-drop), for example --ratio 0.5 or --target macs=50%")
    if options.max_drop is not None:
        parse_drop(options.max_drop)
    for text in options.targets:
        parse_target(text)


def measured_by(options: PlanOptions, given: MeasureOptions) -> MeasureOptions:
    """What outputs are measured by; the metric may stand in the options of the plan."""
    return given if options.metric is None else replace(given, metric=options.metric)


def tell(reading: Reading | None, measured: bool = True) -> None:
    """Say what the outputs are taken for, if they are measured."""
    for note in reading.notes if reading is not None and measured else ():
        log.info(note)



def size_of(analysis: Analysis) -> Size:
    """That of the original."""
    return replace(analysis.size(), bytes=file_bytes(analysis.model))
