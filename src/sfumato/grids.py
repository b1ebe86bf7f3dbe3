"""Which times: (process, n, start, stop) -> (n + 1,) float64 times falling from start to stop.

Inversion runs a grid flipped. Spacing in lambda = log(alpha / sigma) is clipped to [-5.1, lambda_max] for *placing* the
inner times only: the first and the last time are exactly ``start`` and ``stop``, also where lambda is infinite.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sfumato.core import Grid, InputError, Registry

registry = Registry("grid")
get, names, register = registry.get, registry.names, registry.register


def _ends(inner: Sequence[float], start: float, stop: float) -> Tensor:
    return torch.tensor([start, *inner, stop], dtype=torch.float64)


def _spaced(place: Callable[[Any, float], float], back: Callable[[Any, float], float]) -> Grid:
    """n + 1 times equally spaced in the coordinate ``place(process, t)``."""

    def grid(process: Any, n: int, start: float, stop: float) -> Tensor:
        a, b = place(process, start), place(process, stop)
        return _ends([back(process, a + (b - a) * i / n) for i in range(1, n)], start, stop)

    return grid


def _closed(inner: Grid, lam_max: float) -> Grid:
    """n steps of ``inner``; where stop is cleaner than lam_max (its lambda may be infinite), the last one leads from there."""

    def grid(process: Any, n: int, start: float, stop: float) -> Tensor:
        clean, first = process.coef(stop).lam, process.coef(start).lam
        if n > 1 and first >= lam_max and math.isinf(clean):
            raise InputError(f"start = {start} is cleaner already than the grid's lam_max: raise it, or use 'uniform'")
        if n == 1 or clean <= lam_max or first >= lam_max:
            return inner(process, n, start, stop)
        return _ends(inner(process, n - 1, start, process.time(lam_max)).tolist()[1:], start, stop)

    return grid


def _lam(process: Any, t: float) -> float:
    return max(process.coef(t).lam, -5.1)


@register("uniform")
def uniform() -> Grid:
    """Equally spaced in t."""
    return lambda process, n, start, stop: torch.linspace(start, stop, n + 1, dtype=torch.float64)


@register("quadratic")
def quadratic(power: float = 2.0) -> Grid:
    """t = stop + (start - stop) (1 - i / n)^power: denser near the data (the DDIM paper's quadratic tau)."""
    if not power > 0:
        raise InputError(f"power = {power}: a positive number")

    def grid(process: Any, n: int, start: float, stop: float) -> Tensor:
        return _ends([stop + (start - stop) * (1 - i / n) ** power for i in range(1, n)], start, stop)

    return grid


@register("logsnr")
def logsnr(lam_max: float = 5.0) -> Grid:
    """Equally spaced in log signal-to-noise down to lambda = lam_max, then one step to the end (Lu et al. 2022)."""
    return _closed(_spaced(_lam, lambda p, v: p.time(v)), lam_max)


@register("karras")
def karras(rho: float = 7.0, lam_max: float = 6.2) -> Grid:
    """Equally spaced in (sigma / alpha)^(1 / rho), then one step to the end (Karras et al. 2022, eq. 5).

    lam_max = 6.2 is their sigma_min = 0.002; an EDM process uses its own ``sigma_min``.
    """
    if not rho > 0:
        raise InputError(f"rho = {rho}: a positive number")
    inner = _spaced(lambda p, t: math.exp(-_lam(p, t) / rho), lambda p, v: p.time(-rho * math.log(v)))

    def grid(process: Any, n: int, start: float, stop: float) -> Tensor:
        low = getattr(process, "sigma_min", None)
        return _closed(inner, -math.log(low) if low else lam_max)(process, n, start, stop)

    return grid


@register("arctan")
def arctan(width: float = 2.25, centre: float = 0.75, lam_max: float = 5.0) -> Grid:
    """Equally spaced in arctan((lambda - centre) / width): dense where the data's structure is decided.

    ``centre`` is about 0.75 - log(data std).
    """

    if not width > 0:
        raise InputError(f"width = {width}: a positive number")

    def place(process: Any, t: float) -> float:
        return math.atan((_lam(process, t) - centre) / width)

    return _closed(_spaced(place, lambda p, v: p.time(centre + width * math.tan(v))), lam_max)


@register("arc")
def arc(width: float = 2.1, centre: float = 0.6) -> Grid:
    """``arctan`` down to lam_max = 1.7 log n - 0.3 before the last step: few steps do not spend one on what is nearly clean.

    A last step of order 1 errs as the square of sigma / alpha at its start, n^-3.4: as much as the others. How
    the numbers were chosen, for data of std about 1, is said in docs/samplers.md.
    """
    return lambda process, n, start, stop: arctan(width, centre, 1.7 * math.log(n) - 0.3)(process, n, start, stop)


@register("trailing")
def trailing(steps: int = 1000) -> Grid:
    """Discrete times counted down from the noisiest, round(N (1 - i / n)) / N (Lin et al. 2024): what a model trained on
    N discrete steps was shown. A process made from a table uses its own N."""

    def grid(process: Any, n: int, start: float, stop: float) -> Tensor:
        count = getattr(process, "steps", steps)
        if n > count * (start - stop) + 1e-9:
            raise InputError(f"{n} steps between t = {start} and {stop} of a schedule with {count} discrete times")
        times = torch.linspace(start, stop, n + 1, dtype=torch.float64)[1:-1]
        return _ends((torch.round(times * count) / count).tolist(), start, stop)

    return grid


@register("piecewise")
def piecewise(times: Sequence[float] = (1.0, 0.0)) -> Grid:
    """These times, falling from 1 to 0, for as many steps as they have; any other number interpolates them linearly in i / n.

    The grid of a distilled model, which knows its own few times. Between other ends than 1 and 0 it is scaled.
    """
    values = [float(t) for t in times]
    if (
        len(values) < 2
        or (values[0], values[-1]) != (1.0, 0.0)
        or any(a <= b for a, b in zip(values, values[1:], strict=False))
    ):
        raise InputError(f"times = {tuple(times)}: at least two, falling from 1.0 to 0.0")

    def grid(process: Any, n: int, start: float, stop: float) -> Tensor:
        def at(place: float) -> float:
            k = min(int(place), len(values) - 2)
            return values[k] + (values[k + 1] - values[k]) * (place - k)

        inner = [at(i * (len(values) - 1) / n) for i in range(1, n)]
        return _ends([stop + (start - stop) * t for t in inner], start, stop)

    return grid


def fixed(times: Sequence[float] | Tensor) -> Grid:
    """These very times, falling; steps, start and stop must agree with them (learned and searched schedules)."""
    values = torch.as_tensor(times, dtype=torch.float64)

    def grid(process: Any, n: int, start: float, stop: float) -> Tensor:
        if n != len(values) - 1 or float(values[0]) != start or float(values[-1]) != stop:
            raise InputError(
                f"a fixed grid of {len(values) - 1} steps from {float(values[0])} to {float(values[-1])} "
                f"cannot serve {n} steps from {start} to {stop}"
            )
        return values

    return grid
