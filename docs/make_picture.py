"""Draw the widths of all layers before and after, from a manifest: ``python docs/make_picture.py manifest.json widths.svg``."""

from __future__ import annotations

import json
import sys
from html import escape
from pathlib import Path
from typing import Any

import sfp_onnx

BAR, GAP, HEIGHT, LEFT, TOP = 11, 3, 200, 46, 46


def widths(manifest: dict[str, Any]) -> list[tuple[str, int, int]]:
    """(layer, output channels before, after) in network order, from the original model and the manifest's cuts."""
    analysis = sfp_onnx.inspect(manifest["model"]["path"])
    removed = {cut["tensor"]: len(cut["removed"]) for cut in manifest["cuts"] if cut["axis"] == 1}
    found = []
    for layer in analysis.coupling.layers:
        output = layer.node.outputs[0]
        before = analysis.prepared.trace.shapes[output][1]
        found.append((layer.node.name, before, before - removed.get(output, 0)))
    return found


def svg(layers: list[tuple[str, int, int]], title: str) -> str:
    """A bar per layer: the outline is the original width, the filled part what stays."""
    top = max(before for _, before, _ in layers)
    width, height = LEFT + len(layers) * (BAR + GAP) + 12, HEIGHT + TOP + 34
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        f'<text x="{LEFT}" y="20" font-size="14" fill="#1a1a1a">{escape(title)}</text>',
        f'<text x="{LEFT}" y="37" fill="#666">output channels per layer, in network order: outline before, filled after</text>',
    ]
    for share in (0.25, 0.5, 0.75, 1.0):
        y = TOP + HEIGHT * (1 - share)
        lines.append(f'<line x1="{LEFT}" x2="{width - 12}" y1="{y}" y2="{y}" stroke="#e3e3e3"/>')
        lines.append(f'<text x="{LEFT - 6}" y="{y + 4}" text-anchor="end" fill="#666">{top * share:.0f}</text>')
    for index, (name, before, after) in enumerate(layers):
        x = LEFT + index * (BAR + GAP)
        for channels, style in ((before, 'fill="#dbe7f3" stroke="#8fb0d0"'), (after, 'fill="#1f6fb2"')):
            size = HEIGHT * channels / top
            lines.append(f'<rect x="{x}" y="{TOP + HEIGHT - size:.1f}" width="{BAR}" height="{size:.1f}" {style}>')
            lines.append(f"<title>{escape(name)}: {before} to {after}</title></rect>")
    lines.append(f'<text x="{LEFT}" y="{TOP + HEIGHT + 20}" fill="#666">input</text>')
    lines.append(f'<text x="{width - 12}" y="{TOP + HEIGHT + 20}" text-anchor="end" fill="#666">output</text></svg>')
    return "\n".join(lines) + "\n"


def main() -> None:
    """Read the manifest, write the picture."""
    manifest = json.loads(Path(sys.argv[1]).read_text())
    before, after = manifest["before"], manifest["after"]
    title = (
        f"{Path(manifest['model']['path']).stem}: {before['macs'] / 1e6:.0f}M to {after['macs'] / 1e6:.0f}M MACs, "
        f"{before['params'] / 1e3:.0f}k to {after['params'] / 1e3:.0f}k parameters"
    )
    Path(sys.argv[2]).write_text(svg(widths(manifest), title))


if __name__ == "__main__":
    main()
