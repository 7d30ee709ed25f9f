"""Whether diluted convolutions are block-diagonal, and what a grouped convolution gains: ``python benchmarks/regroup.py [--shared DIR]``.

First: the connected parts of the AFCC masks of real networks (a layer can be regrouped where it has at least two that pack into equal
groups). Then: networks built to be block-diagonal under hidden permutations, with the share of time that ``--regroup`` measures.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import dilution
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import sfp_onnx
from sfp_onnx import graph
from sfp_onnx.methods.dilution.regroup import blocks, parts
from sfp_onnx.methods.dilution.stages import DiluteOptions, dilute, masked

CASES = ("vgg", "resnet20", "resnet56")


def real(name: str, given: argparse.Namespace) -> None:
    """Connected parts of every layer under the AFCC mask."""
    analysis = sfp_onnx.inspect(given.shared / "models" / dilution.NETWORKS[name][0])
    calibration, _, _ = dilution.data_of(analysis, name, given.shared, False)
    seen = dilution.looked(analysis, name, calibration, True, given)
    for target in seen.targets:
        own = replace(seen, targets=(target,), skipped=())
        masks, _, _, _ = masked(analysis, own, DiluteOptions("afcc", None, force=True))
        keep = masks[target.weight].any((2, 3))
        alive = keep[keep.any(1)][:, keep.any(0)]
        found = parts(alive)
        largest = max(found, key=lambda part: part[0].size * part[1].size)
        gone = f"{keep.shape[0] - len(alive)} / {keep.shape[1] - alive.shape[1]}"
        size = f"{largest[0].size} x {largest[1].size} of {alive.shape[0]} x {alive.shape[1]}"
        can = "yes" if blocks(alive) else "no"
        print(f"| {name} | {target.name} | {1 - keep.mean():.1%} | {gone} | {len(found)} | {size} | {can} |", flush=True)


def built(size: int, groups: int, side: int) -> onnx.ModelProto:
    """Four convolutions size -> size; the two in the middle are block-diagonal under random permutations."""
    random = np.random.default_rng(0)
    constants: dict[str, np.ndarray] = {}
    nodes, data = [], "x"
    rows = random.permutation(size) // (size // groups)
    for index in range(4):
        weight = (random.standard_normal((size, size if index else 3, 3, 3)) / (3 * np.sqrt(size))).astype(np.float32)
        columns, rows = rows, random.permutation(size) // (size // groups)
        if index in (1, 2):
            weight *= (rows[:, None] == columns[None, :])[:, :, None, None]
        constants |= {f"w{index}": weight, f"b{index}": random.standard_normal(size).astype(np.float32)}
        nodes.append(helper.make_node("Conv", [data, f"w{index}", f"b{index}"], [f"c{index}"], f"conv{index}", pads=[1] * 4))
        nodes.append(helper.make_node("Relu", [f"c{index}"], [f"r{index}"]))
        data = f"r{index}"
    ports = [[helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", wide, side, side])] for name, wide in (("x", 3), (data, size))]
    held = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    return helper.make_model(helper.make_graph(nodes, "built", *ports, held), opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def main() -> None:
    """Measure and print."""
    take = argparse.ArgumentParser(description=__doc__)
    take.add_argument("networks", nargs="*", default=CASES)
    take.add_argument("--shared", type=Path, default=Path(__file__).parent.parent.parent / "shared")
    take.add_argument("--keep", type=Path)
    given = take.parse_args()
    given.held_out = False
    print("| network | layer | removed | filters / channels without any | parts | largest part | regroups |\n|---|---|---|---|---|---|---|")
    for name in given.networks:
        real(name, given)
    print("\n| channels | hidden groups | map | what --regroup says |\n|---|---|---|---|")
    for size, groups, side in ((64, 4, 16), (128, 4, 16), (256, 4, 14), (256, 8, 14), (512, 8, 7), (512, 2, 7)):
        model = graph.load(built(size, groups, side))
        result = dilute(model, DiluteOptions("magnitude", 0.0, refit=False, regroup=True))
        print(f"| {size} | {groups} | {side} x {side} | {'; '.join(note for note in result.notes if 'conv' in note)} |", flush=True)


if __name__ == "__main__":
    main()
