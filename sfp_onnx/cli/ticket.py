"""ticket: find a lottery ticket in a trained network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..core.errors import OptionError
from ..core.options import DATA, DataOptions
from ..core.system import need
from ..methods.training import TicketOptions, words
from ..report.text import table
from . import arguments as take
from .common import answer, say


@take.command(
    "ticket", take.model_argument, take.output_option,
    take.option("--rewind", metavar="INIT.onnx|none", section=DATA, help="The same network with its first weights; none: go on from the "
                "trained ones with a new learning rate."),
    take.file_option("--data", help=f"The training set, with labels: {take.SOURCES}", section=DATA, required=True),
    take.test_option, TicketOptions, DataOptions, take.file_option("--untrained", help="Write the ticket before its last training, too."),
    take.file_option("--manifest", help="Write versions, hashes, options and figures as JSON."), take.json_option)  # fmt: skip
def command(model: Path, output: Path, rewind: str | None, as_json: bool, **options: Any) -> None:
    """Find a lottery ticket: a sparse part of a trained network that learns as well from its first weights (extra `train`).

    Example: sfp-onnx ticket trained.onnx --rewind init.onnx --data train.npz -o ticket.onnx --controls
    """
    need("torch", "train", "ticket")
    from ..methods.training.lottery import ticket

    chosen = take.build(TicketOptions, options)
    if rewind is None and chosen.reinit is None:
        raise OptionError(
            "a trained file does not hold its first weights: give them with --rewind INIT.onnx; or --rewind none (go on from the trained "
            "weights with a new learning rate, Renda et al. 2020), or --reinit SEED (new random weights: the paper's control, no ticket)"
        )
    result = ticket(
        model, chosen, rewind=None if rewind in (None, "none") else Path(str(rewind)), output=output, untrained=options["untrained"],
        manifest=options["manifest"], tell=lambda said: say(words(said), 1), **take.reading(options))  # fmt: skip
    for note in result.notes:
        say(f"Note: {note}")
    if as_json:
        answer(result.manifest)
        return
    heads = list(result.rounds[-1].controls)
    rows = [[f"{item.left:.1%}", f"{item.ticket:.2%}", *(f"{item.controls[name]:.2%}" for name in heads)] for item in result.rounds]
    answer(table(["weights left", "ticket", *heads], rows))
    answer(f"top-1 on {result.judged}; dense {result.dense:.2%}")
    answer(f"wrote {output}")

