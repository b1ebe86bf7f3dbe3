"""Every editing method on edits whose truth is known: ``python -m benchmarks.editing --json docs/editing.json``.

Each method runs as a user gets it, at its own numbers, on the same pictures of ``sfumato.zoo.edits`` with the same model,
guidance and steps; ``--solver`` and ``--steps`` give all of them another sampler. A method that takes a mask gets the true
one where the kind of edit has one, and appears a second time with it. What needs points, a second picture or a learned direction
is left out.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sfumato as sf
from sfumato.core import InputError
from sfumato.files import write_atomically
from sfumato.zoo import edits as known
from sfumato.zoo.score_edits import measured, summary


def arms(kind: str, names: Sequence[str]) -> list[tuple[str, bool]]:
    """(method, with mask) of everything that can do this kind of edit."""
    made = []
    for name in names:
        method = sf.editing.get(name)
        if "prompt" not in method.needs and "mask" not in method.needs:
            continue  # it follows a learned direction, or none: not what words or a region say
        if method.needs <= {"prompt", "source"}:
            made.append((name, False))
        if (
            kind != "vendor"
            and method.needs <= {"prompt", "source", "mask"}
            and "mask" in method.needs | method.accepts
        ):
            made.append((name, True))
    return made


def edited(pipeline: Any, edits: known.Edits, name: str, masked: bool, **sampling: Any) -> tuple[Any, float]:
    """What a method makes of the edits, and the seconds it took."""
    method = sf.editing.get(name)
    takes = method.needs | method.accepts
    options: dict[str, Any] = {"mask": edits.mask} if masked else {}
    if "source" in takes:
        options |= {"source": edits.source, "source_cond": edits.source_cond}
    began = time.perf_counter()
    found = sf.editing.perform(
        pipeline, edits.before, edits.target, cond=edits.cond, method=method, **options, **sampling
    )
    return found, time.perf_counter() - began


def row(edits: known.Edits, found: Any, seconds: float, name: str, masked: bool) -> dict[str, Any]:
    """One line of the table, JSON-able."""
    figures = {
        key: {"value": m.value, "low": m.low, "high": m.high}
        for key, m in summary(measured(edits, found.images)).items()
    }
    return {
        "kind": edits.kind, "method": name, "mask": masked, "n": len(edits), "calls": found.nfe,
        "seconds an image": seconds / len(edits), **figures,
    }  # fmt: skip


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="emoji-latent")
    parser.add_argument("--methods", nargs="*", default=None)
    parser.add_argument("--kinds", nargs="*", default=list(known.KINDS))
    parser.add_argument("--n", type=int, default=24)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--solver", default=None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    pipeline = sf.load(given.model)
    names = given.methods or sf.editing.names()
    rows, strips = [], {}
    for kind in given.kinds:
        edits = known.load(kind, given.n, pipeline.size[0], seed=given.seed)
        strips[kind] = [("original", edits.before[:6]), ("true edit", edits.after[:6])]
        for name, masked in arms(kind, names):
            try:
                found, seconds = edited(
                    pipeline, edits, name, masked, steps=given.steps, solver=given.solver, seed=given.seed
                )
            except InputError as refusal:  # a method may refuse a model or a solver, and says so
                print(f"{kind:10} {name:22} refused: {refusal}")
                rows.append({"kind": kind, "method": name, "mask": masked, "refused": str(refusal)})
                continue
            made = row(edits, found, seconds, name, masked)
            rows.append(made)
            strips[kind].append((name + (", mask" if masked else ""), found.images[:6]))
            changed = f"{made['changed']['value']:6.1f}" if "changed" in made else "     -"
            print(
                f"{kind:10} {name:22} {'mask' if masked else '    '} distance {made['distance']['value']:5.2f}  "
                f"reached {made['reached']['value']:5.2f}  changed {changed}  calls {found.nfe:5.0f}  {seconds:5.1f} s",
                flush=True,
            )
    if given.json:
        settings = {key: getattr(given, key) for key in ("model", "n", "steps", "solver", "seed")}
        write_atomically(given.json, json.dumps({"settings": settings, "rows": rows}, indent=1).encode())
        drawn(strips, given.json.with_suffix(".png"))


def drawn(strips: dict[str, list[tuple[str, Any]]], path: Path) -> None:
    """One column a kind of edit, one line a method: six pictures each."""
    from sfumato.recipes._plots import figure, image, sheet, style

    labels = list(dict.fromkeys(label for strip in strips.values() for label, _ in strip))
    with style():
        made = figure(2.2 + 3.1 * len(strips), 0.58 * len(labels) + 0.5)
        axes = made.subplots(len(labels), len(strips), squeeze=False)
        for column, (kind, strip) in enumerate(strips.items()):
            pictures = dict(strip)
            for line, label in enumerate(labels):
                axis = axes[line][column]
                axis.axis("off")
                if label in pictures:
                    axis.imshow(sheet(pictures[label], columns=6).numpy(), interpolation="lanczos")
                if line == 0:
                    axis.set_title(kind)
                if column == 0:
                    axis.text(-0.03, 0.5, label, transform=axis.transAxes, ha="right", va="center")
        image(made, dpi=100).save(path, optimize=True)


if __name__ == "__main__":
    main()
