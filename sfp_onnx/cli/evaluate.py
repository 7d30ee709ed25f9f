"""evaluate: measure models on data, and gate on a baseline."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from ..core.errors import OptionError
from ..core.types import Evaluation
from ..coupling.analysis import inspect, load
from ..data.dataset import Dataset
from ..evaluation import Verdict, against, dropped, evaluate, parse_drop, reached, read_baseline
from ..latency.profiling import layer_times
from ..report.page import Context, evaluate_page
from ..report.text import evaluation_text
from ..runtime import Setup
from .arguments import DATA, check_outputs, dataset, json_option, preprocessing_options
from .common import EPILOG, FILE, bar, check, check_report, gated, guarded, report_option, say, typed, write


@click.command("evaluate", epilog=EPILOG)
@click.argument("models", nargs=-1, required=True, type=FILE)
@click.option("--data", type=FILE, required=True, help="Test data: " + DATA)
@preprocessing_options
@click.option("--latency/--no-latency", default=True, show_default=True, help="Time the models, interleaved.")
@click.option("--threads", type=click.IntRange(min=0), default=0, help="Threads of onnxruntime (0: all cores).")
@click.option("--baseline", type=FILE, help="Manifest (made with --test-data) or output of evaluate --json: the last model must "
              "hold its accuracy, MACs, parameters and bytes, else exit code 3.")
@click.option("--max-drop", metavar="1%", help="How much top-1 (without labels: agreement) may fall: of the last model below --baseline "
              "(default 0), else below the first model.")
@click.option("--target", "targets", multiple=True, metavar="macs=50%", help="The last model must hold it: macs, params, size. Repeatable.")
@json_option
@report_option
@guarded
@gated
def evaluate_command(
    models: tuple[Path, ...], data: Path, latency: bool, threads: int, as_json: bool, report_to: Path | None, **options: Any
) -> None:
    """Measure models on data; the first is the reference.

    Example: sfp-onnx evaluate model.onnx smaller.onnx --data test.npz
    """
    gate = _Gate(options["baseline"], options["max_drop"], options["targets"], len(models))
    loaded = [load(path) for path in models]
    inputs = [*(path for model in loaded for path in model.paths), data, *filter(None, [options["labels"]])]
    check_outputs(inputs, report_to)
    check_report(report_to)
    data_set = dataset(loaded[0], data, options)
    assert data_set is not None
    results = evaluate(loaded, data_set, latency, threads, bar)
    click.echo(json.dumps([asdict(item) for item in results], indent=1) if as_json else evaluation_text(results))
    if report_to is not None:
        analyses = [inspect(model, data=data_set) for model in loaded]
        timed = layer_times(analyses[0], loaded[-1], Setup(threads), progress=bar) if latency and len(loaded) > 1 else None
        write(report_to, evaluate_page(analyses, results, Context(typed(), data_set, times=timed)), inputs)
    for name, passed, text in gate.verdicts(results, data_set):
        check(name, passed, text)
        say(f"{'passed' if passed else 'FAILED'}: {name}: {text}")


class _Gate:
    """What the last model must hold; read before anything is measured."""

    def __init__(self, baseline: Path | None, max_drop: str | None, targets: Sequence[str], models: int) -> None:
        self.path, self.targets, self.models = baseline, targets, models
        read: tuple[dict[str, Any] | None, str | None] = (None, None) if baseline is None else read_baseline(baseline)
        self.base, self.sha256 = read
        self.limit = None if max_drop is None else parse_drop(max_drop)
        if models < 2 and (targets or (self.limit is not None and baseline is None)):
            raise OptionError("--max-drop and --target compare the last model with the first: give two models, or --baseline")

    def verdicts(self, results: Sequence[Evaluation], data: Dataset) -> list[Verdict]:
        found: list[Verdict] = []
        if self.base is not None:
            if self.sha256 is not None and self.sha256 != data.sha256:
                say(f"Warning: {self.path} was measured on other data than {data.name}; accuracies are compared all the same")
            found += against(results[-1], self.base, self.limit or 0.0, self.models < 2)
        elif self.limit is not None:
            found += dropped(results, self.limit)
        return found + (reached(results, self.targets) if self.targets else [])
