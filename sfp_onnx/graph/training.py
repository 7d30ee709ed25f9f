"""Nodes that a model exported for training, and not for inference, has."""

from __future__ import annotations

from .model import Model
from .view import Constants, nodes

NORM_STATE = 14  # from this operator set on BatchNormalization says training_mode; before, outputs of its statistics meant it


def training_nodes(model: Model) -> list[str]:
    """Names of Dropout and BatchNormalization nodes that behave as in training: random zeros, statistics of the batch."""
    constants = Constants(model)
    found = []
    for node in nodes(model):
        if node.domain:
            continue
        if node.op == "Dropout":
            flag = node.inputs[2] if len(node.inputs) > 2 else ""
            active = bool(constants[flag].any()) if flag in constants else bool(flag)
            active |= model.opset < 7 and not node.attributes.get("is_test", 0)
        elif node.op == "BatchNormalization":
            active = bool(node.attributes.get("training_mode", 0)) or (model.opset < NORM_STATE and len([*filter(None, node.outputs)]) > 1)
            active |= model.opset < 7 and not node.attributes.get("is_test", 0)
        else:
            active = False
        if active:
            found.append(node.name)
    return found
