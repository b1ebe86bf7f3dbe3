"""The noise with which a stochastic solver draws a given picture: recorded along a path of states, changed, and replayed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from sfumato import core, grids
from sfumato.core import Context, Denoiser, Grid, InputError, Posterior, Solver, Step, Streams, Wrap, linear
from sfumato.solvers import registry as solvers
from sfumato.solvers._once import Once

PROBE = 1024.0  # a noise so large that its effect is seen above the rounding of the mean
Path: TypeAlias = "Callable[[Any, Tensor, Tensor, float, float, float, Context], Tensor]"


def independent(process: Any, x0: Tensor, x: Tensor, t: float, s: float, eta: float, ctx: Context) -> Tensor:
    """x_s ~ q(x_s | x0), whatever x_t was: the path of edit-friendly noise maps."""
    return process.corrupt(x0, s, ctx)[0]  # type: ignore[no-any-return]


def posterior(process: Any, x0: Tensor, x: Tensor, t: float, s: float, eta: float, ctx: Context) -> Tensor:
    """x_s ~ q(x_s | x_t, x0) with the noise of eta: the path of the DPM-Encoder; its noise maps are standard normal."""
    truth = Posterior(x0, "x0", x, process.coef(t))
    noise = ctx.draw(process.space, x)
    return process.kernel(x, truth, t, s, eta).draw(noise)  # type: ignore[no-any-return]


PATHS: Mapping[str, Path] = {"independent": independent, "posterior": posterior}


@dataclass(frozen=True)
class Recording(Wrap):
    """Takes the steps of ``inner`` with the very noise that leads along a path of states to x0, and writes it down.

    A step of a solver that draws once is x_s = mean + std z: mean and std are read off by taking it with z = 0 and with a
    large z, without asking the denoiser again. Where std = 0 (every last step to sigma = 0) no noise leads anywhere: what
    is missing is written down instead and added. ``written`` holds (z, missing or None) a step.

    Raises InputError for a solver that draws more than once, or asks the denoiser after its noise.
    """

    inner: Solver
    x0: Tensor
    path: Path
    written: list[tuple[Tensor, Tensor | None]] = field(default_factory=list)

    def step(self, st: Step, s: Any, denoiser: Denoiser, ctx: Context) -> Step:
        x: Any = st.x
        wanted = self.path(denoiser.process, self.x0, x, st.t, s, getattr(self.inner, "eta", 1.0), ctx)  # type: ignore[arg-type]
        once = Once(denoiser)
        mean: Any = self._with(torch.zeros_like(x), st, s, once, ctx).x
        calls = once.asked
        std = (self._with(torch.full_like(x, PROBE), st, s, once, ctx).x - mean) / PROBE
        if once.asked != calls:
            raise InputError(
                f"{self.inner} asks the denoiser after it has drawn: record with 'ddpm', 'dpm-solver++(order=2, eta=1.0)' or another "
                "solver that adds its noise at the end of a step"
            )
        silent = std == 0
        z = torch.where(silent, 0.0, (wanted - mean) / torch.where(silent, 1.0, std))
        missing = torch.where(silent, wanted - mean, 0.0) if bool(silent.any()) else None
        there = self._with(z, st, s, once, ctx)
        self.written.append((z, missing))
        return replace(there, x=linear(1.0, there.x, 1.0, missing))

    def _with(self, z: Tensor, st: Step, s: Any, denoiser: Denoiser, ctx: Context) -> Step:
        """The step with z as its noise; InputError where more than one is drawn."""
        drawn = []

        def source(ctx: Context, fresh: Callable[[], Any]) -> Tensor:
            drawn.append(z)
            return z

        there = self.inner.step(st, s, denoiser, replace(ctx, source=source))
        if len(drawn) > 1:
            raise InputError(f"{self.inner} draws {len(drawn)} times a step: record with a solver that draws once")
        return there


@dataclass(frozen=True)
class Offset(Wrap):
    """x_s <- x_s + offsets[s] after the inner step; times without an offset are left alone."""

    inner: Solver
    offsets: Mapping[float, Tensor]

    def step(self, st: Step, s: Any, denoiser: Denoiser, ctx: Context) -> Step:
        there = self.inner.step(st, s, denoiser, ctx)
        return replace(there, x=linear(1.0, there.x, 1.0, self.offsets.get(s)))


@dataclass(frozen=True)
class NoiseMaps:
    """All that a stochastic run was made of: give it to any denoiser of the same process.

    process  the noising law
    times    N + 1 falling times, the last is 0
    states   the state at each time, (B, *); states[-1] is the picture
    noise    z of each of the N steps, (B, *)
    missing  what a step without noise did not reach, or None
    solver   whose noise it is
    """

    process: Any
    times: tuple[float, ...]
    states: tuple[Tensor, ...]
    noise: tuple[Tensor, ...]
    missing: tuple[Tensor | None, ...]
    solver: Solver

    def source(self, ctx: Context, fresh: Callable[[], Any]) -> Tensor:
        """A Context's ``source``: the recorded noise of the step under way."""
        if ctx.run.t not in self.times[:-1]:
            raise InputError(
                f"no noise was recorded for a step from t = {ctx.run.t}: replay on the times of the record"
            )
        return self.noise[self.times.index(ctx.run.t)]  # type: ignore[arg-type]

    def decode(
        self,
        denoiser: Denoiser,
        *,
        cond: Mapping[str, Any] | None = None,
        ctx: Context | None = None,
        keep_last: bool = True,
        grad: bool = False,
    ) -> Tensor:
        """The picture (B, *) that this noise gives with a denoiser and its conditions.

        keep_last  add what the steps without noise missed: with the denoiser of the record the picture returns exactly

        Raises InputError for a denoiser of another process.
        """
        if any(self.process.coef(t)[:2] != denoiser.process.coef(t)[:2] for t in self.times):
            raise InputError("these noise maps belong to another process: encode and decode with the same schedule")
        x = self.states[0]
        if ctx is None:
            ctx = Context.of(len(x), None, cond=dict(cond or {}), dtype=x.dtype, device=x.device)
        left = {s: m for s, m in zip(self.times[1:], self.missing, strict=True) if m is not None and keep_last}
        grid, steps = grids.fixed(torch.tensor(self.times, dtype=torch.float64)), len(self.noise)
        options: dict[str, Any] = {"start": self.times[0], "stop": self.times[-1], "grad": grad}
        return core.sample(  # type: ignore[no-any-return]
            denoiser, Offset(self.solver, left), grid, steps, x=x, ctx=replace(ctx, source=self.source), **options
        )

    def skip(self, steps: int) -> NoiseMaps:
        """Without the first steps: less of the picture may change."""
        if not 0 <= steps < len(self.noise):
            raise InputError(f"skip = {steps}: at least 0 and fewer than the {len(self.noise)} steps")
        return replace(
            self, times=self.times[steps:], states=self.states[steps:], noise=self.noise[steps:], missing=self.missing[steps:]
        )  # fmt: skip

    def roll(self, down: int, right: int, seed: int = 0) -> NoiseMaps:
        """Everything moved by whole cells of the state; the noise that comes in at the edges is fresh."""
        streams, sigma = Streams.of(seed, len(self.states[0])), self.process.coef(self.times[0]).sigma

        def moved(x: Tensor, draw: int, scale: float) -> Tensor:
            streams.at(draw)
            fresh = scale * streams.normal(x) if scale else torch.zeros_like(x)
            return torch.where(_covered(x, down, right), torch.roll(x, (down, right), (-2, -1)), fresh)

        return replace(
            self,
            states=(moved(self.states[0], 0, sigma), *(moved(x, 0, 0.0) for x in self.states[1:])),
            noise=tuple(moved(z, j + 1, 1.0) for j, z in enumerate(self.noise)),
            missing=tuple(None if m is None else moved(m, 0, 0.0) for m in self.missing),
        )

    def statistics(self) -> dict[str, Tensor]:
        """std (N',) of each noise map, and correlation (N' - 1,) of each with the one before it; 1 and 0 in a native run.

        The N' steps that draw; the others have no map.
        """
        noise = torch.stack([z for z, m in zip(self.noise, self.missing, strict=True) if m is None]).double().flatten(1)
        std, centred = noise.std(1), noise - noise.mean(1, keepdim=True)
        return {"std": std, "correlation": (centred[1:] * centred[:-1]).mean(1) / (std[1:] * std[:-1])}


def record(
    denoiser: Denoiser,
    x0: Tensor,
    *,
    solver: str | Solver = "ddpm",
    grid: str | Grid = "arctan",
    steps: int = 50,
    path: str = "independent",
    start: float = 1.0,
    cond: Mapping[str, Any] | None = None,
    seed: int = 0,
    ctx: Context | None = None,
) -> NoiseMaps:
    """The noise with which ``solver`` draws x0 (B, *), from t = ``start`` down to 0: one run of ``steps`` calls.

    solver  draws once a step and adds it at the end: 'ddpm(eta=...)', 'dpm-solver++(order=2, eta=1.0)', ...
    path    'independent'  every state drawn anew from q(x_t | x0): the maps carry the structure of the picture, are larger
                           than 1 and fall together in time (Huberman-Spiegelglas, Kulikov, Michaeli, 2024)
            'posterior'    the states of the true chain q(x_s | x_t, x0): standard normal maps (the DPM-Encoder of Wu, De
                           la Torre, 2023)

    The same denoiser and conditions give x0 back exactly. Raises InputError for a solver without noise, or whose noise is
    not simply added.
    """
    chosen = solvers.make(solver) if isinstance(solver, str) else solver
    times = grids.registry.make(grid) if isinstance(grid, str) else grid
    if path not in PATHS:
        raise InputError(f"path = {path!r}: one of {', '.join(PATHS)}")
    if not chosen.stochastic:
        raise InputError(
            f"{chosen} draws no noise, so there is none to record: use 'ddpm(eta=...)', or invert with 'ddim'"
        )
    if ctx is None:
        ctx = Context.of(len(x0), seed, cond=dict(cond or {}), dtype=x0.dtype, device=x0.device)
    recording = Recording(chosen, x0, PATHS[path])
    first, _ = denoiser.process.corrupt(x0, start, ctx)
    run = list(core.trajectory(denoiser, recording, times, steps, x=first, start=start, ctx=ctx))
    states: Any = tuple(st.x for st in run)
    noise, missing = zip(*recording.written, strict=True)
    return NoiseMaps(denoiser.process, tuple(float(st.t) for st in run), states, noise, missing, chosen)  # type: ignore[arg-type]


def _covered(x: Tensor, down: int, right: int) -> Tensor:
    """True where a shift leaves something of the old, False where new comes in."""
    height, width = x.shape[-2:]
    rows, columns = torch.arange(height, device=x.device) - down, torch.arange(width, device=x.device) - right
    return ((rows >= 0) & (rows < height))[:, None] & ((columns >= 0) & (columns < width))


__all__ = ["PATHS", "NoiseMaps", "Offset", "Recording", "record"]
