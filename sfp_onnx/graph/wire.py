"""The bytes of a model file (Protocol Buffers), field by field: large weights are read and written one by one, never the file as a whole.

A message is a sequence of fields: a key (number of the field * 8 + wire type, as a varint), then a varint (0), 8 bytes (1), a length and
as many bytes (2), or 4 bytes (5); see protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from math import prod
from typing import Any, NamedTuple

import numpy as np
from onnx import TensorProto, helper

from ..core.types import Array

GRAPH, INITIALIZER, RAW_DATA = 7, 5, 9  # of ModelProto, GraphProto, TensorProto
FIXED = {1: 8, 5: 4}  # bytes of a field, by wire type
Piece = Any
"""Bytes, or what can be seen as bytes (an array's memory)."""
Small = Callable[[int, Any, int], bool]
"""Whether a tensor of so many bytes, of this dtype and rank, stays in the protobuf (`graph.inline`)."""


class Field(NamedTuple):
    """One field: its number, where it starts, where its payload starts, where it ends; ``nested``: it has a length in front."""

    number: int
    start: int
    payload: int
    end: int
    nested: bool


def fields(data: Any, start: int, end: int) -> Iterator[Field]:
    """The fields of the message in ``data[start:end]``.

    Raises:
        ValueError: no message stands there.
    """
    place = start
    while place < end:
        key, payload = _varint(data, place, end)
        kind, length = key & 7, 0
        if kind == 0:
            _, after = _varint(data, payload, end)
            length = after - payload
        elif kind == 2:
            length, payload = _varint(data, payload, end)
        elif kind in FIXED:
            length = FIXED[kind]
        else:
            raise ValueError(f"wire type {kind} at byte {place}")
        if payload + length > end:
            raise ValueError(f"a field of {length} bytes at byte {payload} of {end}")
        yield Field(key >> 3, place, payload, payload + length, kind == 2)
        place = payload + length


def _varint(data: Any, place: int, end: int) -> tuple[int, int]:
    """A number, and where it ends."""
    value = shift = 0
    while place < end:
        byte = data[place]
        value |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            return value, place
    raise ValueError(f"a number does not end at byte {end}")


def _number(value: int) -> bytes:
    parts = []
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    return bytes([*parts, value])


def _framed(number: int, pieces: list[Piece]) -> list[Piece]:
    """A field of these bytes."""
    return [_number(number << 3 | 2) + _number(sum(memoryview(piece).nbytes for piece in pieces)), *pieces]


def _rewritten(data: Any, at: Iterable[Field], change: Mapping[int, Any]) -> list[Piece]:
    """A message with the payloads of some fields as functions make them of what they hold; all else byte for byte."""
    pieces: list[Piece] = []
    for field in at:
        make = change.get(field.number) if field.nested else None
        fresh = make(field) if make is not None else None
        pieces += [data[field.start : field.end]] if fresh is None else _framed(field.number, fresh)
    return pieces


# ---- reading: large weights stay in the file --------------------------------------------------------------------------


def hollow(data: Any, location: str, small: Small) -> bytes:
    """The bytes of a ModelProto in which large tensors are external, in a file of this name: where they stand in ``data`` now.

    Tensors whose bytes do not fit their shape stay as they are, for others to complain about.

    Raises:
        ValueError: ``data`` are no such message.
    """

    def tensor(field: Field) -> list[Piece] | None:
        held = list(fields(data, field.payload, field.end))
        raw = [item for item in held if item.number == RAW_DATA and item.nested]
        if len(raw) != 1 or raw[0].end - raw[0].payload < LEAST:
            return None
        head = TensorProto.FromString(b"".join(bytes(data[item.start : item.end]) for item in held if item is not raw[0]))
        size = raw[0].end - raw[0].payload
        if head.data_location or not _fits(head, size, small):
            return None
        head.data_location = TensorProto.EXTERNAL
        for key, value in (("location", location), ("offset", str(raw[0].payload)), ("length", str(size))):
            head.external_data.add(key=key, value=value)
        return [head.SerializeToString()]

    def graph(field: Field) -> list[Piece]:
        return _rewritten(data, fields(data, field.payload, field.end), {INITIALIZER: tensor})

    return b"".join(map(bytes, _rewritten(data, fields(data, 0, len(data)), {GRAPH: graph})))


LEAST = 1 << 12  # bytes; less is not worth it


def _fits(head: TensorProto, size: int, small: Small) -> bool:
    if head.data_type not in helper.get_all_tensor_dtypes() or head.data_type == TensorProto.STRING or any(dim < 0 for dim in head.dims):
        return False
    dtype = helper.tensor_dtype_to_np_dtype(head.data_type)
    return not small(size, dtype, len(head.dims)) and prod(head.dims) * dtype.itemsize == size


# ---- writing: large weights go straight to the file --------------------------------------------------------------------


def filled(data: bytes, weights: Mapping[str, Array], names: list[str]) -> list[Piece]:
    """The pieces of a ModelProto, given as bytes, of which some initializers have empty raw data: with ``weights`` in their place.

    Args:
        names: of all initializers, in their order.
    """
    order = iter(names)

    def tensor(field: Field) -> list[Piece] | None:
        array = weights.get(next(order))
        if array is None:
            return None
        return _rewritten(data, fields(data, field.payload, field.end), {RAW_DATA: lambda _: [_memory(array)] if array.size else [b""]})

    def graph(field: Field) -> list[Piece]:
        return _rewritten(data, fields(data, field.payload, field.end), {INITIALIZER: tensor})

    return _rewritten(data, fields(data, 0, len(data)), {GRAPH: graph})


def _memory(array: Array) -> Piece:
    held = np.ascontiguousarray(array)
    return held.data.cast("B") if held.dtype.isbuiltin == 1 else held.tobytes()
