"""Anchored laws: their equations, their published steps, and every solver on exact beliefs in raw coordinates."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import sfumato as sf
from sfumato.core import Context, InputError, linear
from sfumato.processes import VP, Affine, Anchored, MeanReverting, OrnsteinUhlenbeckVE, Residual, ResidualShift

F64 = torch.float64
LAWS: dict[str, Affine] = {
    "anchored-vp": Anchored(VP()),
    "mean-reverting": MeanReverting(),
    "mean-reverting-linear": MeanReverting(3.0, 0.7, "linear"),
    "mean-reverting-constant": MeanReverting(schedule="constant"),
    "ou-ve": OrnsteinUhlenbeckVE(),
    "ou-ve-without-drift": OrnsteinUhlenbeckVE(gamma=0.0),
    "residual": Residual(),
    "residual-average": Residual("average", "average", variance=0.01),
    "residual-power": Residual("increased", "decreased", power=0.5),
    "residual-shift": ResidualShift(),
    "residual-shift-few": ResidualShift(1.0, steps=4, power=1.0),
}
every_law = pytest.mark.parametrize("name", list(LAWS))


def gaussian() -> sf.oracles.Gaussian:
    return sf.oracles.Gaussian(
        [0.4, -0.2, 0.7], torch.tensor([[0.5, 0.2, 0.0], [0.2, 0.4, 0.1], [0.0, 0.1, 0.2]], dtype=F64)
    )


def anchors(n: int, seed: int = 5) -> Tensor:
    return torch.randn(n, 3, dtype=F64, generator=torch.Generator().manual_seed(seed))


def raw_start(law: Affine, n: int, x1: Tensor, t: float, seed: int = 1) -> Tensor:
    c = law.coef(t)
    noise = torch.randn(n, 3, dtype=F64, generator=torch.Generator().manual_seed(seed))
    return c.alpha * gaussian().sample(n, seed) + (1 - c.alpha) * x1 + c.sigma * noise


# ------------------------------------------------------------------ the laws


@every_law
@given(t=st.floats(0.001, 0.9999))
def test_derivatives_are_derivatives(name: str, t: float) -> None:
    at = torch.tensor([t], dtype=F64, requires_grad=True)
    alpha, sigma, _, _ = LAWS[name].law(at, torch)
    c = LAWS[name].coef(t)
    for value, declared in ((alpha, c.dalpha), (sigma, c.dsigma)):
        (slope,) = torch.autograd.grad((value + 0 * at).sum(), at, retain_graph=True)
        assert declared == pytest.approx(float(slope), rel=1e-6, abs=1e-9)


@every_law
@given(t=st.floats(0.0, 1.0))
def test_floats_and_tensors_agree_and_time_is_the_inverse(name: str, t: float) -> None:
    law = LAWS[name]
    c, rows = law.coef(t), law.coef(torch.tensor([t, 0.5], dtype=F64))
    assert [float(v[0]) for v in rows] == pytest.approx(list(c), rel=1e-12, abs=1e-15)
    if t > 1e-6:
        assert law.time(c.lam) == pytest.approx(t, abs=1e-9)


@every_law
def test_ends(name: str) -> None:
    law = LAWS[name]
    assert law.coef(0.0).alpha == 1 and law.coef(0.0).sigma == 0
    assert law.time(math.inf) == 0 and (isinstance(law, Anchored) or law.time(-math.inf) == 1)
    c = law.coef(1e-7)  # the derivative at 0 is the limit, infinite ones included
    limit = law.coef(0.0).dsigma
    if math.isinf(limit):
        assert c.dsigma > 2 * law.coef(1e-5).dsigma > 4 * law.coef(1e-3).dsigma
    else:
        assert c.dsigma == pytest.approx(limit, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("t", [0.05, 0.4, 0.9])
def test_marginals_obey_the_moment_equations_of_the_published_sdes(t: float) -> None:
    """m' = -theta (m - x1) and (sigma^2)' = g^2 - 2 theta sigma^2."""
    for name in ("mean-reverting", "mean-reverting-linear", "mean-reverting-constant"):
        law: Any = LAWS[name]
        c = law.coef(t)
        theta = -c.dalpha / c.alpha
        assert theta > 0 and 2 * c.sigma * c.dsigma == pytest.approx(2 * theta * (law.std**2 - c.sigma**2), rel=1e-9)
    law = OrnsteinUhlenbeckVE()
    c, r = law.coef(t), 0.5 / 0.05
    g2 = (0.05 * r**t) ** 2 * 2 * math.log(r)
    assert c.alpha == pytest.approx(math.exp(-1.5 * t))
    assert 2 * c.sigma * c.dsigma == pytest.approx(g2 - 3.0 * c.sigma**2, rel=1e-9)


def test_the_cosine_schedule_is_the_limit_of_the_released_one() -> None:
    steps = 4000
    i = torch.arange(steps + 2, dtype=F64)
    bar = torch.cos((i / (steps + 2) + 0.008) / 1.008 * math.pi / 2) ** 2
    theta = 1 - bar[1:] / bar[0]
    total = theta.cumsum(0) / theta.sum()
    for t in (0.1, 0.5, 0.8):
        alpha = math.exp(math.log(0.005) * float(total[int(t * steps) - 1]))
        assert MeanReverting().coef(t).alpha == pytest.approx(alpha, rel=5e-3)


def test_residual_schedules_are_the_limits_of_the_published_sums() -> None:
    steps = 5000
    falling = torch.arange(steps, 0, -1, dtype=F64)
    shares = {"decreased": falling, "average": torch.ones(steps, dtype=F64), "increased": falling.flip(0)}
    for name, density in shares.items():
        summed = density.cumsum(0) / density.sum()
        c = Residual(name, name, variance=0.3).coef(0.3)
        assert 1 - c.alpha == pytest.approx(float(summed[1499]), abs=1e-3)
        assert c.sigma**2 / 0.3 == pytest.approx(float(summed[1499]), abs=1e-3)


def test_residual_shift_is_the_published_table() -> None:
    law, steps = ResidualShift(), 15
    growth = math.exp(math.log(0.99 / 0.02) / (steps - 1))
    for i in range(1, steps + 1):
        root = 0.02 * growth ** (((i - 1) / (steps - 1)) ** 0.3 * (steps - 1))
        c = law.coef(i / steps)
        assert (c.alpha, c.sigma) == pytest.approx((1 - root**2, 2 * root), rel=1e-9)


# ------------------------------------------------------------------ published steps, written in raw coordinates


def run(
    law: Affine, solver: str, x: Tensor, x1: Tensor, grid: Any, steps: int, seed: int = 0, stop: float = 0.0
) -> Tensor:
    options = {"x": x, "cond": {"anchor": x1}, "seed": seed, "stop": stop}
    return sf.sample(gaussian().denoiser(law), solver=solver, grid=grid, steps=steps, **options)


def beliefs(law: Affine, x: Tensor, x1: Tensor, t: float) -> tuple[Tensor, Tensor]:
    """E[x0 | x], E[eps | x] in raw coordinates, straight from the distribution."""
    c = law.coef(t)
    return gaussian().belief(x - (1 - c.alpha) * x1, c)


def by_hand(law: Affine, step: Any, x: Tensor, x1: Tensor, times: list[float], seed: int = 0) -> Tensor:
    ctx = Context.of(len(x), seed, dtype=F64)
    for j, (t, s) in enumerate(zip(times, times[1:], strict=False)):
        ctx.rng.at(j + 1)  # type: ignore[union-attr]
        x = step(x, *beliefs(law, x, x1, t), t, s, ctx.rng.normal(x))  # type: ignore[union-attr]
    return x


def test_residual_shift_takes_the_published_steps() -> None:
    law, steps = ResidualShift(), 15
    x1 = anchors(8)
    x, times = raw_start(law, 8, x1, 1.0), [1 - i / steps for i in range(steps)]
    eta = lambda t: (law.coef(t).sigma / law.kappa) ** 2  # noqa: E731

    def posterior(x: Tensor, x0: Tensor, eps: Tensor, t: float, s: float, z: Tensor) -> Tensor:
        a, b = eta(t), eta(s)
        return b / a * x + (a - b) / a * x0 + law.kappa * math.sqrt(b / a * (a - b)) * z

    def deterministic(x: Tensor, x0: Tensor, eps: Tensor, t: float, s: float, z: Tensor) -> Tensor:
        a, b = eta(t), eta(s)
        m = math.sqrt(b / a)
        return (1 - b - m + math.sqrt(a * b)) * x0 + m * x + (b - math.sqrt(a * b)) * x1

    grid = sf.grids.get("uniform")
    for name, step in (("ddpm", posterior), ("ddim", deterministic)):
        ours = run(law, name, x, x1, grid, steps - 1, stop=1 / steps)
        torch.testing.assert_close(ours, by_hand(law, step, x, x1, times), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_residual_takes_the_published_steps(eta: float) -> None:
    law, steps = Residual(variance=0.01), 10
    x1 = anchors(8)
    x, times = raw_start(law, 8, x1, 1.0), [1 - i / steps for i in range(steps + 1)]

    def step(x: Tensor, x0: Tensor, eps: Tensor, t: float, s: float, z: Tensor) -> Tensor:
        a, b = law.coef(t), law.coef(s)
        std = math.sqrt(eta) * b.sigma / a.sigma * math.sqrt(a.sigma**2 - b.sigma**2)
        moved = x - ((1 - a.alpha) - (1 - b.alpha)) * (x1 - x0)
        return moved - (a.sigma - math.sqrt(b.sigma**2 - std**2)) * eps + std * z

    ours = run(law, f"ddpm(eta={math.sqrt(eta)})", x, x1, sf.grids.get("uniform"), steps)
    torch.testing.assert_close(ours, by_hand(law, step, x, x1, times), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("form", "order"), [("data", 1), ("data", 2), ("noise", 1), ("noise", 2)])
def test_the_exponential_integrator_is_the_mean_reverting_sampler(form: str, order: int) -> None:
    """MR Sampler's published ODE updates with the observation x1 = mu; they are DPM-Solver(++) on x - mu."""
    law = MeanReverting()
    mu, before = anchors(8), []
    times = torch.linspace(0.95, 0.05, 19, dtype=F64).tolist()
    x = raw_start(law, 8, mu, 0.95)

    def step(x: Tensor, x0: Tensor, eps: Tensor, s: float, t: float, z: Tensor) -> Tensor:
        a, b = law.coef(s), law.coef(t)
        h = b.lam - a.lam
        said = x0 if form == "data" else eps
        if form == "data":
            kappa = 1 - b.sigma / a.sigma + b.sigma / a.sigma * a.alpha - b.alpha
            out = b.sigma / a.sigma * x - b.alpha * math.expm1(-h) * x0 + mu * kappa
            second = b.alpha * (math.expm1(-h) / h + 1)
        else:
            out = b.alpha / a.alpha * x - b.sigma * math.expm1(h) * eps + mu * (1 - b.alpha / a.alpha)
            second = -b.sigma * (math.expm1(h) / h - 1)
        if before and order == 2:
            old, h_old = before[-1]
            out = out + second * (said - old) / (h_old / h)
        before.append((said, h))
        return out

    solver = f"dpm-solver++(order={order}, form={form!r})"
    grid = sf.grids.fixed(torch.tensor(times, dtype=F64))
    options = {"x": x, "cond": {"anchor": mu}, "start": times[0], "stop": times[-1]}
    ours = sf.sample(gaussian().denoiser(law), solver=solver, grid=grid, steps=18, **options)
    torch.testing.assert_close(ours, by_hand(law, step, x, mu, times), rtol=1e-9, atol=1e-9)
    # ... and on the shifted data with the same coefficients and no anchor
    plain = sf.sample(gaussian().denoiser(_Bare(law)), solver=solver, grid=grid, steps=18, x=x - (1 - law.coef(0.95).alpha) * mu, start=0.95, stop=times[-1])  # fmt: skip
    torch.testing.assert_close(ours, plain + (1 - law.coef(times[-1]).alpha) * mu, rtol=1e-12, atol=1e-12)


class _Bare(sf.processes.Gaussian):
    """The same alpha and sigma without the anchor."""

    def __init__(self, law: Affine) -> None:
        self.law, self.time = law.law, law.time  # type: ignore[method-assign]


# ------------------------------------------------------------------ solvers and networks


@every_law
def test_ddim_reaches_the_data_that_the_exact_flow_leads_to(name: str) -> None:
    law, x1 = LAWS[name], anchors(16)
    x, c = raw_start(law, 16, x1, 1.0), law.coef(1.0)
    exact = gaussian().transport(x - (1 - c.alpha) * x1, c, law.coef(0.0))
    for solver, steps, within in (("ddim", 400, 0.02), ("heun", 100, 2e-3)):
        ours = run(law, solver, x, x1, sf.grids.get("arctan"), steps)
        assert (ours - exact).norm(dim=1).median() < within


@every_law
@pytest.mark.parametrize("solver", sf.solvers.names())
def test_every_solver_runs_and_lands_on_the_data(solver: str, name: str) -> None:
    law, n = LAWS[name], 48
    x1 = anchors(n)
    x = raw_start(law, n, x1, 1.0)
    try:
        y = run(law, solver, x, x1, sf.grids.get("arctan"), 25)
    except InputError as error:
        pytest.skip(f"refused: {error}")
    z = (y - gaussian().mean) @ gaussian().basis / gaussian().variances.sqrt()
    assert bool(z.isfinite().all()) and float(z.square().mean()) < 3.0


@every_law
@pytest.mark.parametrize("predicts", ["eps", "v", "flow"])
def test_networks_see_raw_states_and_a_flow_is_that_of_the_raw_state(predicts: str, name: str) -> None:
    """A network that says d x_t / dt of the raw state is the same denoiser as one that says the noise."""
    law, x1 = LAWS[name], anchors(6)

    class Raw(nn.Module):
        def forward(self, x: Tensor, label: Tensor, anchor: Tensor) -> Tensor:
            t = float(label[0])
            (x0, eps), c = beliefs(law, x, anchor, t), law.coef(t)
            if predicts == "flow":  # d/dt of alpha x0 + (1 - alpha) x1 + sigma eps
                return c.dalpha * (x0 - anchor) + c.dsigma * eps
            return eps if predicts == "eps" else c.alpha * eps - c.sigma * x0

    x, times = raw_start(law, 6, x1, 0.9), torch.linspace(0.9, 0.1, 9, dtype=F64)
    options = {
        "solver": "ddim",
        "grid": sf.grids.fixed(times),
        "steps": 8,
        "x": x,
        "start": 0.9,
        "stop": 0.1,
        "cond": {"anchor": x1},
    }
    ours = sf.sample(sf.parametrized(Raw(), law, predicts), **options)
    torch.testing.assert_close(ours, sf.sample(gaussian().denoiser(law), **options), rtol=1e-8, atol=1e-8)


def test_with_anchor_0_it_is_the_law_without() -> None:
    for law in (VP(), sf.processes.Flow()):
        plain = sf.sample(gaussian().denoiser(law), solver="ddpm", steps=12, shape=(4, 3), seed=3, dtype=F64)
        zero = {"anchor": torch.zeros(4, 3, dtype=F64)}
        led = sf.sample(
            gaussian().denoiser(Anchored(law)), solver="ddpm", steps=12, shape=(4, 3), seed=3, dtype=F64, cond=zero
        )
        assert torch.equal(plain, led)


@every_law
def test_the_prior_is_the_anchor_plus_noise(name: str) -> None:
    law, x1 = LAWS[name], anchors(5)
    ctx = Context.of(5, 0, dtype=F64, cond={"anchor": x1})
    y = law.prior((5, 3), ctx)
    raw = linear(1.0, y, 1.0, law.anchor(1.0, ctx.cond))
    torch.testing.assert_close(raw, x1 + law.coef(1.0).sigma * ctx.run.noise[-1], rtol=1e-12, atol=1e-12)


def test_inversion_and_batches() -> None:
    law, x1 = MeanReverting(std=0.5), anchors(6)
    x0 = gaussian().sample(6, 2)
    options = {"solver": "dpm-solver++(order=3, variable='angle')", "grid": "uniform", "steps": 300}
    up = sf.invert(gaussian().denoiser(law), x0, cond={"anchor": x1}, **options)
    back = sf.sample(gaussian().denoiser(law), x=up, cond={"anchor": x1}, **options)
    assert (back - x0).abs().max() < 1e-3
    whole = run(law, "ddpm", x0, x1, "uniform", 8, seed=4)
    part = run(law, "ddpm", x0[:2], x1[:2], "uniform", 8, seed=4)
    torch.testing.assert_close(whole[:2], part, rtol=1e-12, atol=1e-12)


def test_errors_say_what_is_missing() -> None:
    denoiser = gaussian().denoiser(MeanReverting())
    with pytest.raises(InputError, match="anchor"):
        sf.sample(denoiser, shape=(2, 3), steps=3)
    with pytest.raises(InputError, match="resample"):
        sf.sample(denoiser, shape=(2, 3), steps=3, cond={"anchor": torch.zeros(1, 3)})
    for make in (
        lambda: MeanReverting(rate=0.0),
        lambda: MeanReverting(schedule="quartic"),
        lambda: OrnsteinUhlenbeckVE(sigma_min=1.0, sigma_max=0.5),
        lambda: Residual("sideways"),
        lambda: Residual(variance=0.0),
        lambda: ResidualShift(steps=1),
        lambda: ResidualShift(end=0.001),
    ):
        with pytest.raises(InputError):
            make()
