from __future__ import annotations

from functools import reduce

from sfumato.core import Denoiser, Guidance, Registry

registry = Registry("acceleration", "sfumato.acceleration")
names, register = registry.names, registry.register


def get(spec: str) -> Guidance:
    """An acceleration, Denoiser -> Denoiser, by name or spec; it goes inside guidance.

    spec  "deepcache", "deepcache(interval=3)", or several from the inside out: "token-merging(ratio=0.5) | deepcache"

    Raises UnknownName for a name that is not registered, InputError for numbers that it does not take.
    """
    wraps = [registry.make(part.strip()) for part in spec.split("|")]

    def accelerated(denoiser: Denoiser) -> Denoiser:
        return reduce(lambda inner, wrap: wrap(inner), wraps, denoiser)

    return accelerated
