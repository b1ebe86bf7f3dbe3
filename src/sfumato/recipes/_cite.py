"""BibTeX of whatever was used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sfumato.recipes._base import Recipe, papers

SOFTWARE = """@software{{sfumato,
  title = {{sfumato: one algebra for diffusion models}},
  author = {{{{sfumato maintainers}}}},
  version = {{{version}}}
}}"""

SOLVERS: Mapping[str, str] = {
    "bdia": "bdia", "dpm-solver++": "dpm-solver-pp", "dpm-solver-v3": "dpm-solver-v3", "dpm-solver": "dpm-solver", "edict": "edict",
    "ghvb": "ghvb", "heavy-ball": "ghvb", "pndm": "pndm", "plms": "pndm", "s-pndm": "pndm",
}  # fmt: skip


def cite(*things: Any) -> str:
    """BibTeX of sfumato and of everything that these use, each entry once.

    things  pipelines (the systems their card cites, and that of their solver), recipes, slugs of published systems, or names
            of models. Raises UnknownName for a text that is neither.
    """
    return "\n\n".join(dict.fromkeys(entries(*things).values()))


def entries(*things: Any) -> dict[str, str]:
    """The same by slug."""
    import sfumato
    from sfumato.recipes import citation

    found = {"sfumato": SOFTWARE.format(version=sfumato.__version__)}
    known = {paper.slug for paper in papers()}
    for thing in things:
        if isinstance(thing, Recipe):
            found[thing.slug] = thing.citation.strip()
        elif isinstance(thing, str) and thing in known:
            found[thing] = citation(thing)
        else:
            found |= {slug: citation(slug) for slug in _used(thing)}
    return found


def _used(thing: Any) -> list[str]:
    """The published systems that a pipeline, or the model of that name, uses."""
    import sfumato
    from sfumato.recipes import about

    if isinstance(thing, str):
        try:
            thing = sfumato.load(thing)
        except FileNotFoundError:
            about(thing)  # the error that lists the published systems
    solver = thing.solver if isinstance(thing.solver, str) else ""
    names = [slug for name, slug in SOLVERS.items() if solver == name or solver.startswith((f"{name}(", f"{name}-"))]
    return list(dict.fromkeys([*thing.card.get("cites", ()), *names]))
