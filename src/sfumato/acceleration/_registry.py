from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any

from sfumato.core import Denoiser, Guidance, InputError, Registry

registry = Registry("acceleration", "sfumato.acceleration")
names, register = registry.names, registry.register
Calibrate = Callable[[int, int, int], Any]
"""(items, steps, seed) -> a calibration set of the model's own runs."""


@dataclass(frozen=True)
class Fitted:
    """An acceleration that is fitted to runs of the model: ``make(denoiser, calibration)``, on that many runs of so many steps."""

    make: Callable[[Denoiser, Any], Denoiser]
    items: int
    steps: int
    seed: int

    def on(self, calibrate: Calibrate | None) -> Guidance:
        """The acceleration itself, where there is a model to run. InputError where there is only a denoiser."""
        if calibrate is None:
            raise InputError("this one is fitted to runs of the model: give a Pipeline, or call it with a Calibration")
        calibration = calibrate(self.items, self.steps, self.seed)
        return lambda denoiser: self.make(denoiser, calibration)


def get(spec: str, calibrate: Calibrate | None = None) -> Guidance:
    """An acceleration, Denoiser -> Denoiser, by name or spec; it goes inside guidance.

    spec       "deepcache", "deepcache(interval=3)", or several from the inside out: "int8 | deepcache"
    calibrate  (items, steps, seed) -> Calibration, for those that are fitted to runs of the model ('int8', 'quantized')

    Raises UnknownName for a name that is not registered, InputError for numbers that it does not take.
    """
    made = [registry.make(part.strip()) for part in spec.split("|")]
    wraps = [part.on(calibrate) if isinstance(part, Fitted) else part for part in made]

    def accelerated(denoiser: Denoiser) -> Denoiser:
        return reduce(lambda inner, wrap: wrap(inner), wraps, denoiser)

    return accelerated
