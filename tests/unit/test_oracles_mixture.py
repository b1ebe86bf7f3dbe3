"""Mixtures of whole Gaussians: against torch.distributions, their labels, and what a measurement leaves of them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from sfumato.core import Context, InputError
from sfumato.denoisers.mixtures import Mixture
from sfumato.denoisers.oracles import Gaussian, GaussianMixture
from sfumato.guidance import cfg
from sfumato.processes import DDPM, EDM, VE, VP, Cosine, Flow

PROCESSES = {"vp": VP(), "ve": VE(), "edm": EDM(), "flow": Flow(3.0), "cosine": Cosine(), "ddpm": DDPM()}
every_process = pytest.mark.parametrize("law", list(PROCESSES))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


MEANS, FACTORS = normal(4, 3, seed=1) * 2, normal(4, 3, 3, seed=2) / 2
COVS = FACTORS @ FACTORS.mT + 0.05 * torch.eye(3).double()
WEIGHTS = torch.tensor([0.1, 0.4, 0.3, 0.2]).double()
MIXTURE = Mixture([Gaussian(m, c) for m, c in zip(MEANS, COVS, strict=True)], WEIGHTS)
MATRIX, NOISE = normal(2, 3, seed=5), 0.4


def density(a: float, s: float, means: Tensor = MEANS, covs: Tensor = COVS, weights: Tensor = WEIGHTS) -> Any:
    """The law of a x0 + s eps."""
    spread = a**2 * covs + s**2 * torch.eye(covs.shape[-1]).double()
    return MixtureSameFamily(Categorical(weights), MultivariateNormal(a * means, spread))


@every_process
def test_the_belief_is_tweedies(law: str) -> None:
    """With one clock and with one an item, in float64 and, within its rounding, in float32."""
    process, denoiser = PROCESSES[law], MIXTURE.denoiser(PROCESSES[law])
    ts = torch.tensor([0.2, 0.5, 0.8, 0.99]).double()
    x = process.corrupt(MIXTURE.sample(4, seed=3), ts, Context.of(4, 1, dtype=torch.float64))[0]
    rows = denoiser(x, ts, Context.of(4, None))
    for i, t in enumerate(ts.tolist()):
        c, at = process.coef(t), x[i : i + 1].detach().requires_grad_()
        (score,) = torch.autograd.grad(density(c.alpha, c.sigma).log_prob(at).sum(), at)
        post = denoiser(at.detach(), t, Context.of(1, None))
        assert torch.allclose(post.view("score"), score, rtol=1e-7, atol=1e-8 * (1 + 1 / c.sigma))
        expected = (at.detach() + c.sigma**2 * score) / c.alpha
        assert torch.allclose(post.mean, expected, rtol=1e-7, atol=1e-7 * (1 + c.sigma / c.alpha))
        assert torch.allclose(rows.mean[i], post.mean[0]) and torch.allclose(rows.view("eps")[i], post.view("eps")[0])
        single = denoiser(at.detach().float(), t, Context.of(1, None))
        assert single.mean.dtype == torch.float32
        assert torch.allclose(single.mean.double(), post.mean, atol=1e-4 * (1 + float(post.mean.norm())))


def test_diagonal_covariances_are_the_mixture_of_independent_pixels() -> None:
    stds = normal(4, 3, seed=7).abs() + 0.1
    one = Mixture([Gaussian(m, s**2) for m, s in zip(MEANS, stds, strict=True)], WEIGHTS)
    other = GaussianMixture(MEANS, stds, WEIGHTS)
    x, c = normal(6, 3, seed=8), VP().coef(0.4)
    assert all(torch.allclose(a, b) for a, b in zip(one.belief(x, c), other.belief(x, c), strict=True))
    assert torch.allclose(one.log_prob(x), other.log_prob(x)) and torch.allclose(
        one.classify(x, c), other.classify(x, c)
    )


def test_density_covariances_and_draws() -> None:
    """Moments within 4.5 standard errors; item i is the same in every batch."""
    assert torch.allclose(MIXTURE.covariances, COVS)
    x = normal(9, 3, seed=8) * 2
    assert torch.allclose(MIXTURE.log_prob(x), density(1.0, 0.0).log_prob(x), rtol=1e-9)
    drawn, k = MIXTURE.sample_with_component(6000, seed=4)
    assert torch.equal(MIXTURE.sample(5, seed=4), drawn[:5])
    assert torch.allclose(torch.bincount(k, minlength=4) / 6000, WEIGHTS.float(), atol=0.03)
    mean = WEIGHTS @ MEANS
    cov = torch.einsum("k,kij->ij", WEIGHTS, COVS + MEANS[:, :, None] * MEANS[:, None]) - mean[:, None] * mean
    scale = cov.diag().sqrt()
    assert ((drawn.mean(0) - mean).abs() <= 4.5 * scale / math.sqrt(6000)).all()
    assert ((torch.cov(drawn.T) - cov).abs() <= 4.5 * 2 * scale[:, None] * scale / math.sqrt(6000)).all()
    assert torch.allclose(torch.cov(drawn[k == 1].T), COVS[1], atol=0.15 * float(COVS[1].diag().max()))


def test_a_label_is_one_component_and_guidance_extrapolates_its_score() -> None:
    process, t, x, label = VP(), 0.5, normal(5, 3, seed=9), torch.tensor([0, 1, 2, 3, 4])
    denoiser, c = MIXTURE.labelled(process), process.coef(0.5)
    own = [Gaussian(m, v).denoiser(process) for m, v in zip(MEANS, COVS, strict=True)] + [MIXTURE.denoiser(process)]
    each = torch.cat([d(x[i : i + 1], t, Context.of(1, None)).view("eps") for i, d in enumerate(own)])
    ctx = Context.of(5, None, cond={"label": label})
    assert torch.allclose(denoiser(x, t, ctx).view("eps"), each)
    whole = own[-1](x, t, Context.of(5, None)).view("eps")
    assert torch.allclose(cfg(3.0)(denoiser)(x, t, ctx).view("eps"), whole + 3 * (each - whole))
    assert c.sigma > 0 and ctx.run.nfe == 1 + 2
    for bad in ({}, {"label": 1}, {"label": label[:3]}):
        with pytest.raises(InputError, match="give cond"):
            denoiser(x, t, Context.of(5, None, cond=bad))


def test_the_posterior_of_a_measurement_is_bayes_rule() -> None:
    """log p(x0 | y) differs from log p(x0) + log p(y | x0) by a constant an item; its belief is Tweedie's again."""
    y = normal(6, 2, seed=10)
    posterior, process = MIXTURE.given(MATRIX, y, NOISE), VP()
    gaps = []
    for seed in (11, 12, 13):
        x = normal(6, 3, seed=seed)
        likelihood = -0.5 * ((y - x @ MATRIX.T) / NOISE).square().sum(-1)
        gaps.append(posterior.log_prob(x) - MIXTURE.log_prob(x) - likelihood)
    assert torch.allclose(gaps[0], gaps[1]) and torch.allclose(gaps[0], gaps[2])
    c, x = process.coef(0.4), normal(6, 3, seed=14)
    for i in range(6):
        law = density(c.alpha, c.sigma, posterior.means[i], posterior.covariances, posterior.log_weights[i].exp())
        at = x[i : i + 1].requires_grad_()
        (score,) = torch.autograd.grad(law.log_prob(at).sum(), at)
        eps = posterior.denoiser(process)(x.detach(), 0.4, Context.of(6, None)).view("eps")[i]
        assert torch.allclose(eps, -c.sigma * score[0], rtol=1e-7, atol=1e-8)


def test_two_measurements_are_one_and_draws_are_an_items_own() -> None:
    y = normal(4000, 2, seed=15)[:1].expand(4000, 2)
    both = MIXTURE.given(MATRIX, y, NOISE)
    chain = MIXTURE.given(MATRIX[:1], y[:, :1], NOISE).given(MATRIX[1:], y[:, 1:], NOISE)
    x = normal(4000, 3, seed=16)
    assert torch.allclose(both.log_prob(x), chain.log_prob(x), rtol=1e-8)
    drawn = both.sample(4000, seed=2)
    w = both.log_weights[0].exp()
    mean = w @ both.means[0]
    cov = (
        torch.einsum("k,kij->ij", w, both.covariances + both.means[0][:, :, None] * both.means[0][:, None])
        - mean[:, None] * mean
    )
    assert ((drawn.mean(0) - mean).abs() <= 4.5 * cov.diag().sqrt() / math.sqrt(4000)).all()


def test_a_shift_moves_the_density() -> None:
    x, by = normal(6, 3, seed=17), normal(6, 3, seed=18)
    assert torch.allclose(MIXTURE.shifted(by[0]).log_prob(x), MIXTURE.log_prob(x - by[0]))
    assert torch.allclose(MIXTURE.shifted(by).log_prob(x), MIXTURE.log_prob(x - by))
    posterior = MIXTURE.given(MATRIX, normal(6, 2, seed=10), NOISE)
    assert torch.allclose(posterior.shifted(by).log_prob(x), posterior.log_prob(x - by))


def test_the_ends_of_time() -> None:
    for dtype in (torch.float64, torch.float32):
        x = MIXTURE.sample(3, seed=2).to(dtype)
        now, noise = (MIXTURE.denoiser(Flow())(x, t, Context.of(3, None)) for t in (0.0, 1.0))
        assert torch.allclose(now.mean, x, atol=1e-4) and torch.allclose(noise.view("eps"), x)
        assert torch.allclose(noise.mean, (WEIGHTS @ MEANS).to(dtype).expand(3, 3), atol=1e-5)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Mixture([]),
        lambda: Mixture([Gaussian([0.0], 1.0), Gaussian([0.0, 1.0], 1.0)]),
        lambda: Mixture([Gaussian([0.0], 1.0)], [1.0, 1.0]),
        lambda: Mixture([Gaussian([0.0], 1.0)] * 2, [1.0, -1.0]),
        lambda: Mixture([Gaussian([0.0], 0.0)]).log_prob(torch.zeros(1, 1)),
        lambda: MIXTURE.given(MATRIX, normal(4, 3), NOISE),
        lambda: MIXTURE.given(MATRIX[:, :2], normal(4, 2), NOISE),
        lambda: MIXTURE.given(MATRIX, normal(4, 2), 0.0),
        lambda: MIXTURE.given(MATRIX, normal(4, 2), NOISE).log_prob(normal(3, 3)),
        lambda: MIXTURE.given(MATRIX, normal(4, 2), NOISE).sample(3),
        lambda: MIXTURE.log_prob(normal(2, 4)),
    ],
    ids=range(11),
)
def test_impossible_mixtures_are_refused(make: Any) -> None:
    with pytest.raises(InputError):
        make()
