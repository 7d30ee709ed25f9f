"""Write the tables of operators, scores, bandits and dilution methods from the registries: ``python docs/make_tables.py [--check]``."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from sfp_onnx.evaluation import MAIN
from sfp_onnx.evaluation.measures import MEASURES
from sfp_onnx.methods.bandits import PREFIX
from sfp_onnx.methods.bandits.policies import POLICIES
from sfp_onnx.methods.dilution import METHODS
from sfp_onnx.rules.registry import SUMMARY
from sfp_onnx.scores.scoring import SCORES

ROOT = Path(__file__).parent.parent


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
        if name.startswith(PREFIX):
            continue  # docs/bandits.md
        lines.append(f"| `{name}` | {score.summary} | {'needed' if score.needs_data else 'not needed'} | {score.source} |")
    return "\n".join(lines)


def policies() -> str:
    """One row per bandit policy: the first sentence of what its class says."""
    lines = ["| score | how it spends its ablations |", "|---|---|"]
    for name, policy in sorted(POLICIES.items()):
        text = re.split(r"(?<=[a-z0-9)]{2})\.\s+(?=[A-Z])", " ".join((policy.__doc__ or "").split()))[0].rstrip(".")
        lines.append(f"| `{PREFIX}{name}` | {text} |")
    return "\n".join(lines)


def methods() -> str:
    """One row per dilution method."""
    lines = ["| method | removes | rate | source |", "|---|---|---|---|"]
    for own in METHODS.values():
        lines.append(f"| `{own.pattern or own.name}` | {own.summary} | {'its own' if own.fixed else '`--rate`'} | {own.source} |")
    return "\n".join(lines)


def measures() -> str:
    """One row per measure; bold where a meaning is judged by it."""
    main = {name for names in MAIN.values() for name in names[:2]}
    lines = ["| measure | of | labels | what it is |", "|---|---|---|---|"]
    for own in MEASURES.values():
        kinds = ", ".join(kind.value for kind in MAIN if kind in own.kinds)
        name = f"**{own.name}**" if own.name in main else own.name
        lines.append(f"| {name} | {kinds} | {'needed' if own.labelled else ''} | {own.does} |")
    return "\n".join(lines)


TABLES = {
    "docs/measures.md": {"measures": measures},
    "docs/operators.md": {"operators": operators},
    "docs/choosing-a-score.md": {"scores": scores},
    "docs/bandits.md": {"policies": policies},
    "docs/dilution.md": {"methods": methods},
}


def main() -> int:
    """Rewrite the marked parts; with --check only tell whether they are up to date."""
    stale = 0
    for name, tables in TABLES.items():
        path = ROOT / name
        old = text = path.read_text()
        for mark, make in tables.items():
            pattern = re.compile(f"(<!-- {mark} -->\n).*?(<!-- /{mark} -->)", re.DOTALL)
            if not pattern.search(text):
                raise SystemExit(f"{name}: no marks <!-- {mark} --> and <!-- /{mark} -->")
            table = make()
            text = pattern.sub(lambda match, table=table: f"{match[1]}{table}\n{match[2]}", text)
        if text == old:
            continue
        if "--check" in sys.argv:
            print(f"{name}: the tables are out of date; run python docs/make_tables.py")
            stale = 1
        else:
            path.write_text(text)
    return stale


if __name__ == "__main__":
    sys.exit(main())
