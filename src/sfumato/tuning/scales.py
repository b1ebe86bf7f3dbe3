"""USF's optional skip coefficients: how much of each skip connection of a U-Net enters at each step."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.core import Context, Denoiser, InputError, Solver, Wrapper
from sfumato.denoisers.features import network
from sfumato.networks.unet import Up
from sfumato.tuning.evolution import Evolution, Found
from sfumato.tuning.target import Target

Scales = tuple[tuple[float, ...], ...]
"""For each step one number a skip connection, in the order of :func:`merges`."""


def merges(net: nn.Module) -> list[str]:
    """Paths of the convolutions that merge the way up with a skip connection. InputError where a network has none."""
    found = [
        f"{name}.merges.{i}" for name, up in net.named_modules() if isinstance(up, Up) for i in range(len(up.merges))
    ]
    if not found:
        raise InputError(
            f"{type(net).__name__} has no skip connections between a way down and a way up: only a UNet has"
        )
    return found


def possible(denoiser: Denoiser) -> bool:
    """Whether there is one network inside, and it has such connections."""
    try:
        return bool(merges(network(denoiser)))
    except InputError:
        return False


class Scaled(Wrapper):
    """Step i of a run multiplies the map that skip connection j brings by ``scales[i][j]``; steps beyond are as they were.

    A coefficient of 1 changes nothing, bit for bit. Raises InputError for a network without such connections, or another
    number of them. Source: Liu, Ning, Lin, Yang, Wang, 2023, "A Unified Sampling Framework for Solver Searching of Diffusion
    Probabilistic Models" (optional there).
    """

    def __init__(self, inner: Denoiser, scales: Scales) -> None:
        super().__init__(inner)
        self.scales, self.paths = scales, tuple(merges(network(inner)))
        if any(len(row) != len(self.paths) for row in scales):
            raise InputError(f"{len(self.paths)} skip connections need as many coefficients a step, not {scales!r}")

    def forward(self, x: Any, t: Any, ctx: Context) -> Any:
        row = self.scales[ctx.run.step] if ctx.run.step < len(self.scales) else ()
        taps = [(path, _scaling(c)) for path, c in zip(self.paths, row, strict=False) if c != 1]
        return self.inner(x, t, ctx.fork(taps=taps) if taps else ctx)


def _scaling(coefficient: float) -> Callable[..., Any]:
    """A tap on a merge: its input is the way up and the skip connection, as many channels each."""

    def around(ctx: Context, call: Callable[..., Any], both: Tensor) -> Any:
        up, skip = both.chunk(2, 1)
        return call(torch.cat([up, coefficient * skip], 1))

    return around


def scaled(denoiser: Denoiser, scales: Scales) -> Denoiser:
    """The denoiser with these coefficients, or itself where none is other than 1."""
    return Scaled(denoiser, scales) if any(c != 1 for row in scales for c in row) else denoiser


def coefficients(
    target: Target,
    solver: Solver,
    times: Sequence[float],
    *,
    budget: int = 40,
    spread: float = 0.05,
    seed: int = 0,
    told: Callable[[int, int, float], None] | None = None,
) -> Found[Scales]:
    """Coefficients that bring a solver on these times nearest to the target: a climb from 1, one true evaluation a candidate.

    A child moves some of the best's coefficients by N(0, spread^2). Raises InputError for a network without skip connections.
    """
    paths, steps = merges(network(target.denoiser)), len(times) - 1

    def fitness(one: Scales) -> float:
        return target.score(target.errors(solver, times, scaled(target.denoiser, one)))

    def child(one: Scales, draw: random.Random) -> Scales:
        chosen = draw.randrange(steps * len(paths))
        return tuple(
            tuple(
                round(c + draw.gauss(0, spread), 4) if i * len(paths) + j == chosen or draw.random() < 0.2 else c
                for j, c in enumerate(row)
            )
            for i, row in enumerate(one)
        )

    climb = Evolution(child, lambda a, b, draw: None, lambda draw: None, population=1, parents=1, mutants=1, crossed=0)
    return climb.run(fitness, [((1.0,) * len(paths),) * steps], budget=budget, seed=seed, told=told)
