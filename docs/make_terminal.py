"""Run commands and draw what a terminal shows of them: ``python docs/make_terminal.py terminal.svg 'sfp-onnx inspect model.onnx' ...``.

Words on standard error come where they were said. Long lines are wrapped (of tables: cut), long outputs keep their first and last lines.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap
from html import escape
from pathlib import Path

COLUMNS, MOST = 132, 24
NO_BREAK = "\u00a0"
ADVANCE, LINE, EDGE, BAR = 7.83, 17.5, 16, 34
COLOURS = {"command": "#9ecbff", "note": "#8b98a5", "plain": "#dfe6ee", "good": "#7ee2a8"}


def said(command: str) -> list[tuple[str, str]]:
    """What a command prints, as (kind, line)."""
    done = subprocess.run(command, shell=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return shown(done.stdout.splitlines())


def shown(lines: list[str]) -> list[tuple[str, str]]:
    """Lines as they fit."""
    if len(lines) > MOST:
        lines = [*lines[: MOST // 2], f"... ({len(lines) - MOST} lines)", *lines[-MOST // 2 :]]
    found = []
    for line in lines:
        table = "   " in line or "--  --" in line
        parts = [line[: COLUMNS - 1] + "\u2026"] if table and len(line) > COLUMNS else textwrap.wrap(line, COLUMNS) if not table else [line]
        found += [(kind_of(line), part) for part in parts or [""]]
    return found


def kind_of(line: str) -> str:
    """How a line is coloured."""
    if line.startswith(("Note:", "score:", "...", "Next:", "report:")):
        return "note"
    return "good" if line.startswith(("verified", "top-1", "wrote")) else "plain"


def svg(lines: list[tuple[str, str]]) -> str:
    """(kind, text) lines as a window."""
    width, height = EDGE * 2 + ADVANCE * COLUMNS, BAR + LINE * (len(lines) + 1) + EDGE
    drawn = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" font-family="DejaVu Sans Mono, Menlo, Consolas, '
        'monospace" font-size="13">',
        f'<rect width="{width:.0f}" height="{height:.0f}" rx="9" fill="#15191f"/>',
        *(f'<circle cx="{EDGE + 18 * index}" cy="18" r="5.5" fill="#3a424c"/>' for index in range(3)),
    ]
    for index, (kind, text) in enumerate(lines):
        y = BAR + LINE * (index + 1)
        length = f' textLength="{ADVANCE * len(text):.1f}" lengthAdjust="spacingAndGlyphs"' if text.strip() else ""
        drawn.append(f'<text x="{EDGE}" y="{y:.1f}" fill="{COLOURS[kind]}"{length}>{escape(text).replace(" ", NO_BREAK)}</text>')
    return "\n".join([*drawn, "</svg>"]) + "\n"


def main() -> None:
    """Run the commands in turn, write the picture."""
    lines: list[tuple[str, str]] = []
    for command in sys.argv[2:]:
        first, *rest = textwrap.wrap(command, COLUMNS - 6, break_on_hyphens=False)
        lines.append(("command", f"$ {first}{' ' + chr(92) if rest else ''}"))
        lines += [("command", f"    {part}{' ' + chr(92) if part is not rest[-1] else ''}") for part in rest]
        lines += said(command)
        lines.append(("plain", ""))
    Path(sys.argv[1]).write_text(svg(lines[:-1]))


if __name__ == "__main__":
    main()
