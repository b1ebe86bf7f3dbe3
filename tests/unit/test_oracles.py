"""Exact beliefs against independent densities: Tweedie's formula by automatic differentiation, moments, log densities."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, MultivariateNormal
from torch.distributions import Normal as Univariate

from sfumato import oracles
from sfumato.core import Context, InputError
from sfumato.processes import DDPM, EDM, VE, VP, Cosine, Flow

PROCESSES = {"vp": VP(), "ve": VE(), "edm": EDM(), "flow": Flow(3.0), "cosine": Cosine(), "ddpm": DDPM()}
every_process = pytest.mark.parametrize("law", list(PROCESSES))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


MEAN = torch.tensor([0.5, -1.0, 0.2]).double()
FACTOR = normal(3, 3, seed=3) / 2
COV = FACTOR @ FACTOR.T + 0.05 * torch.eye(3).double()
MEANS, STDS = normal(4, 3, seed=1) * 2, normal(4, 3, seed=2).abs() / 2 + 0.1
WEIGHTS = torch.tensor([0.1, 0.4, 0.3, 0.2]).double()
DATA = normal(40, 3, seed=5)
BASIS = torch.linalg.qr(normal(5, 2, seed=6)).Q


@cache
def made(name: str) -> oracles.Distribution:
    return {
        "gaussian": lambda: oracles.Gaussian(MEAN, COV),
        "low-rank": lambda: oracles.Gaussian.low_rank(MEAN, FACTOR[:, :1], noise=0.2),
        "degenerate": lambda: oracles.Gaussian.low_rank(MEAN, FACTOR[:, :1]),
        "mixture": lambda: oracles.GaussianMixture(MEANS, STDS, WEIGHTS),
        "points": lambda: oracles.GaussianMixture(MEANS, torch.zeros(4), WEIGHTS),
        "empirical": lambda: oracles.Empirical(DATA, chunk=7),
        "blurred": lambda: oracles.Empirical(DATA, std=0.3),
        "subspace": lambda: oracles.LinearSubspace(BASIS, oracles.GaussianMixture(MEANS[:, :2], STDS[:, :2], WEIGHTS)),
    }[name]()


def marginal(name: str, x: Tensor, a: float, s: float) -> Tensor:
    """log p(a x0 + s eps), (B,), written by torch.distributions."""
    eye = torch.eye(3).double()

    def mixture(means: Tensor, stds: Tensor, weights: Tensor) -> Any:
        parts = Independent(Univariate(a * means, (a**2 * stds**2 + s**2).sqrt()), 1)
        return MixtureSameFamily(Categorical(weights), parts)

    match name:
        case "gaussian":
            return MultivariateNormal(a * MEAN, a**2 * COV + s**2 * eye).log_prob(x)
        case "low-rank" | "degenerate":
            f, noise = FACTOR[:, :1], 0.2 if name == "low-rank" else 0.0
            return MultivariateNormal(a * MEAN, a**2 * (f @ f.T + noise**2 * eye) + s**2 * eye).log_prob(x)
        case "mixture":
            return mixture(MEANS, STDS, WEIGHTS).log_prob(x)
        case "points":
            return mixture(MEANS, torch.zeros(4, 3).double(), WEIGHTS).log_prob(x)
        case "empirical" | "blurred":
            std = torch.full_like(DATA, 0.3 if name == "blurred" else 0.0)
            return mixture(DATA, std, torch.ones(len(DATA)).double()).log_prob(x)
    inside = mixture(MEANS[:, :2], STDS[:, :2], WEIGHTS).log_prob(x @ BASIS)
    off = x - x @ BASIS @ BASIS.T
    return inside - (off**2).sum(-1) / (2 * s**2) - 3 * math.log(s * math.sqrt(2 * math.pi))


ALL = ["gaussian", "low-rank", "degenerate", "mixture", "points", "empirical", "blurred", "subspace"]
DENSE = ["gaussian", "low-rank", "mixture", "blurred"]


@every_process
@pytest.mark.parametrize("name", ALL)
def test_the_belief_is_tweedies(name: str, law: str) -> None:
    """alpha E[x0 | x] = x + sigma^2 grad log p_t(x), and E[eps | x] = -sigma grad log p_t(x), as one clock and one an item."""
    process, distribution = PROCESSES[law], made(name)
    denoiser, ts = distribution.denoiser(process), torch.tensor([0.2, 0.5, 0.8, 0.99]).double()
    x0 = distribution.sample(4, seed=3)
    x = process.corrupt(x0, ts, Context.of(4, 1, dtype=torch.float64))[0]
    rows = denoiser(x, ts, Context.of(4, None))
    for i, t in enumerate(ts.tolist()):
        c = process.coef(t)
        at = x[i : i + 1].detach().requires_grad_()
        (score,) = torch.autograd.grad(marginal(name, at, c.alpha, c.sigma).sum(), at)
        post = denoiser(x[i : i + 1], t, Context.of(1, None))
        expected = (at.detach() + c.sigma**2 * score) / c.alpha
        assert torch.allclose(post.mean, expected, rtol=1e-6, atol=1e-6 * (1 + c.sigma / c.alpha))
        assert torch.allclose(post.view("score"), score, rtol=1e-6, atol=1e-7 * (1 + 1 / c.sigma))
        assert torch.allclose(rows.mean[i], post.mean[0], rtol=1e-8, atol=1e-8)
        assert torch.allclose(rows.view("eps")[i], post.view("eps")[0], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", DENSE)
def test_log_density(name: str) -> None:
    x = normal(9, 3, seed=8) * 2
    assert torch.allclose(made(name).log_prob(x), marginal(name, x, 1.0, 0.0), rtol=1e-9)


def test_log_density_against_scipy() -> None:
    from scipy.stats import multivariate_normal

    x = normal(5, 3, seed=8)
    expected = multivariate_normal(MEAN.numpy(), COV.numpy()).logpdf(x.numpy())
    assert torch.allclose(made("gaussian").log_prob(x), torch.from_numpy(expected))


@pytest.mark.parametrize("name", ["degenerate", "points", "empirical"])
def test_what_has_no_density_says_so(name: str) -> None:
    with pytest.raises(InputError, match="no density"):
        made(name).log_prob(normal(2, 3))


def test_density_on_a_subspace() -> None:
    subspace = made("subspace")
    z = normal(4, 2, seed=9)
    inside = subspace.log_prob(z @ BASIS.T)
    assert torch.allclose(inside, oracles.GaussianMixture(MEANS[:, :2], STDS[:, :2], WEIGHTS).log_prob(z))
    assert subspace.log_prob(z @ BASIS.T + 0.1 * normal(4, 5)).eq(-math.inf).all()


@pytest.mark.parametrize("name", ALL)
def test_draws_have_the_right_moments(name: str) -> None:
    """Mean and covariance within 4.5 standard errors, from the formulas."""
    n, distribution = 6000, made(name)
    x = distribution.sample(n, seed=4)
    mixing = {"mixture": (MEANS, STDS), "points": (MEANS, 0 * STDS)}
    if name in mixing:
        m, s = mixing[name]
        mean = WEIGHTS @ m
        cov = (m * WEIGHTS[:, None]).T @ m + torch.diag(WEIGHTS @ s**2) - mean[:, None] * mean
    elif name in ("empirical", "blurred"):
        mean, cov = DATA.mean(0), torch.cov(DATA.T, correction=0) + (0.09 if name == "blurred" else 0) * torch.eye(3)
    elif name == "subspace":
        m, s = MEANS[:, :2], STDS[:, :2]
        centre = WEIGHTS @ m
        inside = (m * WEIGHTS[:, None]).T @ m + torch.diag(WEIGHTS @ s**2) - centre[:, None] * centre
        mean, cov = centre @ BASIS.T, BASIS @ inside @ BASIS.T
    else:
        f = FACTOR[:, :1]
        mean = MEAN
        cov = {"gaussian": COV, "low-rank": f @ f.T + 0.04 * torch.eye(3), "degenerate": f @ f.T}[name]
    scale = cov.diag().sqrt()
    assert ((x.mean(0) - mean).abs() <= 4.5 * scale / math.sqrt(n) + 1e-12).all()
    assert ((torch.cov(x.T) - cov).abs() <= 4.5 * 2 * scale[:, None] * scale / math.sqrt(n) + 1e-12).all()
    assert torch.equal(distribution.sample(5, seed=4), x[:5]), "item i is the same in every batch"
    assert not torch.equal(distribution.sample(5, seed=5), x[:5])


def test_draws_know_their_component() -> None:
    x, k = made("mixture").sample_with_component(4000, seed=1)  # type: ignore[attr-defined]
    assert torch.allclose(torch.bincount(k, minlength=4) / 4000, WEIGHTS.float(), atol=0.035)
    for j in range(4):
        assert torch.allclose(
            x[k == j].mean(0), MEANS[j], atol=float(5 * STDS[j].max() / math.sqrt(int((k == j).sum())))
        )
    share = made("mixture").classify(x, VP().coef(0.0)).exp()  # type: ignore[attr-defined]
    assert torch.allclose(share.sum(-1), torch.ones(4000).double())
    logs = Independent(Univariate(MEANS, STDS), 1).log_prob(x[:, None]) + WEIGHTS.log()
    assert torch.allclose(share, logs.softmax(-1), atol=1e-9)


@every_process
def test_the_transport_of_a_gaussian_is_its_probability_flow(law: str) -> None:
    """It carries one marginal to the other, composes, and moves with the flow that the belief says."""
    process, g = PROCESSES[law], made("gaussian")
    assert isinstance(g, oracles.Gaussian)
    a, b, c = (process.coef(t) for t in (0.9, 0.5, 0.2))
    x = normal(6, 3)
    assert torch.allclose(g.transport(g.transport(x, a, b), b, c), g.transport(x, a, c), rtol=1e-9, atol=1e-9)
    assert torch.allclose(g.transport(g.transport(x, a, c), c, a), x, rtol=1e-9, atol=1e-9)
    corners = torch.cat([torch.zeros(1, 3), torch.eye(3)]).double()
    y = g.transport(corners, a, c)
    push = y[1:] - y[0]
    start, end = (v.alpha**2 * COV + v.sigma**2 * torch.eye(3).double() for v in (a, c))
    assert torch.allclose(push.T @ start @ push, end, rtol=1e-8, atol=1e-8)
    t, h = 0.5137, 1e-6
    near, far = (g.transport(x, process.coef(t), process.coef(t + d)) for d in (-h, h))
    flow = g.denoiser(process)(x, t, Context.of(6, None)).view("flow")
    assert torch.allclose((far - near) / (2 * h), flow, rtol=1e-5, atol=1e-6)


def test_a_subspace_of_a_gaussian_is_a_degenerate_gaussian() -> None:
    latent = oracles.Gaussian(MEAN[:2], COV[:2, :2])
    subspace = oracles.LinearSubspace(BASIS, latent)
    whole = oracles.Gaussian(BASIS @ MEAN[:2], BASIS @ COV[:2, :2] @ BASIS.T)
    for process in PROCESSES.values():
        for t in (0.2, 0.6, 1.0):
            x = normal(4, 5) * 2
            one, other = (d.denoiser(process)(x, t, Context.of(4, None)) for d in (subspace, whole))
            assert torch.allclose(one.mean, other.mean, rtol=1e-7, atol=1e-7)
            assert torch.allclose(one.view("eps"), other.view("eps"), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("chunk", [1, 7, 39, 40, 1000])
def test_chunks_never_matter(chunk: int) -> None:
    x, c = normal(5, 3), VP().coef(0.3)
    for std in (0.0, 0.3):
        one, other = (oracles.Empirical(DATA, std=std, chunk=k).belief(x, c) for k in (4096, chunk))
        assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-12) for a, b in zip(one, other, strict=True))
    blurred = [oracles.Empirical(DATA, std=0.3, chunk=k).log_prob(x) for k in (4096, chunk)]
    assert torch.allclose(*blurred, rtol=1e-12)


def test_ten_thousand_images() -> None:
    """Data of any shape and size: at low noise the belief is the image the state came from."""
    images = normal(10_000, 3, 4, 4).float()
    oracle = oracles.Empirical(images)
    x, _ = Flow().corrupt(oracle.data[[5, 9999]], 0.05, Context.of(2, 0, dtype=torch.float64))
    post = oracle.denoiser(Flow())(x, 0.05, Context.of(2, None))
    assert post.mean.shape == (2, 3, 4, 4)
    assert torch.allclose(post.mean, images[[5, 9999]].double(), atol=1e-4)
    far = oracle.denoiser(Flow())(x, 1.0, Context.of(2, None)).mean
    assert torch.allclose(far, oracle.data.mean(0).expand(2, 3, 4, 4), atol=1e-9)


@pytest.mark.parametrize("name", ALL)
def test_the_ends_of_time(name: str) -> None:
    """At sigma = 0 the belief is the state, at alpha = 0 it is the mean of the data, for one clock and one an item."""
    distribution, process = made(name), Flow()
    x = distribution.sample(3, seed=2)
    for dtype in (torch.float64, torch.float32):
        now = distribution.denoiser(process)(x.to(dtype), 0.0, Context.of(3, None))
        assert torch.allclose(now.mean, x.to(dtype)) and torch.allclose(
            now.view("eps"), torch.zeros_like(now.x), atol=1e-5
        )
        noise = distribution.denoiser(process)(x.to(dtype), 1.0, Context.of(3, None))
        assert torch.allclose(noise.view("eps"), x.to(dtype))
        assert torch.allclose(noise.mean, noise.mean[:1].expand_as(noise.mean), atol=1e-6)
        both = distribution.denoiser(process)(x.to(dtype), torch.tensor([0.0, 1.0, 0.0]), Context.of(3, None))
        assert torch.allclose(both.mean[[0, 2]], now.mean[[0, 2]], atol=1e-6)
        assert torch.allclose(both.mean[1], noise.mean[1], atol=1e-6)


@every_process
@pytest.mark.parametrize("name", ALL)
def test_beliefs_follow_the_dtype_of_the_state(name: str, law: str) -> None:
    """The median item is within twenty roundings of what it is in float64."""
    process, distribution = PROCESSES[law], made(name)
    for t in (0.35, 0.7, 1.0):
        x, _ = process.corrupt(distribution.sample(64, seed=3), t, Context.of(64, 1, dtype=torch.float64))
        exact = distribution.denoiser(process)(x, t, Context.of(64, None)).mean
        for dtype in (torch.float32, torch.bfloat16):
            y = distribution.denoiser(process)(x.to(dtype), t, Context.of(64, None)).mean
            assert y.dtype == dtype
            error = (y.double() - exact).norm(dim=-1) / exact.norm(dim=-1).clamp(min=1.0)
            assert error.median() < 20 * torch.finfo(dtype).eps


@pytest.mark.parametrize(
    "make",
    [
        lambda: oracles.Gaussian([[0.0]], 1.0),
        lambda: oracles.Gaussian([0.0, 0.0], [[1.0, 0.5], [0.0, 1.0]]),
        lambda: oracles.Gaussian([0.0, 0.0], [[1.0, 2.0], [2.0, 1.0]]),
        lambda: oracles.Gaussian([0.0, 0.0], -1.0),
        lambda: oracles.Gaussian([0.0, 0.0], torch.eye(3)),
        lambda: oracles.GaussianMixture([0.0, 1.0], [1.0, 1.0]),
        lambda: oracles.GaussianMixture([[0.0], [1.0]], [1.0]),
        lambda: oracles.GaussianMixture([[0.0], [1.0]], [1.0, -1.0]),
        lambda: oracles.GaussianMixture([[0.0], [1.0]], [1.0, 1.0], [1.0]),
        lambda: oracles.GaussianMixture([[0.0], [1.0]], [1.0, 1.0], [0.0, 0.0]),
        lambda: oracles.GaussianMixture([[0.0], [1.0]], [1.0, 1.0], [2.0, -1.0]),
        lambda: oracles.Empirical(torch.empty(0, 3)),
        lambda: oracles.Empirical(torch.ones(3)),
        lambda: oracles.Empirical(torch.ones(3, 2), std=-1.0),
        lambda: oracles.LinearSubspace(torch.ones(3, 2), oracles.Gaussian([0.0, 0.0], 1.0)),
        lambda: oracles.LinearSubspace(torch.eye(3), oracles.Gaussian([0.0, 0.0], 1.0)),
        lambda: oracles.LinearSubspace(torch.ones(3), oracles.Gaussian([0.0], 1.0)),
    ],
)
def test_impossible_distributions_are_refused(make: Any) -> None:
    with pytest.raises(InputError):
        make()


def test_states_of_another_shape_or_of_whole_numbers_are_refused() -> None:
    for name in ("gaussian", "mixture", "empirical", "subspace"):
        for bad in (normal(2, 4), normal(2, 3, 1), normal(2)):
            with pytest.raises(InputError, match="this distribution lives on"):
                made(name).denoiser(VP())(bad, 0.5, Context.of(2, None))
        whole = torch.ones(2, *made(name).shape, dtype=torch.int64)
        with pytest.raises(InputError, match="floating point"):
            made(name).denoiser(VP())(whole, 0.5, Context.of(2, None))
