"""What a network meets while it samples: the states, times and conditions that quantisers are fitted to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sfumato import grids, solvers
from sfumato.core import Context, Denoiser, Grid, InputError, Solver, Streams, mix, trajectory
from sfumato.objectives import drop

OUTSIDE = ("clamp", "redraw")


class Batch(NamedTuple):
    """A part of a calibration set."""

    x: Tensor
    t: Tensor
    cond: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Calibration:
    """Items (x_t, t, conditions): x (N, *), t (N,) float64 in [0, 1], conditions by name (N, *).

    Raises InputError where it is empty, where a number is not finite or lengths differ.
    """

    x: Tensor
    t: Tensor
    cond: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "t", torch.as_tensor(self.t, dtype=torch.float64))
        n = len(self.x)
        if n == 0:
            raise InputError("the calibration set is empty")
        lengths = {name: len(value) for name, value in self.cond.items()}
        if self.t.shape != (n,) or any(length != n for length in lengths.values()):
            raise InputError(f"{n} states, {tuple(self.t.shape)} times, conditions {lengths}: one of each an item")
        if not bool(torch.isfinite(self.x).all()) or not bool(((self.t >= 0) & (self.t <= 1)).all()):
            raise InputError("states must be finite and times within [0, 1]")

    def __len__(self) -> int:
        return len(self.x)

    def batches(self, size: int = 64) -> Iterator[Batch]:
        """The items in their order, ``size`` at a time."""
        for i in range(0, len(self), size):
            rows = slice(i, i + size)
            yield Batch(self.x[rows], self.t[rows], {k: v[rows] for k, v in self.cond.items()})

    def packed(self) -> bytes:
        """It as one safetensors file."""
        from safetensors.torch import save

        tensors = {"x": self.x, "t": self.t} | {f"cond.{name}": value for name, value in self.cond.items()}
        return save({name: value.contiguous() for name, value in tensors.items()})

    @staticmethod
    def of(data: bytes) -> Calibration:
        """What :meth:`packed` wrote."""
        from safetensors.torch import load

        tensors = load(data)
        cond = {name.removeprefix("cond."): value for name, value in tensors.items() if name.startswith("cond.")}
        return Calibration(tensors["x"], tensors["t"], cond)

    def select(self, rows: Any) -> Calibration:
        """A part of it."""
        return Calibration(self.x[rows], self.t[rows], {k: v[rows] for k, v in self.cond.items()})


def shares(n: int, times: str | float, mean: float, std: float, outside: str, streams: Streams) -> Tensor:
    """n shares of a run that is still to come, in [0, 1]: 'normal' N(mean, std^2), 'uniform', or one number for all.

    outside  of [0, 1]: 'clamp' gathers it at the ends (the published choice), 'redraw' draws again
    """
    if outside not in OUTSIDE:
        raise InputError(f"outside = {outside!r}: one of {', '.join(OUTSIDE)}")
    like = torch.empty(n, dtype=torch.float64)
    if times == "uniform":
        return streams.uniform(like).double()
    if isinstance(times, (int, float)):
        if not 0 <= times <= 1:
            raise InputError(f"times = {times}: within [0, 1]")
        return torch.full_like(like, float(times))
    if times != "normal" or std <= 0:
        raise InputError(f"times = {times!r}, std = {std}: 'normal' with std above 0, 'uniform', or a number")
    drawn = mean + std * streams.normal(like).double()
    for _ in range(1000 if outside == "redraw" else 0):
        missed = (drawn < 0) | (drawn > 1)
        if not bool(missed.any()):
            break
        drawn = torch.where(missed, mean + std * streams.normal(like).double(), drawn)
    return drawn.clamp(0, 1)


def denoised(
    denoiser: Denoiser,
    n: int,
    shape: Sequence[int],
    *,
    cond: Mapping[str, Any] | None = None,
    times: str | float = "normal",
    mean: float = 0.4,
    std: float = 0.4,
    outside: str = "clamp",
    solver: str | Solver = "ddim",
    grid: str | Grid | None = None,
    steps: int = 50,
    dropout: float = 0.1,
    seed: int = 0,
    batch: int = 64,
    legacy_pairing: bool = False,
) -> Calibration:
    """States of the model's own runs from noise, each kept at the one time that was drawn for it (NDTC).

    For item i a share u of the run is drawn (:func:`shares`); kept are the state at the step with u still to come, its
    time, and the item's conditions.

    denoiser        in full precision, with the guidance that sampling will use
    shape           of one item
    cond            conditions (n, *)
    mean, std       of the normal law of u; it leans towards clean states where mean is below 1/2
    dropout         share of items whose conditions are replaced by the null, as guidance calls the network
    legacy_pairing  the published script's slip: the state of step r is stored with the time of step steps - 1 - r

    Source: Shang, Yuan, Xie, Wu, Yan, 2023, "Post-training Quantization on Diffusion Models". Raises InputError for fewer
    than one item or step.
    """
    if n < 1 or steps < 1:
        raise InputError(f"n = {n}, steps = {steps}: at least one item and one step")
    made: Solver = solvers.registry.make(solver) if isinstance(solver, str) else solver
    chosen = grid or made.grid or "arctan"
    spaced: Grid = grids.registry.make(chosen) if isinstance(chosen, str) else chosen
    cond = {} if cond is None else cond
    left = shares(n, times, mean, std, outside, Streams.of(mix(seed, 1), n))
    first = steps - 1 - (left * steps).long().clamp(max=steps - 1)  # of the steps 0 .. steps - 1, the one to keep
    x, t = [], []
    for lo in range(0, n, batch):
        part, wanted = slice(lo, min(n, lo + batch)), first[lo : lo + batch]
        streams = [mix(seed, i) for i in range(n)][part]
        ctx = Context.of(len(wanted), streams, cond={k: v[part] for k, v in cond.items()})
        kept, clock = _states(denoiser, made, spaced, steps, (len(wanted), *shape), ctx, wanted)
        x.append(kept)
        t.append(clock[steps - 1 - wanted if legacy_pairing else wanted])
    dropping = Context.of(n, mix(seed, 2))
    return Calibration(torch.cat(x), torch.cat(t), dict(drop(cond, denoiser.null, dropout, dropping)))


def _states(
    denoiser: Denoiser, solver: Solver, grid: Grid, steps: int, shape: Sequence[int], ctx: Context, wanted: Tensor
) -> tuple[Tensor, Tensor]:
    """Row i of the run at its step wanted[i], and the times of all steps."""
    kept: Any = None
    clock = grid(denoiser.process, steps, 1.0, 0.0).double()[:-1]
    for step, st in enumerate(trajectory(denoiser, solver, grid, steps, shape=tuple(shape), ctx=ctx)):
        x: Tensor = solver.read(st)  # type: ignore[assignment]
        kept = x.clone() if kept is None else kept
        rows = wanted == step
        kept[rows] = x[rows]
        if step >= int(wanted.max()):
            break
    return kept, clock


def noised(
    denoiser: Denoiser, x0: Tensor, *, cond: Mapping[str, Any] | None = None, times: str | float = "uniform",
    mean: float = 0.4, std: float = 0.4, outside: str = "clamp", dropout: float = 0.1, seed: int = 0,
) -> Calibration:  # fmt: skip
    """Data x0 (n, *) noised to drawn times t = u: what training meets. ``times=0.0`` are the data themselves.

    The alternative that :func:`denoised` is compared with; its numbers mean the same.
    """
    n, cond = len(x0), {} if cond is None else cond
    t = shares(n, times, mean, std, outside, Streams.of(mix(seed, 1), n))
    ctx = Context.of(n, mix(seed, 3), cond=cond)
    x, _ = denoiser.process.corrupt(x0, t, ctx)
    return Calibration(x, t, dict(drop(cond, denoiser.null, dropout, Context.of(n, mix(seed, 2)))))


def told(calibration: Calibration, t: float) -> Calibration:
    """The same states under another time: noise at t = 1, or images at any."""
    return Calibration(calibration.x, torch.full_like(calibration.t, t), calibration.cond)


__all__ = ["Batch", "Calibration", "denoised", "noised", "shares", "told"]
