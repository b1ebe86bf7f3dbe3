"""Write docs/editing.md from docs/editing.json, which ``python -m benchmarks.editing --json docs/editing.json`` measures: ``make
docs``. Nothing is measured here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sfumato import editing

HERE = Path(__file__).parent
SOURCE, QUICK, PAGE = HERE / "editing.json", HERE / "editing-8.json", HERE / "editing.md"
KINDS = {
    "tone": "The same person or hand with another skin tone; drawings no model was trained on.",
    "vendor": "The same thing in another vendor's style; drawings no model was trained on. Everything may change.",
    "colour": "A heart, circle or square of another colour.",
    "attribute": "Something added or taken away: rain, a halo, a raised flag.",
}


def cell(row: Mapping[str, Any], key: str, digits: int = 2) -> str:
    """A figure with its interval."""
    if key not in row:
        return ""
    m = row[key]
    return f"{m['value']:.{digits}f} [{m['low']:.{digits}f}, {m['high']:.{digits}f}]"


def table(kind: str, rows: list[Mapping[str, Any]]) -> str:
    """The methods on one kind of edit, nearest to the truth first."""
    lines = [
        "| method | distance to the true edit | reached | changed outside the mask | calls | seconds |",
        "|---|---|---|---|---|---|",
    ]
    made = sorted((r for r in rows if "distance" in r), key=lambda r: r["distance"]["value"])
    for r in made:
        name = f"`{r['method']}`" + (", mask" if r["mask"] else "")
        lines.append(
            f"| {name} | {cell(r, 'distance')} | {cell(r, 'reached')} | {cell(r, 'changed', 1)} | {r['calls']:.0f} | {r['seconds an image']:.2f} |"
        )
    lines += [f"| `{r['method']}` | refused: {r['refused']} | | | | |" for r in rows if "refused" in r]
    return f"## {kind.capitalize()}\n\n{KINDS[kind]}\n\n" + "\n".join(lines) + "\n"


def methods() -> str:
    """What every registered method needs."""
    lines = ["| method | needs | also takes | what it does |", "|---|---|---|---|"]
    for name in editing.names():
        method = editing.get(name)
        first = (type(method).__doc__ or "").partition("\n")[0]
        takes = ", ".join(sorted(method.accepts - method.needs))
        lines.append(
            f"| `{name}` | {', '.join(sorted(method.needs))} | {takes} | {first.replace('|', chr(92) + '|')} |"
        )
    return "\n".join(lines)


def quick(found: Mapping[str, Any]) -> str:
    """The same methods with a fast solver."""
    s = found["settings"]
    kinds = list(dict.fromkeys(row["kind"] for row in found["rows"]))
    lines = ["| edit | method | distance to the true edit | reached | calls | seconds |", "|---|---|---|---|---|---|"]
    for kind in kinds:
        for r in found["rows"]:
            if r["kind"] == kind and "distance" in r:
                name = f"`{r['method']}`" + (", mask" if r["mask"] else "")
                lines.append(
                    f"| {kind} | {name} | {cell(r, 'distance')} | {cell(r, 'reached')} | {r['calls']:.0f} | {r['seconds an image']:.2f} |"
                )
    return (
        f"## In few calls\n\nAny solver may be given. Here the same pictures with `{s['solver']}` and {s['steps']} steps for a whole run "
        "(calls count both ways, and twice under guidance): `python -m benchmarks.editing --solver ... --json docs/editing-8.json`.\n\n"
        + "\n".join(lines)
        + "\n\n![the same methods in few calls](editing-8.png)\n"
    )


def page(found: Mapping[str, Any], few: Mapping[str, Any]) -> str:
    """The whole page."""
    s = found["settings"]
    kinds = list(dict.fromkeys(row["kind"] for row in found["rows"]))
    parts = [
        "# Editing",
        "",
        "`sf.edit(pipeline, image, prompt, method=NAME, ...)` and `sfumato edit IMAGE --prompt TEXT --method NAME` are one front door. "
        "Each method says what it needs and refuses what it would ignore; `sf.editing.perform` also returns the state and the calls.",
        "",
        methods(),
        "",
        "# Edits whose truth is known",
        "",
        f"Emoji give pairs of drawings that differ by one thing. Every method edits the same {s['n']} pictures of each kind with "
        f"`{s['model']}`, {s['steps']} steps{' of ' + s['solver'] if s['solver'] else ''}, seed {s['seed']}, at its own numbers. "
        "*distance*: rms to the true drawing over that of the original (median; 1 is nothing done, 0 the true edit). *reached*: share "
        "whose embedding by the judge is nearer to the true drawing than to the original. *changed*: rms of 255 outside the mask of "
        "the true difference. 95 % intervals. Written by `python -m benchmarks.editing --json docs/editing.json`.",
        "",
        "![every method on every kind of edit](editing.png)",
        "",
        *(table(kind, [r for r in found["rows"] if r["kind"] == kind]) for kind in kinds),
        quick(few),
    ]
    return "\n".join(parts)


def write() -> None:
    """Write the page."""
    PAGE.write_text(page(*(json.loads(source.read_text("utf-8")) for source in (SOURCE, QUICK))), "utf-8")


if __name__ == "__main__":
    write()
