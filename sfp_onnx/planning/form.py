"""In which form a result is written: with the biases that a repair adds, and packaged. Targets bound that, not what was just cut."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np

from ..core.options import OutputOptions, RepairOptions
from ..core.types import AxisUnits, BoolArray
from ..coupling.analysis import Analysis
from ..coupling.cost import Parameter
from ..export import packaged
from ..graph import INLINE_BYTES, Model
from ..graph.save import saved_bytes
from ..repair.lockstep import prepared_for
from ..repair.steps import bias_place
from .figures import AS_CUT, Form

FITS = ("lstsq", "bias")  # repairs that give layers biases


def form_for(analysis: Analysis, repair: RepairOptions | None, output: OutputOptions, with_data: bool) -> Form:
    """The form of results of this repair and these options; ranges of activations, on which no size depends, are those of the sample."""
    batches = (lambda: [analysis.prepared.feeds]) if with_data else None
    fitted = repair is not None and repair.kind in FITS
    packs = output.fp16 or output.quantize is not None
    form = replace(AS_CUT, bytes=lambda model: saved_bytes(model, output.path, output.external))
    if not fitted and not packs:
        return form
    weighed = {layer.node.inputs[layer.weight.position] for layer in analysis.coupling.layers if layer.weight}

    def finished(model: Model, removed: BoolArray) -> Model:
        if fitted and removed.any():
            model = prepared_for(analysis.prepared, analysis.coupling, removed, model)[0].model
        return packaged(model, output, batches)

    def each(parameter: Parameter) -> float:
        if output.quantize and parameter.name in weighed and parameter.itemsize == 4:
            return 1.0
        large = parameter.itemsize == 4 and np.prod(parameter.shape) * 4 > INLINE_BYTES
        return 2.0 if output.fp16 and not output.quantize and large else parameter.itemsize

    return replace(form, finished=finished, each=each, biases=cache(lambda: _biases(analysis)) if fitted else tuple)


def _biases(analysis: Analysis) -> tuple[Parameter, ...]:
    """The biases that a repair would add, at the most."""
    everything = np.ones(analysis.coupling.units, bool)
    scene, layers = prepared_for(analysis.prepared, analysis.coupling, everything, analysis.prepared.model)[:2]
    fresh = scene.constants.keys() - {parameter.name for parameter in analysis.parameters}
    biases = []
    for layer in (layer for sharing in layers for layer in sharing):
        place = bias_place(scene, layer)
        if place is not None and place.name in fresh:
            width = int(np.prod(scene.constants[place.name].shape))
            units = layer.writes if len(layer.writes) == width else np.full(width, -1, np.int64)
            biases.append(Parameter(place.name, (width,), 4, ((AxisUnits(0, units),),)))
    return tuple(biases)
