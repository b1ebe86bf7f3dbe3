"""What a sampler is judged by: start noises of a model and where its fine solution takes them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sfumato import core, grids
from sfumato.core import Context, Denoiser, InputError, Posterior, Solver, Streams, Wrapper, linear, solve
from sfumato.denoisers.parametrized import edm_row
from sfumato.solvers.exponential import Multistep

FINE = Multistep(order=3, variable="angle", corrector=True)


@dataclass(frozen=True, eq=False)
class Target:
    """Start noises, the states of the fine solution on its way, and its ends.

    denoiser  the model under its guidance
    x         (n, *) starts in solver coordinates, cond their conditions
    times     (N + 1,) of the fine solution
    states    N + 1 states (n, *), the last of them the ends
    factor    R of the QR factorisation of the columns x_0, v_0, ..., x_{N-1}, v_{N-1}, x_N (each n * D long): it keeps all
              their inner products, without squaring them
    counted   so far, summed over items: 'calls' of the sampler's denoiser, and 'nfe', the rows that the network evaluated for
              them (two a call under classifier-free guidance)
    """

    denoiser: Denoiser
    x: Tensor
    cond: Mapping[str, Any]
    times: tuple[float, ...]
    states: Sequence[Tensor]
    factor: Tensor
    batch: int = 32
    counted: dict[str, float] = field(default_factory=lambda: {"calls": 0.0, "nfe": 0.0})

    @property
    def process(self) -> Any:
        """The noising law."""
        return self.denoiser.process

    @property
    def ends(self) -> Tensor:
        """Where the fine solution ends, (n, *)."""
        return self.states[-1]

    @property
    def scale(self) -> float:
        """Root mean square of the ends: an error as large as this is no solution."""
        return float(self.ends.double().square().mean().sqrt())

    def run(self, solver: Solver, times: Sequence[float], denoiser: Denoiser | None = None) -> Tensor:
        """Where a solver on these times takes the starts, (n, *). Another denoiser of the same law may be given."""
        out: list[Any] = []
        for rows in _parts(len(self.x), self.batch):
            ctx = _context(self.x[rows], self.cond, rows)
            if solver.stochastic:
                ctx.rng = Streams.of(0, len(self.x)).select(rows)
            x = linear(1.0, self.x[rows], 1.0, self.process.anchor(times[0], ctx.cond))
            chosen = Counted(denoiser or self.denoiser)
            for st in core.trajectory(chosen, solver, grids.fixed(times), len(times) - 1, x=x, ctx=ctx,
                                      start=times[0], stop=times[-1]):  # fmt: skip
                last = st
            self.counted["calls"] += chosen.rows
            self.counted["nfe"] += ctx.run.nfe * len(x)
            out.append(solver.read(last))
        return torch.cat(out)

    def errors(self, solver: Solver, times: Sequence[float], denoiser: Denoiser | None = None) -> Tensor:
        """Root mean square error of each item's end, (n,) float64; infinite where the run diverged."""
        return self.distance(self.run(solver, times, denoiser))

    def distance(self, x: Tensor) -> Tensor:
        """Root mean square distance of each item from its end, (n,) float64."""
        gap = (x.double() - self.ends.double()).flatten(1).square().mean(1).sqrt()
        return torch.where(gap.isfinite(), gap, math.inf)

    def score(self, errors: Tensor) -> float:
        """What is minimised: the mean error, an item counting no more than ``scale``."""
        return float(errors.clamp(max=self.scale).mean())

    def replay(self) -> Replay:
        """A denoiser that repeats what the model said along its fine solution, for free."""
        return Replay(self)


def aim(
    denoiser: Denoiser,
    shape: Sequence[int],
    *,
    seed: int,
    cond: Mapping[str, Any] | None = None,
    solver: Solver = FINE,
    grid: Any = None,
    steps: int = 64,
    start: float = 1.0,
    stop: float = 0.0,
    batch: int = 32,
    dtype: torch.dtype = torch.float32,
) -> Target:
    """Draw ``shape[0]`` starts, item i from stream (seed, i), and solve from them on a fine grid ('quadratic' by default).

    The solver must be deterministic and make one call a step (InputError otherwise): its calls are the recording.
    """
    if solver.stochastic or solver.nfe != 1:
        raise InputError(
            f"{type(solver).__name__} draws noise or calls more than once a step: it cannot be the reference"
        )
    process, cond = denoiser.process, dict(cond or {})
    chosen = grids.get("quadratic") if grid is None else grid
    times = tuple(chosen(process, steps, start, stop).tolist())
    device = next((p.device for p in denoiser.parameters()), torch.device("cpu"))
    streams, starts, states, factor = Streams.of(seed, shape[0]), [], [], None
    for rows in _parts(shape[0], batch):
        part = {k: v[rows] if isinstance(v, Tensor) else v for k, v in cond.items()}
        n = rows.stop - rows.start
        ctx = Context(cond=part, rng=streams.select(rows), batch=n, dtype=dtype, device=device)
        begun = process.prior((n, *shape[1:]), ctx)
        begun = linear(1.0, begun, 1.0, process.anchor(times[0], part))
        told = _Told(denoiser)
        run = core.trajectory(told, solver, grids.fixed(times), steps, x=begun, ctx=ctx, start=start, stop=stop)
        for st in run:
            last = st
        if len(told.said) != steps:
            raise InputError(f"{len(told.said)} calls in {steps} steps: the reference solver makes one call a step")
        columns: list[Any] = [column for pair in told.said for column in pair] + [solver.read(last)]
        starts.append(told.said[0][0])
        states.append(torch.stack(columns[::2]))
        rows_of = torch.stack([c.double().flatten() for c in columns], 1)
        factor = torch.linalg.qr(rows_of if factor is None else torch.cat([factor, rows_of]), mode="r").R
    assert factor is not None
    return Target(denoiser, torch.cat(starts), cond, times, list(torch.cat(states, 1)), factor, batch)


class Counted(Wrapper):
    """Counts the rows that a sampler asks about, whatever guidance makes of each."""

    def __init__(self, inner: Denoiser) -> None:
        super().__init__(inner)
        self.rows = 0

    def forward(self, x: Any, t: Any, ctx: Context) -> Any:
        self.rows += len(core.first(x))
        return self.inner(x, t, ctx)


class _Told(Wrapper):
    """Keeps the state and the angular velocity v of each call."""

    def __init__(self, inner: Denoiser) -> None:
        super().__init__(inner)
        self.said: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Any, t: Any, ctx: Context) -> Any:
        post = self.inner(x, t, ctx)
        self.said.append((x, post.view("v")))
        return post


class Replay(Denoiser):
    """The readings of a fine solution, as a denoiser on states that are coefficients over its recorded columns.

    A deterministic solver that is linear in its readings runs on it unchanged, and tells without a network call where it
    would end if the network said on its way what it said on the fine one, up to the reaction to its own error that data of
    this std would have (the preconditioning of Karras et al. 2022 is held fixed). Between recorded times the readings are
    interpolated by cubics in the angle.
    """

    def __init__(self, target: Target) -> None:
        super().__init__()
        self.process, self.target = target.process, target
        self.std = max(float(target.ends.double().std()), 1e-3)
        self.angles = [self.process.coef(t).angle for t in target.times[:-1]]
        self.width = len(target.factor[0])
        self.root = math.sqrt(target.x.numel())

    def start(self) -> Tensor:
        """The coefficients (1, C) of the starts."""
        x = torch.zeros(1, self.width, dtype=torch.float64)
        x[0, 0] = 1.0
        return x

    def forward(self, x: Tensor, t: Any, ctx: Context) -> Posterior:
        c = self.process.coef(t)
        kind = edm_row(c, self.std)
        u, w = solve(kind, (c.alpha, c.sigma), (-c.sigma, c.alpha))
        native = torch.zeros_like(x)
        for k, share in _cubic(self.angles, c.angle):
            native[:, 2 * k] += u * share
            native[:, 2 * k + 1] += w * share
        ctx.run.nfe += 1
        return Posterior(native, kind, x, c)

    def error(self, solver: Solver, times: Sequence[float]) -> float:
        """Root mean square error at the end over all items, as foretold; infinite where the solver cannot run."""
        try:
            x = core.sample(
                self, solver, grids.fixed(times), len(times) - 1, x=self.start(), start=times[0], stop=times[-1]
            )
        except (InputError, ZeroDivisionError, OverflowError):
            return math.inf
        gap = x[0].clone()
        gap[-1] -= 1.0
        found = float((self.target.factor @ gap).norm()) / self.root
        return found if math.isfinite(found) else math.inf


def _cubic(places: Sequence[float], at: float) -> list[tuple[int, float]]:
    """(index, weight) of the Lagrange cubic through the four places (monotone) around a point."""
    n = len(places)
    after = next((i for i, y in enumerate(places) if y <= at), n - 1)
    low = max(0, min(after - 2, n - 4))
    chosen = range(low, min(low + 4, n))
    return [
        (j, math.prod((at - places[m]) / (places[j] - places[m]) for m in chosen if m != j))
        for j in chosen
    ]  # fmt: skip


def _parts(n: int, batch: int) -> list[slice]:
    """Slices of at most ``batch`` of n rows."""
    return [slice(low, min(low + batch, n)) for low in range(0, n, batch)]


def _context(x: Tensor, cond: Mapping[str, Any], rows: slice) -> Context:
    """The context of some of the rows."""
    part = {k: v[rows] if isinstance(v, Tensor) else v for k, v in cond.items()}
    return Context(cond=part, batch=len(x), dtype=x.dtype, device=x.device)
