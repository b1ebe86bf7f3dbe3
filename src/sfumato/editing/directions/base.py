"""A direction in a latent space along the trajectory, and the latents that directions are found in."""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sfumato import core, grids, solvers
from sfumato.core import Context, Denoiser, Grid, Guidance, InputError, Solver, Streams, Wrapper
from sfumato.denoisers.features import bottleneck, features
from sfumato.guidance.internal import internal


@dataclass(frozen=True, eq=False)
class Direction:
    """v_t in a latent space: vectors (K, *) at K falling times, linear in t between them and constant beyond both ends.

    One time makes a direction for all times. A vector may have a row an item, (K, B, *). ``path`` names the submodule
    whose output it shifts.
    """

    vectors: Tensor
    times: tuple[float, ...]
    path: str | None = None

    def __post_init__(self) -> None:
        if len(self.vectors) != len(self.times) or not self.times:
            raise InputError(f"{len(self.vectors)} vectors at {len(self.times)} times: one each, at least one")
        if any(b >= a for a, b in zip(self.times, self.times[1:], strict=False)):
            raise InputError(f"the times of a direction fall: {self.times}")

    def at(self, t: float) -> Tensor:
        """The vector (*) at time t."""
        if isinstance(t, Tensor):
            raise InputError("a direction needs one clock for the batch")
        k = bisect.bisect_left(self.times, -t, key=lambda time: -time)  # first time <= t
        if k < len(self.times) and self.times[k] == t:
            return self.vectors[k]
        if k in (0, len(self.times)):
            return self.vectors[min(k, len(self.times) - 1)]
        high, low = self.times[k - 1], self.times[k]
        return torch.lerp(self.vectors[k], self.vectors[k - 1], (t - low) / (high - low))

    @property
    def norms(self) -> Tensor:
        """The length of each vector (K,)."""
        return self.vectors.flatten(1).norm(dim=1)

    def scaled(self, factor: float | Tensor) -> Direction:
        """The direction times a number, or one a time (K,)."""
        return replace(self, vectors=core.linear(factor, self.vectors))

    def shift(self, scale: float, interval: tuple[float, float] | None = None, asymmetric: bool = False) -> Guidance:
        """The guidance h -> h + scale v_t: see :func:`sfumato.guidance.internal.internal`. At 0 it is no guidance."""

        def change(h: Tensor, t: Any) -> Tensor:
            return h if scale == 0 else torch.add(h, self.at(t).to(h), alpha=scale)

        return internal(change, self.path, interval=interval, asymmetric=asymmetric)


@dataclass(frozen=True, eq=False)
class Latents:
    """What N items had inside the network along one trajectory.

    h      (K, N, *) outputs of the submodule ``path`` at ``times``, falling
    start  (N, *) the states that the run began with; x0: (N, *) the ones it ended with
    """

    h: Tensor
    times: tuple[float, ...]
    path: str
    start: Tensor
    x0: Tensor

    @property
    def noise(self) -> Latents:
        """The starts as a latent space of their own, for comparison with h."""
        return replace(self, h=self.start[None], times=self.times[:1], path="")


class _Recorder(Wrapper):
    """Keeps the features of every call by its time; made for one run."""

    def __init__(self, inner: Denoiser, path: str) -> None:
        super().__init__(inner)
        self.path, self.kept = path, dict[float, Tensor]()

    def forward(self, x: Any, t: Any, ctx: Context) -> Any:
        post, found = features(self.inner, x, t, ctx, [self.path])
        self.kept[t] = found[self.path].detach()
        return post


@torch.no_grad()
def collect(
    denoiser: Denoiser,
    *,
    solver: str | Solver = "ddpm",
    grid: str | Grid = "uniform",
    steps: int = 25,
    n: int | None = None,
    shape: Sequence[int] = (),
    x: Tensor | None = None,
    cond: Mapping[str, Any] | None = None,
    seed: int = 0,
    start: float = 1.0,
    stop: float = 0.0,
    path: str | None = None,
    batch: int = 64,
) -> Latents:
    """Sample n items of ``shape`` (or run the given states x) and keep the output of one submodule at every time.

    path  the submodule, default the bottleneck; start < stop runs upwards and collects along an inversion

    Item i depends on (seed, i) only. Memory: n times the features, times the steps.
    """
    path = bottleneck(denoiser) if path is None else path
    chosen = solvers.registry.make(solver) if isinstance(solver, str) else solver
    times = grids.registry.make(grid) if isinstance(grid, str) else grid
    if (x is None) == (n is None):
        raise InputError("give n= and shape= (draw the starts) or x= (the states to start from)")
    n = len(x) if x is not None else int(n or 0)
    streams = Streams.of(seed, n)
    dtype = torch.float32 if x is None else x.dtype
    device = next((p.device for p in denoiser.parameters()), torch.device("cpu")) if x is None else x.device
    features_, starts, ends = [], [], []
    for low in range(0, n, batch):
        rows = slice(low, min(low + batch, n))
        told = {k: v[rows] if isinstance(v, Tensor) else v for k, v in (cond or {}).items()}
        ctx = Context(cond=told, rng=streams.select(rows), batch=rows.stop - low, dtype=dtype, device=device)
        recorder = _Recorder(denoiser, path)
        given: Any = {"x": x[rows]} if x is not None else {"shape": (rows.stop - low, *shape)}
        run = list(core.trajectory(recorder, chosen, times, steps, start=start, stop=stop, ctx=ctx, **given))
        starts.append(chosen.read(run[0]))
        ends.append(chosen.read(run[-1]))
        kept = sorted(recorder.kept, reverse=True)
        features_.append(torch.stack([recorder.kept[t] for t in kept]))
    return Latents(torch.cat(features_, 1), tuple(kept), path, torch.cat(starts), torch.cat(ends))  # type: ignore[arg-type]


@torch.no_grad()
def collect_noised(
    denoiser: Denoiser,
    x0: Tensor,
    *,
    grid: str | Grid = "uniform",
    steps: int = 25,
    cond: Mapping[str, Any] | None = None,
    seed: int = 0,
    path: str | None = None,
    batch: int = 64,
) -> Latents:
    """Data x0 (N, *) noised independently at every time of a grid, and the output of one submodule there.

    x_t = alpha_t x0 + sigma_t eps_t is what an edit-friendly inversion (Huberman-Spiegelglas, Kulikov, Michaeli, 2024) visits,
    so the features are those that a shift meets when a real image is edited. ``start`` of the result is x_t at the first
    time, ``x0`` the data. Item i depends on (seed, i) only.
    """
    path = bottleneck(denoiser) if path is None else path
    process, times_of = denoiser.process, grids.registry.make(grid) if isinstance(grid, str) else grid
    times = tuple(times_of(process, steps, 1.0, 0.0).tolist()[:-1])
    streams, found, starts = Streams.of(seed, len(x0)), [], []
    for low in range(0, len(x0), batch):
        rows = slice(low, min(low + batch, len(x0)))
        x, told = x0[rows], {k: v[rows] if isinstance(v, Tensor) else v for k, v in (cond or {}).items()}
        ctx = Context(cond=told, rng=streams.select(rows), batch=len(x), dtype=x.dtype, device=x.device)
        noised = [process.corrupt(x, t, ctx)[0] for t in times]
        found.append(
            torch.stack([features(denoiser, *at, ctx, [path])[1][path] for at in zip(noised, times, strict=True)])
        )
        starts.append(noised[0])
    return Latents(torch.cat(found, 1), times, path, torch.cat(starts), x0)


__all__ = ["Direction", "Latents", "collect", "collect_noised"]
