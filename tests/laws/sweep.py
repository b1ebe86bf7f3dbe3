"""What the laws are swept over: every registered solver and grid, every schedule, and exact beliefs to check them on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sfumato import grids, oracles, solvers
from sfumato.core import Context, Denoiser, Grid, InputError, Posterior, Solver, Wrap, linear, row, sample
from sfumato.core.trees import column
from sfumato.denoisers import Parametrized, parametrized
from sfumato.processes import DDPM, EDM, VE, VP, Cosine, Flow

PROCESSES: Mapping[str, Any] = {
    "vp": VP(),
    "ve": VE(),
    "edm": EDM(),
    "flow": Flow(),
    "flow-shift-3": Flow(shift=3.0),
    "cosine": Cosine(),
    "ddpm-linear": DDPM("linear"),
    "ddpm-scaled-linear": DDPM("scaled_linear"),
    "ddpm-cosine": DDPM("cosine"),
}
THREE = ("vp", "edm", "flow")
NAMES = solvers.names()
GRIDS = grids.names()
make = solvers.registry.make


def _distinct(specs: list[str]) -> list[str]:
    """Without second names for the same numbers."""
    kept: dict[str, Solver] = {}
    for spec in specs:
        if make(spec) not in kept.values():
            kept[spec] = make(spec)
    return list(kept)


# Every registered name, and names with other numbers: facts such as the order and the noise depend on them.
CONFIGURED = _distinct([
    *NAMES,
    *(f"dpm-solver++({numbers})" for numbers in (
        "order=1", "order=3", "order=4", "order=3, variable='angle'", "order=4, variable='angle', last=2",
        "order=2, form='noise'", "order=3, form='noise', variable='angle'", "order=3, form='v', variable='angle'",
        "order=2, form='v', variable='lambda'", "order=2, rule='midpoint'",
        "order=3, variable='angle', corrector=True, last=2", "order=2, form='v', variable='angle', corrector=True",
        "order=2, form='noise', variable='rho'", "order=3, variable='time', taper=True", "order=2, eta=0.5, corrector=True",
        "order=3, eta=1.0", "order=2, form='noise', eta=1.0",
        "order=3, form='noise'", "order=3, form='line', variable='fraction'", "order=2, form='line', variable='angle'",
        "order=2, form='v', variable='soft', corrector=True", "order=2, variable='soft', corrector=True, last=2",
    )),
    "dpm-solver++2s(rule='exact', variable='angle')", "dpm-solver++3s(rule='exact')", "dpm-solver++2s(eta=0.5, order=3)",
    "dpm-solver++2s(variable='soft')", "dpm-solver-2(variable='fraction')",
    "dpm-solver-2(variable='angle')", "dpm-solver-3(rule='exact')", "dpm-solver-v3(order=3, corrector='exact')",
    "heavy-ball(beta=0.5, terms=3)", "ghvb(terms=4, beta=0.8)", "ipndm(beta=0.5, momentum='nesterov')",
    "dpm-solver-adaptive(order=2)",
    "ddpm(eta=0.0)", "ddpm(eta=0.5)", "edm(churn=0.0)", "euler-maruyama(eta=0.0)", "euler-maruyama(eta=0.5)",
])  # fmt: skip
DETERMINISTIC = [name for name in CONFIGURED if not make(name).stochastic]
STOCHASTIC = [name for name in CONFIGURED if make(name).stochastic]

every_solver = pytest.mark.parametrize("name", CONFIGURED)
every_process = pytest.mark.parametrize("law", list(PROCESSES))
three_processes = pytest.mark.parametrize("law", THREE)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def rotation(d: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(normal(d, d, seed=seed)).Q


@cache
def gaussian() -> oracles.Gaussian:
    """Three unequal variances, rotated, off centre."""
    q = rotation(3)
    return oracles.Gaussian(
        torch.tensor([0.6, -0.3, 0.1]), q @ torch.diag(torch.tensor([1.5, 0.3, 0.04]).double()) @ q.T
    )


@cache
def mixture() -> oracles.GaussianMixture:
    """Three unequal, anisotropic components in the plane."""
    return oracles.GaussianMixture(
        [[-1.2, 0.3], [0.9, 0.9], [0.5, -1.1]], [[0.35, 0.2], [0.25, 0.45], [0.5, 0.3]], [0.5, 0.3, 0.2]
    )


def start(distribution: Any, process: Any, n: int, t: float = 1.0, seed: int = 7) -> Tensor:
    """n exact draws of the marginal at t."""
    c = process.coef(t)
    x0 = distribution.sample(n, seed=seed)
    return linear(c.alpha, x0, c.sigma, normal(*x0.shape, seed=seed))


def lam_times(process: Any, n: int, high: float, low: float, lead: int = 0) -> Tensor:
    """n equal intervals of lambda from ``low`` up to ``high``, the first split geometrically into ``lead`` more."""
    h = (high - low) / n
    lams = [low, *(low + h * 2.0**-k for k in range(lead, 0, -1)), *(low + h * i for i in range(1, n + 1))]
    return torch.tensor([process.time(lam) for lam in lams], dtype=torch.float64)


def keeps_grid(solver: Solver) -> bool:
    """Whether it visits the times it is given: an adaptive or event-driven solver says otherwise by its own ``times``."""
    if solver.grid or math.isnan(solver.nfe):  # its own times only check the grid; or its steps lie within the grid's
        return bool(solver.grid)
    while isinstance(solver, Wrap) and type(solver).times is Wrap.times:
        solver = solver.inner
    return type(solver).times is Solver.times


def run(denoiser: Denoiser, solver: Solver, grid: Grid, steps: int, **options: Any) -> Tensor:
    """Sample; a solver may refuse what it does not support, but clearly and before the first call of the denoiser."""
    if solver.grid:
        grid = grids.get(solver.grid)
    if "ctx" not in options:
        given = options.get("x")
        shape = options.get("shape") if given is None else given.shape
        fields = {"dtype": given.dtype, "device": given.device} if given is not None else {}
        fields |= {k: options.pop(k) for k in ("dtype", "device") if k in options}
        options["ctx"] = Context.of(shape[0], options.pop("seed", 0), cond=options.pop("cond", {}), **fields)
    try:
        return sample(denoiser, solver, grid, steps, **options)
    except InputError as error:
        if options["ctx"].run.nfe:
            raise
        pytest.skip(f"refused at the start: {error}")


class ClassMixture(Denoiser):
    """The exact belief under a mixture given its component: ``label`` (B,) int64, K where it is not given.

    ``kind`` is the reading it returns, as a network of that kind would.
    """

    def __init__(self, process: Any, kind: str = "v", distribution: oracles.GaussianMixture | None = None) -> None:
        super().__init__()
        self.process, self.kind = process, kind
        self.distribution = distribution or mixture()
        self.null = {"label": len(self.distribution.weights)}

    def forward(self, x: Tensor, t: Any, ctx: Context) -> Posterior:
        c, m = self.process.coef(t), self.distribution
        residual, total, logits = m._components(x, c)
        components = torch.arange(len(m.weights), device=x.device)
        label = ctx.cond["label"][:, None]
        share = logits.masked_fill((label != components) & (label != len(components)), -math.inf).softmax(-1)[..., None]
        inside = residual / total
        means, variances = m.means.to(x), m.variances.to(x)
        x0 = (share * (means + column(c.alpha, inside) * variances * inside)).sum(1)
        eps = (share * column(c.sigma, inside) * inside).sum(1)
        p, q = row(self.kind, c)
        ctx.run.nfe += len(x) / ctx.batch
        return Posterior(linear(p, x0, q, eps), self.kind, x, c)

    def score(self, x: Tensor, t: float, label: int | None) -> Tensor:
        """grad log p(x_t | label), by autograd of densities written by torch.distributions."""
        c, m = self.process.coef(t), self.distribution
        x = x.detach().requires_grad_()
        normals = torch.distributions.Normal(c.alpha * m.means, (c.alpha**2 * m.variances + c.sigma**2).sqrt())
        each = torch.distributions.Independent(normals, 1).log_prob(x[:, None])
        density = (each + m.weights.log()).logsumexp(-1) if label is None else each[:, label]
        return torch.autograd.grad(density.sum(), x)[0]


class Net(nn.Module):
    """A small smooth network with one vector condition."""

    def __init__(self, d: int = 4, width: int = 8, seed: int = 0) -> None:
        super().__init__()
        self.first, self.second, self.vector = nn.Linear(d + 1, width), nn.Linear(width, d), nn.Linear(3, width)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) * 0.4)

    def forward(self, x: Tensor, label: Tensor, vector: Tensor) -> Tensor:
        hidden = self.first(torch.cat([x, label[:, None].to(x)], -1)) + self.vector(vector)
        return self.second(torch.tanh(hidden))


def network(process: Any, predicts: str = "v") -> Parametrized:
    return parametrized(Net(), process, predicts, null={"vector": torch.zeros(3)})
