"""Guidance by name: specs of cards and of the command line, several joined by |."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from sfumato.core import Denoiser, Guidance, InputError, Registry

registry = Registry("guidance", "sfumato.guidance")
names, register = registry.names, registry.register


def get(spec: str, /, load: Callable[[str], Denoiser] | None = None, **numbers: Any) -> Guidance:
    """A guidance by name with these numbers, or from a spec, as cards and the command line write it.

    spec  "apg", "apg(scale=4)", or several from the inside out: "cfg(scale=8) | threshold(mode='static')"
    load  opens a saved model by name, for a guidance whose spec names another one: "autoguidance(scale=2, worse='runs/early')"

    Raises UnknownName for a name that is not registered, InputError for numbers that it does not take.
    """
    parts = [part.strip() for part in spec.split("|")]
    if numbers and (len(parts) > 1 or "(" in spec):
        raise InputError(f"give the numbers of {spec!r} in the spec or as keywords, not both")
    made = [registry.get(spec, **numbers)] if numbers else [registry.make(part) for part in parts]
    if load is not None:
        made = [replace(g, worse=load(g.worse)) if isinstance(getattr(g, "worse", None), str) else g for g in made]
    return made[0] if len(made) == 1 else _nested(made)


def _nested(made: list[Guidance]) -> Guidance:
    """The guidances around each other, the first innermost."""

    def guided(denoiser: Denoiser) -> Denoiser:
        for guidance in made:
            denoiser = guidance(denoiser)
        return denoiser

    return guided
