"""Cyclic one-way diffusion: a part of a picture radiates into the rest, and takes nothing back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sfumato.core import Context, Denoiser, InputError, Solver, Step, Times, Wrap, mix
from sfumato.editing.base import Method, Task, register
from sfumato.editing.blending import blend

KNOWN = ("inverted", "noised")


@dataclass(frozen=True)
class Overwritten(Wrap):
    """After each inner step that ends at a recorded time: x_s <- m x_s + (1 - m) recorded_s.

    recorded  time -> state (B, *) of exactly that noise level; times that are not there are left alone
    mask      (B, 1, *): 1 where the inner solver decides
    """

    inner: Solver
    recorded: Mapping[Times, Tensor]
    mask: Tensor

    def step(self, st: Step, s: Times, denoiser: Denoiser, ctx: Context) -> Step:
        there = self.inner.step(st, s, denoiser, ctx)
        if s not in self.recorded:
            return there
        return replace(there, x=blend(there.x, self.recorded[s], self.mask))


@register("cow")
@dataclass(frozen=True)
class CyclicOneWay(Method):
    """Keeps what is outside the mask and lets the prompt make the rest around it, adapted to it.

    The known part on mid-grey is inverted to t = high, each state on the way kept: u_t. The known part on ``canvas`` is inverted to
    t = low. Then ``cycles`` times

        x <- q(x_high | x_low)                                     disturb: noise the state back up
        x <- solver from high to low, with x <- u_t outside the mask at high and after every step,

    then down to t = last, one last overwriting there, and to 0. At last = 0 the known part returns as it is encoded.

    low, high, last  times, last < low < high; low and last are taken to the nearest step
    cycles           0 is one descent from ``high`` with the same overwriting, without a cycle
    known            'inverted', or 'noised': the known part with a fixed noise in the place of its inversion (blended diffusion;
                     with cycles, RePaint's resampling)
    canvas           what the part to be made begins as: a grey from -1 to 1, or None for what the picture shows there

    The mask is binary after resampling to the state. Inversion runs without guidance under the source's conditions. The regional
    negative prompts of the publication are a composition of guidances (``sf.guidance.regional``) given as guidance=. Source: Wang,
    Yang, Qian, Zhu, Wu, 2024, "Diffusion in Diffusion: Cyclic One-Way Diffusion for Text-Vision-Conditioned
    Generation".
    """

    low: float = 0.5
    high: float = 0.7
    last: float = 0.4
    cycles: int = 10
    known: str = "inverted"
    canvas: float | None = 0.0

    needs = frozenset({"prompt", "mask"})

    def __post_init__(self) -> None:
        if not 0 <= self.last < self.low < self.high <= 1:
            raise InputError(f"last = {self.last}, low = {self.low}, high = {self.high}: 0 <= last < low < high <= 1")
        if self.cycles < 0:
            raise InputError(f"cycles = {self.cycles}: 0 or more")
        if self.known not in KNOWN:
            raise InputError(f"known = {self.known!r}: one of {', '.join(KNOWN)}")
        if self.canvas is not None and not -1 <= self.canvas <= 1:
            raise InputError(f"canvas = {self.canvas}: a grey from -1 to 1, or None")

    def __call__(self, task: Task) -> Tensor:
        share = task.latent_mask
        if share is None or not 0 < float((share >= 0.5).float().mean()) < 1:
            raise InputError(
                "at the size of the state the mask covers all or nothing: leave something known and something to make"
            )
        mask = (share >= 0.5).to(share)
        times = task.grid(task.process, max(1, round(task.steps * self.high)), self.high, 0.0).tolist()
        low, last = (min(range(len(times)), key=lambda i: abs(times[i] - t)) for t in (self.low, self.last))  # noqa: B023
        if not 0 < low < last:
            raise InputError(
                f"{task.steps} steps do not tell {self.high}, {self.low} and {self.last} apart: take more steps"
            )
        parts = {"cycle": times[: low + 1], "down": times[low : last + 1], "end": times[last:]}
        runs = {name: replace(task, grid=Given(tuple(part))) for name, part in parts.items() if len(part) > 1}
        kept, canvas = self._known(task, runs), _on(task, self.canvas)
        for name in ("end", "down"):
            canvas = _up(runs[name], canvas)[times[low] if name == "down" else times[last]] if name in runs else canvas
        state, process = canvas, task.process
        for cycle in range(max(1, self.cycles)):
            ctx = task.but(seed=mix(task.seed, cycle)).context()
            state = process.renoise(state, times[low], times[0], ctx.draw(process.space, state))
            state = blend(state, kept[times[0]], mask)
            state = _down(runs["cycle"], Overwritten(task.solver, kept, mask), state, ctx)
        state = _down(runs["down"], Overwritten(task.solver, {times[last]: kept[times[last]]}, mask), state)
        return _down(runs["end"], task.solver, state) if "end" in runs else state

    def _known(self, task: Task, runs: Mapping[str, Task]) -> dict[Times, Tensor]:
        """The known part at each time."""
        if self.known == "noised":
            noise = task.context().draw(task.process.space, task.x0)
            times = [t for part in runs.values() for t in part.grid.times]  # type: ignore[attr-defined]
            return {t: task.process.renoise(task.x0, 0.0, t, noise) for t in times}
        kept: dict[Times, Tensor] = {}
        state = _on(task, 0.0)
        for name in ("end", "down", "cycle"):
            if name in runs:
                kept |= _up(runs[name], state)
                state = kept[max(kept)]  # type: ignore[type-var]
        return kept | {min(kept): task.x0}  # type: ignore[type-var]


@dataclass(frozen=True)
class Given:
    """A grid of these times, from noisy to clean."""

    times: tuple[float, ...]

    def __call__(self, process: Any, n: int, start: float = 1.0, stop: float = 0.0) -> Tensor:
        return torch.tensor(self.times, dtype=torch.float64)


def _up(task: Task, state: Tensor) -> dict[Times, Tensor]:
    """Inversion over the whole of the task's grid: the state at each time."""
    low, high = task.grid.times[-1], task.grid.times[0]  # type: ignore[attr-defined]
    steps = task.trajectory(state, denoiser=task.denoiser, cond=task.source, start=low, stop=high)
    return {st.t: task.solver.read(st) for st in steps}  # type: ignore[misc]


def _down(task: Task, solver: Solver, state: Tensor, ctx: Context | None = None) -> Tensor:
    """The target's trajectory over the whole of the task's grid."""
    low, high = task.grid.times[-1], task.grid.times[0]  # type: ignore[attr-defined]
    return solver.read(task.run(state, solver=solver, start=high, stop=low, ctx=ctx))  # type: ignore[return-value]


def _on(task: Task, grey: float | None) -> Tensor:
    """The known part on this grey, encoded; the whole picture where grey is None."""
    if grey is None or task.mask is None:
        return task.x0
    mask = task.mask.to(task.x0)
    return task.codec.encode(blend(grey * mask.new_ones(()), task.images.to(task.x0) / 127.5 - 1, mask))


__all__ = ["CyclicOneWay", "Overwritten"]
