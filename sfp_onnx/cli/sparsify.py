"""sparsify: train until channels or weights are zero."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..core.options import DATA, OUTPUT, DataOptions
from ..core.system import need
from ..methods.training import SparseOptions, words
from . import arguments as take
from .common import answer, say


@take.command(
    "sparsify", take.model_argument, take.output_option,
    take.file_option("--data", help=f"The training set, with labels or without: {take.SOURCES}", section=DATA, required=True),
    SparseOptions, DataOptions,
    take.option("--store", type=click.Choice(["dense", "sparse"]), default="dense", show_default=True, section=OUTPUT,
                help="sparse: weights as sparse initializers where that is smaller."),
    take.file_option("--manifest", help="Write versions, hashes, options and figures as JSON."), take.json_option)  # fmt: skip
def command(model: Path, output: Path, store: str, as_json: bool, **options: Any) -> None:
    """Train until channels or weights are zero; `prune` removes such channels (extra `train`).

    Example: sfp-onnx sparsify model.onnx --data train.npz -o sparse.onnx --method groups
    """
    need("torch", "train", "sparsify")
    from ..methods.training.sparse import sparsify

    chosen = take.build(SparseOptions, options)
    result = sparsify(
        model, chosen, output=output, sparse=store == "sparse", manifest=options["manifest"],
        tell=lambda said: say(words(said), 1), **take.reading(options))  # fmt: skip
    for note in result.notes:
        say(f"Note: {note}")
    if as_json:
        answer(result.manifest)
        return
    what = "weights" if chosen.method in ("rigl", "set") else "sets of coupled channels"
    answer(f"{result.zeros} of {result.total} {what} became zero")
    answer(f"{result.measure} on held-out samples: {result.before:.4g} -> {result.after:.4g}{'' if result.kept else ' (not kept)'}")
    answer(f"wrote {output}")
    if chosen.method not in ("rigl", "set"):
        words_ = (output, "-o", f"{output.stem}-pruned.onnx", "--target", "macs=50%")
        take.following("prune", *words_, names=take.READING)
