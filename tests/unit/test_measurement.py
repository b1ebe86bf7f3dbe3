"""Guidance by a measurement against exact Gaussian posteriors, and beliefs read under another process."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sfumato import core, grids, oracles, solvers
from sfumato.core import Context, InputError, Posterior, sample, trajectory
from sfumato.denoisers import converted, parametrized
from sfumato.guidance import measurement
from sfumato.operators import Function, Operator
from sfumato.processes import DDPM, EDM, VE, VP, Cosine, Flow, MeanReverting

LAWS = {"vp": VP(), "ve": VE(), "edm": EDM(), "flow": Flow(), "cosine": Cosine(), "ddpm": DDPM("linear")}
STD, NOISE = 0.7, 0.3


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Matrix(Operator):
    """y = H x + noise."""

    def __init__(self, h: Tensor, noise: float) -> None:
        self.h, self.noise = h, noise

    def apply(self, x: Tensor, **phi: float) -> Tensor:
        return x @ self.h.to(x).T

    def adjoint(self, y: Tensor) -> Tensor:
        return y @ self.h.to(y)


MEAN, H = normal(5, seed=1), normal(2, 5, seed=2)
TRUTH = MEAN + STD * normal(5, seed=3)


def prior(off_range: bool = False) -> oracles.Gaussian:
    """N(MEAN, STD^2 I), or with any other covariance where H sees nothing."""
    cov = STD**2 * torch.eye(5, dtype=torch.float64)
    if off_range:
        blind = torch.linalg.svd(H).Vh[2:]
        factor = normal(3, 3, seed=4)
        cov = cov + blind.T @ (factor @ factor.T - STD**2 * torch.eye(3, dtype=torch.float64)) @ blind
    return oracles.Gaussian(MEAN, cov)


def posterior(distribution: oracles.Gaussian, y: Tensor, noise: float) -> oracles.Gaussian:
    """The textbook posterior under y = H x + noise."""
    cov = distribution.basis @ torch.diag(distribution.variances) @ distribution.basis.T
    gain = cov @ H.T @ torch.linalg.inv(H @ cov @ H.T + noise**2 * torch.eye(2, dtype=torch.float64))
    after = cov - gain @ H @ cov
    return oracles.Gaussian(MEAN + gain @ (y - H @ MEAN), (after + after.T) / 2)


@pytest.mark.parametrize("noise", [NOISE, 0.0], ids=["noisy", "exact"])
@pytest.mark.parametrize("jacobian", [False, True], ids=["prox", "jacobian"])
@pytest.mark.parametrize("law", LAWS)
def test_it_is_the_exact_conditional_belief_for_isotropic_data(law, jacobian, noise):
    process, operator = LAWS[law], Matrix(H, noise)
    y = H @ TRUTH + noise * normal(2, seed=5)
    guided = measurement(operator, y[None], data_std=STD, jacobian=jacobian)(prior().denoiser(process))
    exact = posterior(prior(), y, noise).denoiser(process)
    x = normal(6, 5, seed=6)
    times = [process.time(lam) for lam in (3.0, 1.0, -1.0)]
    for t in (*times, 1.0, torch.linspace(0.5, 1.0, 6, dtype=torch.float64)):
        scale = process.coef(t).sigma
        state = x * (scale[:, None] if isinstance(scale, Tensor) else scale)
        ours, theirs = (d(state, t, Context.of(6)) for d in (guided, exact))
        torch.testing.assert_close(ours.mean, theirs.mean, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(ours.view("eps"), theirs.view("eps"), rtol=1e-6, atol=1e-6)
        assert not ours.mean.requires_grad


def test_only_the_spread_that_is_measured_has_to_be_right():
    y = H @ TRUTH
    exact = posterior(prior(True), y, NOISE).denoiser(VP())
    x = normal(6, 5, seed=6)
    for jacobian in (False, True):
        guided = measurement(Matrix(H, NOISE), y[None], data_std=STD, jacobian=jacobian)(prior(True).denoiser(VP()))
        torch.testing.assert_close(
            guided(x, 0.5, Context.of(6)).mean, exact(x, 0.5, Context.of(6)).mean, rtol=1e-7, atol=1e-7
        )


@pytest.mark.parametrize("solver", ["heun", "ddpm", "dpm-solver++"])
def test_solvers_draw_from_the_posterior(solver):
    y = H @ TRUTH
    goal = posterior(prior(), y, NOISE)
    guided = measurement(Matrix(H, NOISE), y[None], data_std=STD)(prior().denoiser(VP()))
    x = sample(guided, solvers.get(solver), grids.get("arctan"), 80, shape=(4000, 5), dtype=torch.float64)
    cov = goal.basis @ torch.diag(goal.variances) @ goal.basis.T
    assert (x.mean(0) - goal.mean).abs().max() < 0.06
    assert (x.T.cov() - cov).abs().max() < 0.06
    assert (x.T.cov() - STD**2 * torch.eye(5)).abs().max() > 0.2  # which the prior would not do


def test_exact_measurements_hold_at_every_step():
    y = (H @ TRUTH)[None]
    guided = measurement(Matrix(H, 0.0), y, data_std=STD)(prior(True).denoiser(VP()))
    x = sample(guided, solvers.get("ddim"), grids.get("arctan"), 12, shape=(3, 5), dtype=torch.float64)
    torch.testing.assert_close(x @ H.T, y.expand(3, 2), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["linear", "non-linear"])
def test_without_spread_it_is_the_slope_of_the_likelihood_at_the_mean(kind):
    mixture = oracles.GaussianMixture(normal(3, 5, seed=7), [0.3, 0.5, 0.4]).denoiser(VP())
    operator = Matrix(H, NOISE) if kind == "linear" else Function(lambda x: torch.tanh(x @ H.to(x).T), NOISE)
    y, x, t = normal(4, 2, seed=8), normal(4, 5, seed=9), 0.4
    at = x.clone().requires_grad_()
    mean = mixture(at, t, Context.of(4)).mean
    (slope,) = torch.autograd.grad(-operator.residual(mean, y).sum(), at)
    guided = measurement(operator, y, data_std=0, jacobian=True, scale=0.5)(mixture)(x, t, Context.of(4))
    plain = mixture(x, t, Context.of(4))
    torch.testing.assert_close(guided.view("score"), plain.view("score") + 0.5 * slope)


def test_gradients_flow_through_it_only_where_they_are_asked_for():
    y = (H @ TRUTH)[None]
    for jacobian in (False, True):
        guided = measurement(Matrix(H, NOISE), y, data_std=STD, jacobian=jacobian)(prior().denoiser(VP()))
        x = normal(2, 5).requires_grad_()
        (slope,) = torch.autograd.grad(guided(x, 0.5, Context.of(2)).mean.sum(), x)
        ones = torch.ones(5, dtype=torch.float64)
        step = 1e-6 * ones
        ahead, behind = (guided((x + sign * step).detach(), 0.5, Context.of(2)).mean.sum(1) for sign in (1, -1))
        torch.testing.assert_close(slope.sum(1), (ahead - behind) / 2e-6, rtol=1e-5, atol=1e-5)


def test_impossible_measurements_are_refused():
    exact, noisy, bent = Matrix(H, 0.0), Matrix(H, 0.1), Function(torch.tanh, 0.1)
    den, y = prior().denoiser(VP()), torch.zeros(1, 2)
    for operator, numbers in (
        (bent, {}), (bent, {"jacobian": True}), (exact, {"jacobian": True, "data_std": 0.0}), (noisy, {"data_std": 0.0}),
        (noisy, {"data_std": -1.0}), (noisy, {"scale": -1.0}),
    ):  # fmt: skip
        with pytest.raises(InputError):
            measurement(operator, y, **numbers)(den)


# ------------------------------------------------------------------ one belief under other processes


@pytest.mark.parametrize("to", LAWS)
@pytest.mark.parametrize("of", LAWS)
def test_a_converted_oracle_is_the_oracle_of_the_other_process(of, to):
    mixture = oracles.GaussianMixture([[-1.0, 0.5], [1.2, -0.3]], [0.3, 0.6], [0.3, 0.7])
    other, ours = mixture.denoiser(LAWS[to]), converted(mixture.denoiser(LAWS[of]), LAWS[to])
    x = normal(5, 2)
    for t in (0.0, 0.05, 0.4, torch.tensor([0.1, 0.2, 0.3, 0.5, 0.6], dtype=torch.float64)):
        c = LAWS[to].coef(t)
        total = (c.alpha**2 + c.sigma**2) ** 0.5
        state = x * (total[:, None] if isinstance(total, Tensor) else total)
        a, b = (d(state, t, Context.of(5)) for d in (ours, other))
        for p, q in ((1.0, 0.0), (0.3, 0.7)):
            torch.testing.assert_close(a.at(p, q), b.at(p, q), rtol=1e-8, atol=1e-8)


@settings(max_examples=25, deadline=None)
@given(t=st.floats(0.01, 0.95), kind=st.sampled_from(["x0", "eps", "v", "flow", "score", "edm"]))
def test_every_prediction_survives_the_way_there_and_back(t, kind):
    class Net(torch.nn.Module):
        def forward(self, x: Tensor, label: Tensor) -> Tensor:
            return torch.sin(x + label[:, None].to(x))

    den = parametrized(Net(), VP(), kind)
    x = normal(4, 3)
    there = converted(den, VE(0.01, 200.0))
    back = converted(there, VP())
    a, b = (d(x, t, Context.of(4)) for d in (den, back))
    torch.testing.assert_close(a.at(0.6, 0.2), b.at(0.6, 0.2), rtol=1e-8, atol=1e-8)
    # score_VE(x) = alpha score_VP(alpha x)
    s = VE(0.01, 200.0).time(VP().coef(t).lam)
    alpha = VP().coef(t).alpha
    slope = there(x / alpha, s, Context.of(4)).view("score")
    torch.testing.assert_close(slope, alpha * a.view("score"), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("solver", ["ddim", "dpm-solver++", "dpm-solver++(order=3)"])
def test_flows_are_the_same_curves_in_both_coordinates(solver):
    mixture = oracles.GaussianMixture([[-1.0, 0.5], [1.2, -0.3]], [0.3, 0.6], [0.3, 0.7])
    vp, ve = VP(), VE(0.01, 200.0)
    lams = torch.linspace(-4.0, 4.0, 21, dtype=torch.float64).tolist()
    grid = {law: grids.fixed([law.time(lam) for lam in lams]) for law in (vp, ve)}
    x, alpha = normal(6, 2), vp.coef(vp.time(lams[0])).alpha
    den = mixture.denoiser(vp)
    runs = {
        law: trajectory(
            d, solvers.registry.make(solver), grid[law], 20, x=z, start=law.time(lams[0]), stop=law.time(lams[-1])
        )
        for law, d, z in ((vp, den, x), (ve, converted(den, ve), x / alpha))
    }
    for a, b in zip(runs[vp], runs[ve], strict=True):
        torch.testing.assert_close(a.x / vp.coef(a.t).alpha, b.x, rtol=1e-9, atol=1e-9)


def test_conversions_that_do_not_exist_are_refused():
    mixture = oracles.GaussianMixture([[0.0]], [1.0])
    with pytest.raises(InputError, match="noisier"):
        converted(mixture.denoiser(VE(0.01, 5.0)), VP())(torch.zeros(1, 1, dtype=torch.float64), 1.0, Context.of(1))
    with pytest.raises(InputError, match="without an anchor"):
        converted(mixture.denoiser(VP()), MeanReverting())
    assert math.isinf(VP().coef(0.0).lam)  # the clean end is one that all share
    post = converted(mixture.denoiser(VE()), VP())(torch.ones(1, 1, dtype=torch.float64), 0.0, Context.of(1))
    assert isinstance(post, Posterior) and float(post.mean) == 1.0


def test_a_converted_network_counts_its_calls_once():
    ctx = core.Context.of(3)
    converted(oracles.GaussianMixture([[0.0]], [1.0]).denoiser(VP()), VE())(torch.zeros(3, 1), 0.5, ctx)
    assert ctx.run.nfe == 1
