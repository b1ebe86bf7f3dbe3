"""Residuals of the Fokker-Planck equation against exact solutions, and the gap between the two samplers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sfumato as sf
from sfumato.analysis.fokker_planck import Tabulated, ode_sde_gap, score_residual, wasserstein2
from sfumato.core import Context, Denoiser, InputError, Posterior
from sfumato.denoisers import Potential
from sfumato.objectives import Denoising
from sfumato.objectives.fokker_planck import FokkerPlanck, divergence, log_density_residual, signs
from sfumato.processes import DDPM, EDM, VE, VP, Cosine, Flow, Interpolant
from sfumato.processes.base import sde

F64 = torch.float64
LAWS = {"vp": VP(), "ve": VE(0.05, 5.0), "edm": EDM(sigma_max=5.0), "flow": Flow(), "cosine": Cosine(), "ddpm": DDPM()}


def mixture() -> sf.oracles.GaussianMixture:
    return sf.oracles.GaussianMixture(
        [[-1.2, 0.3], [0.9, 0.9], [0.5, -1.1]], [[0.35, 0.2], [0.25, 0.45], [0.5, 0.3]], [5, 3, 2]
    )


class Quadratic(Denoiser):
    """u = log N(x; 0, v(t) I) with a variance v(t) that need not be the true one."""

    def __init__(self, process: Any, variance: Any) -> None:
        super().__init__()
        self.process, self.variance = process, variance

    def log_density(self, x: Tensor, t: Any, ctx: Context) -> Tensor:
        v = self.variance(self.process.coef(t))
        return -0.5 * x.square().sum(1) / v - 0.5 * x.shape[1] * (v.log() + math.log(2 * math.pi))

    def forward(self, x: Tensor, t: Any, ctx: Context) -> Posterior:
        v = self.variance(self.process.coef(t))
        return Posterior(-x / (v[:, None] if isinstance(v, Tensor) else v), "score", x, self.process.coef(t))


class Small(nn.Module):
    def __init__(self, out: int = 1) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, out))

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        return self.layers(torch.cat([x, label[:, None]], 1))


def points(n: int = 40, d: int = 2, seed: int = 0) -> Tensor:
    return 1.5 * torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=F64)


@pytest.mark.parametrize("name", list(LAWS))
def test_the_drift_and_diffusion_have_the_marginals_of_the_process(name: str) -> None:
    """alpha' = a alpha and (sigma^2)' = 2 a sigma^2 + g^2, by finite differences of the coefficients."""
    law, h = LAWS[name], 1e-6
    for t in (0.2105, 0.6105):
        rate, g2 = sde(law, t)
        low, c, high = (law.coef(t + k * h) for k in (-1, 0, 1))
        assert (high.alpha - low.alpha) / (2 * h) == pytest.approx(rate * c.alpha, rel=1e-5, abs=1e-8)
        slope = (high.sigma**2 - low.sigma**2) / (2 * h)
        assert slope == pytest.approx(2 * rate * c.sigma**2 + g2, rel=1e-5)
        assert g2 > 0


@pytest.mark.parametrize("name", list(LAWS))
def test_the_score_of_an_exact_denoiser_solves_the_equation(name: str) -> None:
    denoiser = mixture().denoiser(LAWS[name])
    t = torch.linspace(0.15, 0.9, 40, dtype=F64)
    exact, wrong = (score_residual(d, points(), t).abs().amax() for d in (denoiser, _Hot(denoiser)))
    assert exact < 1e-8 * wrong
    assert exact < 1e-7


class _Hot(sf.core.Wrapper):
    def forward(self, x: Tensor, t: Any, ctx: Context) -> Posterior:
        post = self.inner(x, t, ctx)
        return post.but(eps=1.1 * post.view("eps"))


@pytest.mark.parametrize("name", list(LAWS))
def test_the_residual_of_a_wrong_variance_is_its_polynomial(name: str) -> None:
    """R = (x^2 / m^2 - 1 / m) (m' - 2 a m - g^2) / 2 a dimension for u = log N(0, m(t)): 0 iff m solves its equation."""
    law, x, t = LAWS[name], points(), torch.linspace(0.15, 0.9, 40, dtype=F64)
    right = Quadratic(law, lambda c: 0.49 * c.alpha**2 + c.sigma**2)
    scale = (x / sde(law, t)[1][:, None]).abs().amax().clamp(min=1)
    assert log_density_residual(right, x, t).abs().max() < 1e-8 * scale
    wrong = Quadratic(law, lambda c: 0.8 * c.alpha + 1.3 * c.sigma)
    c, (rate, g2) = law.coef(t), sde(law, t)
    m, slope = 0.8 * c.alpha + 1.3 * c.sigma, 0.8 * c.dalpha + 1.3 * c.dsigma
    expected = 0.5 * (x.square().sum(1) / m**2 - 2 / m) * (slope - 2 * rate * m - g2)
    assert torch.allclose(log_density_residual(wrong, x, t), expected, rtol=1e-9, atol=1e-9)


def test_the_score_residual_is_the_gradient_of_the_density_residual() -> None:
    torch.manual_seed(0)
    potential, x, h = Potential(Small().double(), VP(), reference=True), points(12), 1e-5
    found = score_residual(potential, x, 0.4)
    for i in range(2):
        e = h * torch.eye(2, dtype=F64)[i]
        slope = (log_density_residual(potential, x + e, 0.4) - log_density_residual(potential, x - e, 0.4)) / (2 * h)
        assert torch.allclose(found[:, i], slope, rtol=1e-5, atol=1e-6)


def test_a_rotated_score_breaks_the_equation_though_its_samples_are_exact() -> None:
    from sfumato.analysis.gauge_freedom import gauge

    turned = gauge([[0.0, 1.0], [-1.0, 0.0]])(mixture().denoiser(VP()))
    assert score_residual(turned, points(), 0.3).abs().median() > 1.0


def test_probes_estimate_the_exact_divergence() -> None:
    """The Hutchinson estimate is unbiased: within four standard errors over many probes; exact for diagonal Jacobians."""
    torch.manual_seed(1)
    x = points(6).requires_grad_(True)
    field = torch.stack([torch.sin(x[:, 0] * x[:, 1]), x[:, 0] ** 2 + torch.cos(x[:, 1])], 1)
    exact = divergence(field, x)
    drawn = signs(x, 3000, Context.of(6, 0))
    assert drawn is not None
    each = torch.stack([divergence(field, x, v[None]) for v in drawn[:400]])
    assert ((each.mean(0) - exact).abs() < 4 * each.std(0) / 20 + 1e-12).all()
    straight = torch.stack([x[:, 0] ** 3, x[:, 1] ** 2], 1)
    assert torch.allclose(divergence(straight, x, drawn[:1]), divergence(straight, x))


def test_feynman_kac_tells_the_density_of_the_reverse_equation() -> None:
    """log p~_t(x) = u + log E exp(int_t^1 R ds) pi(X_1) / e^{u(X_1)}, X the forward equation from x: against the exact
    variance of the reverse equation of a wrong quadratic u, to 2 % by Monte Carlo."""
    law, start, n, count = Flow(), 0.55, 60, 12_000
    wrong = Quadratic(law, lambda c: 0.5 * c.alpha**2 + 1.4 * c.sigma**2)
    end = 0.9
    times = torch.linspace(start, end, n + 1, dtype=F64)
    v_end, dt = wrong.variance(law.coef(end)), (end - start) / n
    v = v_end
    for t in times.flip(0)[:-1].tolist():  # dV/dt = 2 (a + g^2 / m) V - g^2 backwards, midpoint rule

        def slope(t: float, v: float) -> float:
            rate, g2 = sde(law, t)
            return 2 * (rate + g2 / wrong.variance(law.coef(t))) * v - g2

        v = v - dt * slope(t - dt / 2, v - dt / 2 * slope(t, v))
    x0, rng = 0.2, torch.Generator().manual_seed(0)
    x, weight = torch.full((count, 1), x0, dtype=F64), torch.zeros(count, dtype=F64)
    for s, t in zip(times.tolist(), times.tolist()[1:], strict=False):
        weight += dt / 2 * log_density_residual(wrong, x, s)
        x = law.renoise(x, s, t, torch.randn(count, 1, generator=rng, dtype=F64))
        weight += dt / 2 * log_density_residual(wrong, x, t)
    # the reverse run starts from pi = e^u at the end, so the last factor is 1
    u = wrong.log_density(torch.full((1, 1), x0, dtype=F64), torch.tensor([start], dtype=F64), Context.of(1))
    found = float(u + weight.exp().mean().log())
    exact = -0.5 * x0**2 / v - 0.5 * math.log(2 * math.pi * v)
    assert abs(exact - float(u)) > 0.03  # the wrong u is not the density
    assert found == pytest.approx(exact, abs=0.02)


def test_the_two_samplers_agree_where_the_equation_holds_and_not_elsewhere() -> None:
    law = VP()
    right = Quadratic(law, lambda c: 0.49 * c.alpha**2 + c.sigma**2)
    wrong = Quadratic(law, lambda c: 1.5 * (0.49 * c.alpha**2 + c.sigma**2))
    found = {
        name: ode_sde_gap(d, (1500, 1), steps=100, parts=1, distance=_sorted, stop=1e-3)
        for name, d in (("right", right), ("wrong", wrong))
    }
    assert found["right"].raw < 0.08
    assert found["right"].sde.std() == pytest.approx(0.7, rel=0.05)
    ode, one = float(found["wrong"].ode.std()), float(found["wrong"].sde.std())
    assert abs(ode - one) > 0.1
    assert found["wrong"].distance == pytest.approx(abs(ode - one), rel=0.1)


def test_twice_the_steps_can_follow_the_same_brownian_paths() -> None:
    """With ``halves`` the noise of a step is that of its parts: what differs between the ends is the steps' error, of order 1."""
    law = VP()
    data = sf.oracles.Gaussian([0.0, 0.0], 0.7).denoiser(law)
    options = {"parts": 1, "distance": _sorted, "stop": 1e-3, "seed": 3}
    ends = {n: ode_sde_gap(data, (2000, 2), steps=n, halves=400 // n, **options).sde for n in (100, 200, 400)}
    other = ode_sde_gap(data, (2000, 2), steps=400, **(options | {"seed": 4})).sde
    apart = [float((ends[n] - ends[400]).square().mean().sqrt()) for n in (100, 200)]
    assert apart[0] < 0.1 * float((other - ends[400]).square().mean().sqrt())
    assert apart[1] < 0.6 * apart[0]
    assert ends[100].std() == pytest.approx(0.7**0.5, rel=0.05)
    with pytest.raises(InputError, match="halves"):
        ode_sde_gap(data, (4, 2), halves=0)


def _sorted(x: Tensor, y: Tensor) -> float:
    return math.sqrt(float((x.flatten().sort().values - y.flatten().sort().values).square().mean()))


def test_a_table_reads_the_score_between_its_points_to_second_order() -> None:
    """Exact for a score that is linear in x, also outside of the square; an error of 1 / cells^2 for others."""
    x, ctx = points(200), Context.of(200)
    unit = sf.oracles.Gaussian([0.0, 0.0], 1.0).denoiser(VP())
    far = torch.cat([x, 5 * x])
    found = Tabulated(unit, 2.0, 16)(far, 0.4, Context.of(400)).view("score")
    assert torch.allclose(found, -far, atol=1e-6)
    exact = mixture().denoiser(VP())
    true = exact(x.clamp(-2, 2), 0.3, ctx).view("score")
    errors = [
        float((Tabulated(exact, 2.0, n)(x.clamp(-2, 2), 0.3, ctx).view("score") - true).abs().mean()) for n in (33, 65)
    ]
    assert errors[0] / errors[1] == pytest.approx(4.0, rel=0.2)
    with pytest.raises(InputError, match="a table serves"):
        Tabulated(exact, 2.0)(x, torch.ones(200), ctx)


def test_wasserstein_by_assignment() -> None:
    x = points(60)
    shift = torch.tensor([0.3, -0.4], dtype=F64)
    assert wasserstein2(x, (x + shift)[torch.randperm(60)]) == pytest.approx(0.5, abs=1e-12)  # a translation is optimal
    assert wasserstein2(x[:, :1], 2 * x[:, :1]) == pytest.approx(_sorted(x[:, :1], 2 * x[:, :1]))
    with pytest.raises(InputError, match="one shape"):
        wasserstein2(x, x[:50])


@pytest.mark.parametrize("predicts", ["score", "eps"])
@pytest.mark.parametrize("quadratic", [False, True])
@pytest.mark.parametrize("reference", [False, True])
def test_the_score_of_a_potential_is_the_gradient_of_its_log_density(
    predicts: str, quadratic: bool, reference: bool
) -> None:
    torch.manual_seed(0)
    potential = Potential(
        Small(2 if quadratic else 1).double(), VP(), predicts, quadratic=quadratic, reference=reference
    )
    x, t = points(10).requires_grad_(True), torch.linspace(0.1, 0.9, 10, dtype=F64)
    (slope,) = torch.autograd.grad(potential.log_density(x, t).sum(), x)
    ctx = Context.of(10)
    with torch.no_grad():
        score = potential(x, t, ctx).view("score")
    assert torch.allclose(score, slope) and not score.requires_grad
    assert ctx.run.nfe == 1


def test_the_penalty_falls_and_its_gradient_is_that_of_the_mean_square() -> None:
    torch.manual_seed(0)
    potential = Potential(Small(), VP(), reference=True)
    objective = FokkerPlanck(Denoising(potential, dropout=0.0, weighting="eps"), 0.5, box=(-6.0, 6.0), every=2)
    batch = {"x": torch.randn(64, 2).clamp(-3, 3)}
    loss = objective(batch, Context.of(64, 3))
    assert float(loss.terms["residual"]) > 0
    plain = objective.base(batch, Context.of(64, 3))
    assert float(loss.total.detach()) == pytest.approx(
        float(plain.total.detach() + 0.5 * loss.terms["residual"]), rel=1e-5
    )
    optimiser = torch.optim.Adam(potential.parameters(), 1e-2)
    before = float(loss.terms["residual"])
    for i in range(60):
        optimiser.zero_grad()
        objective(batch, Context.of(64, i)).total.backward()
        optimiser.step()
    assert float(objective(batch, Context.of(64, 3)).terms["residual"]) < 0.5 * before


def test_points_follow_the_data_without_a_box() -> None:
    torch.manual_seed(0)
    objective = FokkerPlanck(Denoising(Potential(Small(), VP()), dropout=0.0, weighting="eps"), 0.1, probes=2)
    assert float(objective({"x": torch.randn(16, 2)}, Context.of(16, 0)).terms["residual"]) > 0


def test_what_cannot_be_asked_is_refused() -> None:
    oracle = mixture().denoiser(VP())
    x = points(4)
    with pytest.raises(InputError, match="no log density"):
        log_density_residual(oracle, x, 0.5)
    with pytest.raises(InputError, match="stay inside"):
        score_residual(oracle, x, 0.0)
    with pytest.raises(InputError, match="stay inside"):
        score_residual(mixture().denoiser(Flow()), x, 1.0)
    with pytest.raises(InputError, match="no Gaussian process"):
        sde(Interpolant(), 0.5)
    with pytest.raises(InputError, match="one time"):
        score_residual(oracle, x, torch.ones(3))
    with pytest.raises(InputError, match="ReLU"):
        Potential(nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1)), VP())
    with pytest.raises(InputError, match="one number an item"):
        Potential(Small(2).double(), VP()).log_density(x, 0.5)
    with pytest.raises(InputError, match="a potential's gradient"):
        Potential(Small(), VP(), "x0")
    base = Denoising(Potential(Small(), VP()), dropout=0.0)
    with pytest.raises(InputError, match="in a box"):
        FokkerPlanck(base, 1.0, box=(-1.0, 1.0))({"x": torch.full((2, 2), 2.0)}, Context.of(2))
    with pytest.raises(InputError, match="above 0"):
        FokkerPlanck(base, 0.0)
    with pytest.raises(InputError, match="no log density"):
        FokkerPlanck(Denoising(oracle, dropout=0.0), 1.0)
    with pytest.raises(InputError, match="parts"):
        ode_sde_gap(oracle, (5, 2), parts=2)
    with pytest.raises(InputError, match="probes"):
        score_residual(oracle, x, 0.5, probes=0)
