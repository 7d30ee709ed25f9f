"""PNG files from arrays, with the standard library alone."""

from __future__ import annotations

import struct
import zlib

from ..records import Array

COLOUR_TYPES = {1: 0, 3: 2}  # channels: grey, RGB (PNG specification, 11.2.2)


def png(pixels: Array) -> bytes:
    """A PNG file of uint8 pixels (H, W), (H, W, 1) or (H, W, 3); equal pixels give equal bytes.

    Raises:
        ValueError: another shape or type.
    """
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    if pixels.ndim != 3 or pixels.shape[2] not in COLOUR_TYPES or pixels.dtype.name != "uint8" or not pixels.size:
        raise ValueError(f"expected uint8 pixels (H, W, 1 or 3), got {pixels.dtype} of shape {list(pixels.shape)}")
    height, width, channels = pixels.shape
    lines = b"".join(b"\0" + row.tobytes() for row in pixels)  # filter 0: none
    header = struct.pack(">IIBBBBB", width, height, 8, COLOUR_TYPES[channels], 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(lines, 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in parts)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
