"""``sfumato papers``, ``reproduce`` and ``cite``: published systems and their evidence."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sfumato.cli._app import FAILED, Answer, command, table

if TYPE_CHECKING:
    from sfumato.recipes import Evidence, Paper


@command("papers")
def papers(
    family: Annotated[str | None, typer.Option(help="Only this family, e.g. solvers.")] = None,
    made: Annotated[bool, typer.Option("--made", help="Only systems that have a recipe.")] = False,
) -> Answer:
    """List the published systems: slug, title, family, kind, command and last verdict."""
    from sfumato import recipes
    from sfumato.core.errors import InputError

    have = set(recipes.names())
    listed = [p for p in recipes.papers() if p.slug in have or not made]
    if family is not None:
        families = sorted({p.family for p in recipes.papers()})
        if family not in families:
            raise InputError(f"no family {family!r}: choose from {', '.join(families)}")
        listed = [p for p in listed if p.family == family]
    rows = [row(paper, paper.slug in have) for paper in listed]
    held = sum(r["verdict"] == "holds" for r in rows)
    counts = {"systems": len(rows), "recipes": sum(r["command"] is not None for r in rows), "hold": held}
    shown = table(
        rows,
        ("slug", "title", "family", "kind", "verdict", "checks"),
        ", ".join(f"{n} {what}" for what, n in counts.items()),
    )
    return Answer({**counts, "papers": rows}, shown)


def row(paper: Paper, made: bool) -> dict[str, Any]:
    """One published system as it is listed."""
    from sfumato import recipes

    kept = recipes.evidence(paper.slug)
    verdict = None if kept is None else "holds" if kept.holds else "does not hold"
    return {
        "slug": paper.slug,
        "title": paper.title,
        "family": paper.family,
        "kind": recipes.get(paper.slug).kind if made else None,
        "command": f"sfumato reproduce {paper.slug}" if made else None,
        "verdict": verdict or ("run reproduce" if made else "no recipe yet"),
        "checks": None if kept is None else kept.tally,
    }


@command("reproduce")
def reproduce(
    slugs: Annotated[
        list[str] | None, typer.Argument(metavar="SLUG", help="Published systems, as `papers` lists them.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every system that has a recipe.")] = False,
    seed: Annotated[int, typer.Option(help="A claim must hold on seeds that nobody tried.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder to keep SLUG.json and SLUG.png in.")] = None,
) -> Answer:
    """Run published systems beside their baselines; the exit status says whether every claim held."""
    from sfumato import recipes
    from sfumato.cli._places import folder
    from sfumato.core.errors import InputError

    chosen = recipes.names() if everything else list(slugs or ())
    if not chosen:
        raise InputError("no system was named: give a SLUG (`sfumato papers` lists them), or --all")
    if out is not None:
        folder(out)
    found = [made.run(seed=seed, out=out) for made in [recipes.get(slug) for slug in chosen]]
    held = all(evidence.holds for evidence in found)
    single = len(found) == 1 and not everything
    record = found[0].record() if single else {"holds": held, "evidence": [evidence.record() for evidence in found]}
    return Answer(record, "\n\n".join(map(verdict, found)), 0 if held else FAILED)


def verdict(evidence: Evidence) -> str:
    """A run as text: the claim, each check with its figures, and the outcome."""
    lines = [f"{evidence.slug}: {evidence.claim}", f"against {evidence.baseline}; {evidence.data}; {evidence.model}"]
    for check in evidence.checks:
        beside = "" if check.baseline is None else f", baseline {check.baseline:.5g}"
        lines.append(
            f"  {'holds' if check.holds else 'FAILS'}  {check.name}: ours {check.ours:.5g}{beside}  ({check.rule})"
        )
    lines += [evidence.notes] if evidence.notes else []
    outcome = "the claim holds" if evidence.holds else "not reproduced"
    return "\n".join([*lines, f"{outcome} (seed {evidence.seed}, {evidence.seconds:.0f} s)"])


@command("cite")
def cite(
    names: Annotated[list[str] | None, typer.Argument(metavar="NAME", help="Published systems or models.")] = None,
) -> Answer:
    """BibTeX of sfumato and of the systems or models that are named."""
    from sfumato.recipes._cite import entries

    found = entries(*(names or ()))
    return Answer({"entries": found}, "\n\n".join(dict.fromkeys(found.values())))
