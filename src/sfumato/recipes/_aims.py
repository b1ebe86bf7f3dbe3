"""What the recipes of solver searches share: bundled and exact digits to aim at, and named solvers on their best grids."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

from sfumato import grids, load, oracles, processes, solvers
from sfumato.core import mix
from sfumato.recipes._small import digits
from sfumato.tuning.target import Target, aim

CLASSES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
GRIDS = ("uniform", "logsnr", "quadratic")


@cache
def model() -> Any:
    """The bundled class-conditional U-Net of digits."""
    return load("digits")


def network(
    seed: int, part: int, n: int, guidance: float = 1.0, classes: Sequence[str] = CLASSES, **settings: Any
) -> Target:
    """n starts of the bundled network, its classes in turn; each part has noise of its own."""
    pipeline = model()
    told = pipeline.conditions(n, [classes[i % len(classes)] for i in range(n)])
    return aim(pipeline.guided(guidance), (n, 1, 8, 8), seed=mix(seed, part), cond=told, batch=64, **settings)


def exact(seed: int, part: int, n: int, **settings: Any) -> Target:
    """n starts of the exact belief under a kernel density of 400 digits (std 0.15), VP."""
    density = oracles.Empirical(digits().x[:400], 0.15)
    return aim(
        density.denoiser(processes.VP()), (n, 64), seed=mix(seed, part), batch=1024, dtype=torch.float64, **settings
    )


def named(
    choosing: Target, unseen: Target, specs: Sequence[str], calls: int, on: Sequence[str] = GRIDS
) -> dict[str, torch.Tensor]:
    """Errors on unseen noise of each named solver, on the grid that is best for it on the choosing noise."""
    out = {}
    for spec in specs:
        solver = solvers.registry.make(spec)
        times = [tuple(grids.registry.make(g)(unseen.process, calls, 1.0, 0.0).tolist()) for g in on]
        best = min(times, key=lambda t, s=solver: choosing.score(choosing.errors(s, t)))  # type: ignore[misc]
        out[spec] = unseen.errors(solver, best)
    return out
