"""Log densities along the probability flow against exact ones, and densities of stochastic equations on a grid."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sfumato as sf
from sfumato.core import InputError, linear
from sfumato.denoisers.interpolants import GaussianMixtureInterpolant
from sfumato.evaluation.likelihood import (
    bits_per_dimension,
    kl_of_errors,
    log_likelihood,
    plane_density,
    random_fields,
)
from sfumato.processes import DDPM, EDM, VE, VP, Affine, Cosine, Flow, Interpolant, MeanReverting, OrnsteinUhlenbeckVE

F64 = torch.float64
FLOWS = {"flow": Flow(), "flow-shift-3": Flow(3.0), "cosine": Cosine(), "ddpm-cosine": DDPM("cosine")}
LAWS = {
    **FLOWS, "vp": VP(), "ve": VE(), "edm": EDM(), "ddpm-linear": DDPM(), "mean-reverting": MeanReverting(),
    "ou-ve": OrnsteinUhlenbeckVE(),
}  # fmt: skip


def gaussian() -> sf.oracles.Gaussian:
    root = torch.tensor([[0.9, 0.0, 0.0], [0.3, 0.4, 0.0], [-0.2, 0.1, 0.3]], dtype=F64)
    return sf.oracles.Gaussian([0.5, -1.0, 0.2], root @ root.T)


def mixture() -> sf.oracles.GaussianMixture:
    return sf.oracles.GaussianMixture(
        [[-1.2, 0.3], [0.9, 0.9], [0.5, -1.1]], [[0.35, 0.2], [0.25, 0.45], [0.5, 0.3]], [0.5, 0.3, 0.2]
    )


def marginal(distribution: Any, law: Any, t: float) -> Any:
    """The exact law of alpha x0 + sigma eps."""
    c = law.coef(t)
    if isinstance(distribution, sf.oracles.GaussianMixture):
        stds = (c.alpha**2 * distribution.variances + c.sigma**2).sqrt()
        return sf.oracles.GaussianMixture(c.alpha * distribution.means, stds, distribution.weights)
    v = distribution.basis @ torch.diag(c.alpha**2 * distribution.variances + c.sigma**2) @ distribution.basis.T
    return sf.oracles.Gaussian(c.alpha * distribution.mean, v)


@pytest.mark.parametrize("make", [gaussian, mixture])
@pytest.mark.parametrize("name", list(FLOWS))
def test_where_nothing_is_left_of_the_data_the_density_is_exact(name: str, make: Any) -> None:
    x = make().sample(30, 1)
    errors = [
        (log_likelihood(make().denoiser(LAWS[name]), x, steps=n) - make().log_prob(x)).abs() for n in (50, 100, 200)
    ]
    assert errors[2].max() < 1e-3
    if name != "ddpm-cosine":  # its angle is linear between table points
        assert errors[0].median() / errors[1].median() == pytest.approx(4.0, rel=0.25)  # order 2


@pytest.mark.parametrize("make", [gaussian, mixture])
@pytest.mark.parametrize("name", [n for n in LAWS if n not in FLOWS])
def test_from_the_exact_far_end_every_law_is_exact(name: str, make: Any) -> None:
    law, x = LAWS[name], make().sample(30, 1)
    cond = {"anchor": torch.full_like(x, 0.7)} if isinstance(law, Affine) else {}
    far, anchor = marginal(make(), law, 1.0), law.anchor(1.0, cond)
    base = lambda v: far.log_prob(linear(1.0, v, -1.0, anchor))  # noqa: E731
    found = log_likelihood(make().denoiser(law), x, steps=200, base=base, cond=cond)
    assert (found - make().log_prob(x)).abs().max() < 1e-3


def test_the_prior_is_the_one_that_samples_start_from() -> None:
    """VP and VE leave a little of the data at t = 1; the density is that of the sampler, within that little."""
    x = mixture().sample(40, 1)
    for law in (VP(), VE(), EDM()):
        assert (log_likelihood(mixture().denoiser(law), x, steps=200) - mixture().log_prob(x)).abs().median() < 2e-2
    law, x1 = MeanReverting(std=1.0), torch.full_like(x, 0.7)
    far = torch.distributions.Normal(x1, law.coef(1.0).sigma)
    options: dict[str, Any] = {"steps": 60, "cond": {"anchor": x1}}
    ours = log_likelihood(mixture().denoiser(law), x, **options)
    given = log_likelihood(mixture().denoiser(law), x, base=lambda v: far.log_prob(v).sum(1), **options)
    torch.testing.assert_close(ours, given, rtol=1e-12, atol=1e-12)


def test_a_later_start_gives_the_density_of_that_marginal() -> None:
    law, t = Flow(), 0.3
    exact = marginal(mixture(), law, t)
    x = exact.sample(30, 2)
    found = log_likelihood(mixture().denoiser(law), x, steps=200, start=t)
    assert (found - exact.log_prob(x)).abs().max() < 1e-3


@pytest.mark.parametrize("path", ["linear", "trigonometric", "encoding-decoding"])
def test_interpolants_carry_one_density_into_the_other(path: str) -> None:
    base = sf.oracles.GaussianMixture([[0.5, 0.0], [-1.0, -1.0]], [[0.6, 0.4], [0.4, 0.7]])
    denoiser = GaussianMixtureInterpolant(mixture(), base).denoiser(Interpolant(path, "sine-squared", 0.8))
    x = mixture().sample(30, 1)
    assert (log_likelihood(denoiser, x, steps=300, base=base.log_prob) - mixture().log_prob(x)).abs().max() < 1.5e-3
    with pytest.raises(InputError, match="base="):
        log_likelihood(denoiser, x, steps=3)


# ------------------------------------------------------------------ the estimate


def test_hutchinson_is_unbiased() -> None:
    denoiser, x, n = mixture().denoiser(Flow()), mixture().sample(1, 1), 3000
    exact = log_likelihood(denoiser, x, steps=12)
    drawn = log_likelihood(denoiser, x.expand(n, 2), steps=12, divergence="hutchinson")
    assert abs(float(drawn.mean() - exact)) < 4 * float(drawn.std()) / n**0.5
    more = log_likelihood(denoiser, x.expand(500, 2), steps=12, divergence="hutchinson", probes=4)
    assert float(more.std()) == pytest.approx(float(drawn.std()) / 2, rel=0.15)


def test_signs_find_a_diagonal_jacobian_exactly() -> None:
    diagonal = sf.oracles.Gaussian([0.5, -1.0], torch.tensor([0.8, 0.1]))
    x = diagonal.sample(10, 1)
    pair = [log_likelihood(diagonal.denoiser(VP()), x, steps=30, divergence=d) for d in ("exact", "hutchinson")]
    torch.testing.assert_close(*pair, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
def test_an_item_does_not_depend_on_its_batch(divergence: str) -> None:
    denoiser, x = mixture().denoiser(VP()), mixture().sample(8, 1)
    whole = log_likelihood(denoiser, x, steps=10, divergence=divergence, seed=3)
    torch.testing.assert_close(log_likelihood(denoiser, x[:3], steps=10, divergence=divergence, seed=3), whole[:3])


def test_networks_of_every_kind_and_shape() -> None:
    """A network on images in float32; its density integrates what it says, whichever reading it was taught."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(1, 1, 3, padding=1)

        def forward(self, x: Tensor, label: Tensor, strength: Tensor) -> Tensor:
            return torch.tanh(self.layer(x)) * strength[:, None, None, None]

    torch.manual_seed(0)
    net, x = Net(), torch.randn(3, 1, 4, 4)
    cond = {"strength": torch.tensor([0.1, 0.5, 1.0])}
    for predicts in ("v", "flow"):
        found = log_likelihood(sf.parametrized(net, Flow(), predicts), x, steps=20, cond=cond)
        assert found.dtype == F64 and found.shape == (3,) and bool(found.isfinite().all()) and not found.requires_grad
    with torch.no_grad():  # the caller's gradient mode does not matter
        again = log_likelihood(sf.parametrized(net, Flow(), "flow"), x, steps=20, cond=cond)
    assert torch.equal(found, again) and net.layer.weight.grad is None
    with pytest.raises(InputError, match="alpha = 0"):
        log_likelihood(sf.parametrized(net, Flow(), "eps"), x, steps=20, cond=cond)


def test_bits_per_dimension() -> None:
    """Bytes at random cost 8 bits, minus the outermost half bins that [-1, 1] cuts off."""
    uniform = torch.full((2,), 12 * math.log(0.5), dtype=F64)
    torch.testing.assert_close(bits_per_dimension(uniform, (3, 2, 2)), torch.full((2,), math.log2(255), dtype=F64))
    assert float(bits_per_dimension(torch.zeros(()), (5,), width=1 / 4)) == 2
    with pytest.raises(InputError):
        bits_per_dimension(uniform, (3,), width=0.0)


@pytest.mark.parametrize("wrong", [{"divergence": "some"}, {"probes": 0}, {"steps": 0}, {"start": 1.0}])
def test_wrong_words_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        log_likelihood(mixture().denoiser(VP()), mixture().sample(2), **wrong)
    with pytest.raises(InputError, match="floating"):
        log_likelihood(mixture().denoiser(VP()), torch.zeros(2, 2, dtype=torch.int64))


# ------------------------------------------------------------------ densities on a grid


def test_an_ornstein_uhlenbeck_density_in_the_plane() -> None:
    """dx = (2 (c - x)) dr + sqrt(0.8) dw: normal with mean c + (m - c) exp(-2), variance 0.2 + (v - 0.2) exp(-4)."""
    c, m, v = torch.tensor([1.0, -0.5], dtype=F64), torch.tensor([-0.5, 0.5], dtype=F64), 0.5
    start = torch.distributions.MultivariateNormal(m, v * torch.eye(2, dtype=F64))
    mean, variance = c + (m - c) * math.exp(-2), 0.2 + (v - 0.2) * math.exp(-4)
    end, errors = torch.distributions.MultivariateNormal(mean, variance * torch.eye(2, dtype=F64)), []
    for cells, steps in ((32, 80), (64, 250)):
        points, found = plane_density(
            lambda x, r: 2 * (c - x), 0.4, lambda x: start.log_prob(x).exp(), half_width=4.0, cells=cells, steps=steps
        )
        area = (8 / cells) ** 2
        assert found.shape == (1, cells**2) and bool((found >= 0).all())
        assert float(found.sum() * area) == pytest.approx(1, abs=1e-4)
        errors.append(float((found[0] - end.log_prob(points).exp()).abs().sum() * area))
    assert errors[1] < 0.015 and errors[0] / errors[1] > 3  # of second order in the cells
    with pytest.raises(InputError, match="too few"):
        plane_density(
            lambda x, r: 2 * (c - x), 0.4, lambda x: start.log_prob(x).exp(), half_width=4.0, cells=48, steps=10
        )
    with pytest.raises(InputError, match="diffusion"):
        plane_density(lambda x, r: -x, 0.0, lambda x: start.log_prob(x).exp(), half_width=4.0)


def test_random_fields_have_the_size_they_say() -> None:
    x = torch.rand(4000, 2, dtype=F64, generator=torch.Generator().manual_seed(0)) * 60 - 30
    fields = random_fields(6, 0.7, seed=3)(x)
    assert fields.shape == (6, 4000, 2)
    torch.testing.assert_close(
        fields.square().sum(2).mean(1).sqrt(), torch.full((6,), 0.7, dtype=F64), rtol=0.05, atol=0
    )
    torch.testing.assert_close(fields[:, :5], random_fields(6, 0.7, seed=3)(x[:5]))


def test_the_divergence_that_errors_cause_is_the_exact_one_and_below_its_bounds() -> None:
    """A constant error of the velocity between two round normals moves the mean and nothing else."""
    data, base = sf.oracles.GaussianMixture([[0.5, 0.0]], [0.7]), sf.oracles.GaussianMixture([[-0.5, 0.3]], [0.9])
    m, law, epsilon = GaussianMixtureInterpolant(data, base), Interpolant("linear", "quadratic"), 0.5
    push = torch.tensor([0.6, -0.8], dtype=F64)
    errors = lambda x: push.expand(1, len(x), 2), lambda x: torch.zeros(1, len(x), 2, dtype=F64)  # noqa: E731
    kl, bound, split = kl_of_errors(m, law, errors, epsilon, half_width=4.0, cells=48, steps=200)
    shift, n = 0.0, 20000
    for i in range(n):  # the error of the mean: d' = (-b' - epsilon / v) d - 1 in units of the push
        t = 1 - (i + 0.5) / n
        c = law.at(t)
        v = (c.alpha * 0.7) ** 2 + (c.beta * 0.9) ** 2 + c.gamma**2
        dv = c.alpha * c.dalpha * 0.49 + c.beta * c.dbeta * 0.81 + c.product
        shift += ((-dv / v - epsilon / v) * shift - 1) / n
    assert float(kl) == pytest.approx(shift**2 / (2 * 0.49), rel=0.02)
    assert float(bound) == pytest.approx(1 / (4 * epsilon), rel=1e-3)
    assert float(kl) < float(bound) < float(split) == pytest.approx(1 / (2 * epsilon), rel=1e-3)
