"""How far a denoiser is from solving its Fokker-Planck equation, and what that costs: the gap between ODE and SDE samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.core import Context, Denoiser, Grid, InputError, MissingExtra, Posterior, mix, sample
from sfumato.grids import get as grid_named
from sfumato.objectives.fokker_planck import clocks, divergence, sde, signs
from sfumato.solvers.heun import Heun
from sfumato.solvers.sde import EulerMaruyama


def score_residual(
    denoiser: Denoiser, x: Tensor, t: float | Tensor, *, probes: int | None = None,
    cond: Mapping[str, Any] | None = None, seed: int = 0,
) -> Tensor:  # fmt: skip
    """ds/dt + grad(f . s) - grad[g^2 (|s|^2 + div s) / 2], (B, *): the residual of the score Fokker-Planck equation.

    It is the gradient of :func:`log_density_residual` where the score s is one, 0 to rounding for exact denoisers, and
    defined for every Denoiser of a Gaussian process dx = f dt + g dw, f = a x, whatever it predicts.

    x, t    the state (B, *), in solver coordinates for anchored processes; one time in (0, 1), or one an item (B,)
    probes  None: the exact divergence, one backward pass a dimension; else Hutchinson's with that many random signs, an
            unbiased estimate. Rows must not act on each other, and the network needs third derivatives

    Raises InputError where alpha or sigma is 0 and for processes that are not Gaussian.
    Source: Lai, Takida, Murata, Uesaka, Mitsufuji, Ermon, 2023, "FP-Diffusion: Improving Score-based Diffusion Models by
    Enforcing the Underlying Score Fokker-Planck Equation".
    """
    ctx = Context.of(len(x), seed, cond=dict(cond or {}), dtype=x.dtype, device=x.device)
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        clock = clocks(t, x).requires_grad_(True)
        rate, g2 = (v.detach().to(x) for v in sde(denoiser.process, clock))
        s = denoiser(x, clock, ctx).view("score")
        flat = s.flatten(1)
        spread = flat.square().sum(1) + divergence(s, x, signs(x, probes, ctx), create_graph=True)
        inside = rate * (x.flatten(1) * flat).sum(1) - 0.5 * g2 * spread
        space = _gradient(inside.sum(), x)
        # ds/dt by two reverse passes: d/dw of d(w . s)/dt
        w = torch.zeros_like(s, requires_grad=True)
        pulled = _gradient((s * w).sum(), clock, create_graph=True)
        speed = _gradient(pulled.sum(), w)
    return (space + speed).detach()


def _gradient(scalar: Tensor, of: Tensor, create_graph: bool = False) -> Tensor:
    """d scalar / d of, 0 where there is no dependence."""
    if not scalar.requires_grad:
        return torch.zeros_like(of)
    (found,) = torch.autograd.grad(scalar, of, retain_graph=True, create_graph=create_graph, materialize_grads=True)
    return found


def wasserstein2(x: Tensor, y: Tensor) -> float:
    """W_2 between two equally large samples (n, d), exact by assignment: sqrt(min over permutations of mean |x_i - y_p(i)|^2).

    Costs n^3: up to a few thousand points in a few dimensions. At finite n it is positive for equal laws too. Raises
    MissingExtra without scipy, InputError for unequal shapes. Source: Peyre & Cuturi, 2019, "Computational Optimal
    Transport".
    """
    if x.shape != y.shape or x.ndim < 2:
        raise InputError(
            f"two samples of one shape (n, *) are assigned to each other, not {tuple(x.shape)}, {tuple(y.shape)}"
        )
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise MissingExtra("scipy", extra="science") from error
    cost = torch.cdist(
        x.flatten(1).double(), y.flatten(1).double(), compute_mode="donot_use_mm_for_euclid_dist"
    ).square()
    rows, columns = linear_sum_assignment(cost.numpy())
    return math.sqrt(float(cost[torch.from_numpy(rows), torch.from_numpy(columns)].mean()))


def _of_one_stream(
    shape: tuple[int, ...], seed: int, denoiser: Denoiser, cond: Mapping[str, Any] | None, halves: int = 1
) -> Context:
    """A context whose noise comes from one generator: a stream an item would cost more than small networks do. The noise of a
    step is the scaled sum of that many draws; the start is one."""
    rng, device = torch.Generator().manual_seed(seed), next((p.device for p in denoiser.parameters()), "cpu")
    counts = iter([1])

    def source(ctx: Context, fresh: Callable[[], Any]) -> Tensor:
        count = next(counts, halves)
        return sum(torch.randn(shape, generator=rng) for _ in range(count)).to(device) / count**0.5  # type: ignore[union-attr]

    return Context.of(shape[0], seed, cond=dict(cond or {}), source=source, device=device)


class Tabulated(Denoiser):
    """The score of a plane's denoiser, read off a table by linear interpolation: samples by the hundred thousand.

    denoiser    on states (B, 2); its score is computed once for each time that is asked for, at cells x cells points of the
                square [-half_width, half_width]^2, and continued outside of it as -x / (alpha^2 + sigma^2) shifted to fit
    """

    def __init__(self, denoiser: Denoiser, half_width: float, cells: int = 128) -> None:
        super().__init__()
        if not half_width > 0 or cells < 2:
            raise InputError(f"half_width = {half_width}, cells = {cells}: above 0, and at least 2")
        self.process, self.half_width, self.cells = denoiser.process, half_width, cells
        self._tables: dict[float, Tensor] = {}
        self._inner = [denoiser]  # its own parameters are not trained through a table

    def forward(self, x: Tensor, t: Any, ctx: Context) -> Posterior:
        if x.ndim != 2 or x.shape[1] != 2 or not isinstance(t, float):
            raise InputError(f"a table serves states (B, 2) at one time, not {tuple(x.shape)} at {t}")
        if t not in self._tables:
            self._tables[t] = self._table(t, x)
        inside = x.clamp(-self.half_width, self.half_width)
        place = (inside / self.half_width)[None, None]
        score = F.grid_sample(self._tables[t], place, align_corners=True)[0, :, 0].T
        c = self.process.coef(t)
        ctx.run.nfe += len(x) / ctx.batch
        return Posterior(score - (x - inside) / (c.alpha**2 + c.sigma**2), "score", x, c)

    def _table(self, t: float, like: Tensor) -> Tensor:
        """The score on the square's points at time t, (1, 2, cells, cells)."""
        axis = torch.linspace(-self.half_width, self.half_width, self.cells).to(like)
        points = torch.cartesian_prod(axis, axis).flip(1)  # rows of the table are y
        with torch.no_grad():
            score = self._inner[0](points, t, Context.of(len(points), None, dtype=like.dtype)).view("score")
        return score.T.reshape(1, 2, self.cells, self.cells)


class Gap(NamedTuple):
    """What :func:`ode_sde_gap` found: the distance without its floor, with it, the floor, and the samples (n, *)."""

    distance: float
    raw: float
    floor: float
    ode: Tensor
    sde: Tensor


def ode_sde_gap(
    denoiser: Denoiser, shape: tuple[int, ...], *, steps: int = 200, grid: Grid | str = "quadratic", parts: int = 2,
    distance: Callable[[Tensor, Tensor], float] = wasserstein2, stop: float = 0.0, seed: int = 0, halves: int = 1,
    cond: Mapping[str, Any] | None = None,
) -> Gap:  # fmt: skip
    """The distance between what the probability flow and the reverse equation of a denoiser make of the same noise law.

    ODE  dx = (f - g^2 s / 2) dt by Heun's method        SDE  dx = (f - g^2 s) dt + g dw by Euler-Maruyama

    Two independent SDE batches of the same sizes give the floor, what sampling alone does to the distance; ``distance`` of
    the result is sqrt(max(raw^2 - floor^2, 0)), each the root mean square over ``parts`` parts of the samples.

    shape     (n, *): n samples of each
    steps     denoiser calls of a sample: steps of the SDE, twice those of the ODE, in times of ``grid``
    distance  (n / parts, *) twice -> float; wasserstein2 in a few dimensions, sliced Wasserstein in many
    halves    draws that make the noise of a step: with as many times the steps and halves=1 the same seed gives the same starts
              and (nearly, where parts of a step have other variances) the same Brownian paths, so that what differs is what
              the steps do, and no chance

    Source: Deveney, Stanczuk, Kreusser, Budd, Schonlieb, 2023, "Closing the ODE-SDE gap in score-based diffusion models
    through the Fokker-Planck equation".
    """
    if parts < 1 or shape[0] % parts or halves < 1:
        raise InputError(
            f"{shape[0]} samples in {parts} parts, halves = {halves}: a whole number in each, and at least 1"
        )
    times = grid_named(grid) if isinstance(grid, str) else grid
    runs = (Heun(), (steps + 1) // 2), (EulerMaruyama(), steps), (EulerMaruyama(), steps)
    drawn = (_of_one_stream(shape, mix(seed, k), denoiser, cond, halves) for k in range(len(runs)))
    ode, one, other = (
        sample(denoiser, solver, times, n, shape=shape, stop=stop, ctx=ctx)
        for (solver, n), ctx in zip(runs, drawn, strict=True)
    )

    def mean_square(x: Tensor, y: Tensor) -> float:
        return sum(distance(a, b) ** 2 for a, b in zip(x.chunk(parts), y.chunk(parts), strict=True)) / parts

    raw, floor = mean_square(ode, one), mean_square(one, other)
    return Gap(math.sqrt(max(raw - floor, 0.0)), math.sqrt(raw), math.sqrt(floor), ode, one)
