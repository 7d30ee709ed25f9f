"""Write the tables of operators and scores into README.md, from the registries: ``python docs/make_tables.py [--check]``."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from sfp_onnx.rules import SUMMARY
from sfp_onnx.scores import SCORES

README = Path(__file__).parent.parent / "README.md"


def operators() -> str:
    """One row per behaviour, with all operators that have it."""
    rows: dict[str, list[str]] = {}
    for operator, does in SUMMARY.items():
        rows.setdefault(does, []).append(operator)
    lines = ["| what it does to channels | operators |", "|---|---|"]
    lines += [f"| {does} | {', '.join(sorted(names))} |" for does, names in sorted(rows.items(), key=lambda item: sorted(item[1])[0])]
    return "\n".join(lines)


def scores() -> str:
    """One row per score."""
    lines = ["| score | keeps channels with a large ... | data | source |", "|---|---|---|---|"]
    for name, score in sorted(SCORES.items()):
        lines.append(f"| `{name}` | {score.summary} | {'needed' if score.needs else 'not needed'} | {score.source} |")
    return "\n".join(lines)


def main() -> int:
    """Rewrite the marked parts; with --check only tell whether they are up to date."""
    old = text = README.read_text()
    for name, table in (("operators", operators()), ("scores", scores())):
        pattern = re.compile(f"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        text = pattern.sub(lambda match, table=table: f"{match[1]}{table}\n{match[2]}", text)
    if "--check" in sys.argv:
        if text != old:
            print("README.md: the tables are out of date; run python docs/make_tables.py")
        return int(text != old)
    README.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
