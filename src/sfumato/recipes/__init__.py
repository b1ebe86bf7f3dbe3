"""Published systems, each built from the library's parts, with its claim, its baseline and the check.

A module of this folder is one system (``dpm_solver_pp.py`` is ``dpm-solver-pp``) and is imported when it is asked for.
"""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path

from sfumato.core.errors import InputError, UnknownName
from sfumato.recipes._base import KINDS, Check, Evidence, Findings, Paper, Recipe, _made, about, papers, recipe
from sfumato.recipes._cite import cite

# an installed wheel carries the verdicts inside the package; in a checkout they are documentation
EVIDENCE = (Path(__file__).parent / "evidence", Path(__file__).parents[3] / "docs" / "evidence")

__all__ = [
    "KINDS", "Check", "Evidence", "Findings", "Paper", "Recipe", "about", "citation", "cite", "evidence", "get", "names", "papers",
    "recipe",
]  # fmt: skip


def names() -> list[str]:
    """The slugs of all systems that have a recipe."""
    modules = (module.name for module in pkgutil.iter_modules(__path__))
    return sorted(name.replace("_", "-") for name in modules if not name.startswith("_"))


def get(slug: str) -> Recipe:
    """The recipe of a published system. UnknownName where the slug is unknown, InputError where it has no recipe yet."""
    about(slug)
    if slug not in names():
        raise InputError(f"{slug} has no recipe yet; those that have one: {', '.join(names()) or 'none'}")
    importlib.import_module(f"sfumato.recipes.{slug.replace('-', '_')}")
    if slug not in _made:
        raise UnknownName(f"sfumato/recipes/{slug.replace('-', '_')}.py registers no recipe named {slug!r}")
    return _made[slug]


def evidence(slug: str) -> Evidence | None:
    """The last verdict that was kept, or None: `sfumato reproduce SLUG` makes one."""
    about(slug)
    for folder in EVIDENCE:
        path = folder / f"{slug}.json"
        if path.is_file():
            return Evidence.of(path.read_text(encoding="utf-8"))
    return None


def citation(slug: str) -> str:
    """BibTeX of a published system: its recipe's, or what is known without one."""
    if slug in names():
        return get(slug).citation.strip()
    return f"@misc{{{slug},\n  title = {{{about(slug).title}}}\n}}"
