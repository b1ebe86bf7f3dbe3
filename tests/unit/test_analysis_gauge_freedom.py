"""Conservative and gauge components, flows with their Jacobians, and the dimension of the data, on exact fields."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import sfumato as sf
from sfumato.analysis.gauge_freedom import (
    asymmetry,
    decompose,
    flow_jacobian,
    flow_log_density,
    gauge,
    gauge_residual,
    intrinsic_dimension,
    largest_gap,
    local_pca_dimension,
    maximum_likelihood_dimension,
    moved_picture,
    perturbed,
    score_jacobian,
    swirl,
)
from sfumato.core import InputError
from sfumato.evaluation.likelihood import log_likelihood
from sfumato.evaluation.metrics import sliced_wasserstein
from sfumato.processes import VP, Flow

F64 = torch.float64
TURN = [[0.0, 1.0], [-1.0, 0.0]]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def mixture() -> sf.oracles.GaussianMixture:
    return sf.oracles.GaussianMixture(
        [[-1.2, 0.3], [0.9, 0.9], [0.5, -1.1]], [[0.35, 0.2], [0.25, 0.45], [0.5, 0.3]], [5, 3, 2]
    )


def at(t: float) -> sf.oracles.GaussianMixture:
    c, m = VP().coef(t), mixture()
    return sf.oracles.GaussianMixture(c.alpha * m.means, (c.alpha**2 * m.variances + c.sigma**2).sqrt(), m.weights)


def gaussian(variances: list[float], seed: int = 0) -> sf.oracles.Gaussian:
    q = torch.linalg.qr(normal(len(variances), len(variances), seed=seed)).Q
    return sf.oracles.Gaussian(torch.zeros(len(variances)), q @ torch.diag(torch.tensor(variances, dtype=F64)) @ q.T)


def test_the_jacobian_of_a_gaussian_score_is_its_precision() -> None:
    law, g, t = VP(), gaussian([1.5, 0.3, 0.04]), 0.3
    c = law.coef(t)
    cov = g.basis @ torch.diag(c.alpha**2 * g.variances + c.sigma**2) @ g.basis.T
    found = score_jacobian(g.denoiser(law), normal(5, 3), t)
    assert torch.allclose(found, -torch.linalg.inv(cov).expand(5, 3, 3))


def test_the_asymmetry_of_a_rotated_field_is_known() -> None:
    """J = H + c Omega H with symmetric H: J - J^T = c (Omega H + H Omega), 2 c |H| where H is a multiple of 1."""
    x = normal(8, 2)
    exact = mixture().denoiser(VP())
    assert asymmetry(exact, x, 0.2).max() < 1e-12
    unit = sf.oracles.Gaussian([0.0, 0.0], 1.0).denoiser(VP())
    for scale in (0.5, 3.0):
        expected = 2 * scale / math.sqrt(1 + scale**2)
        assert torch.allclose(asymmetry(gauge(TURN, scale)(unit), x, 0.2), torch.full((8,), expected, dtype=F64))
    h, omega = score_jacobian(exact, x, 0.2), torch.tensor(TURN, dtype=F64)
    expected = (omega @ h + h @ omega).flatten(1).norm(dim=1) / (h + omega @ h).flatten(1).norm(dim=1)
    assert torch.allclose(asymmetry(gauge(TURN)(exact), x, 0.2), expected)


def test_probes_estimate_the_asymmetry() -> None:
    turned, x = gauge(TURN, 2.0)(mixture().denoiser(VP())), normal(6, 2)
    exact, estimate = asymmetry(turned, x, 0.3), asymmetry(turned, x, 0.3, probes=200)
    assert torch.allclose(estimate, exact, rtol=0.2)
    assert asymmetry(mixture().denoiser(VP()), x, 0.3, probes=3).max() < 1e-12


def test_a_gauge_satisfies_its_condition_and_another_error_does_not() -> None:
    exact, x = mixture().denoiser(VP()), at(0.2).sample(50, 1)
    assert gauge_residual(gauge(TURN, 5.0)(exact), exact, x, 0.2).abs().max() < 1e-9
    hotter = perturbed(lambda x, t, score: score, 0.1)(exact)
    assert gauge_residual(hotter, exact, x, 0.2).abs().median() > 0.1
    unit = sf.oracles.Gaussian([0.0, 0.0, 0.0], [1.0, 1.0, 1e-4]).denoiser(VP())
    turned = swirl(lambda rho, t: torch.sin(3 * rho))(unit)
    assert gauge_residual(turned, unit, normal(50, 3), 0.2).abs().max() < 1e-9
    assert asymmetry(turned, normal(50, 3), 0.9).min() > 0.02


def test_the_decomposition_finds_the_gauge_that_was_added() -> None:
    """The parts of S* + c Omega S* are S* and c Omega S*, of shares 1 and c^2; a wrong gradient has no gauge part."""
    t, exact = 0.4, mixture().denoiser(VP())
    x = at(t).sample(3000, 2)
    floor = decompose(exact, x, t).fraction
    assert floor < 1e-3
    found = decompose(gauge(TURN, 0.5)(exact), x, t)
    assert found.fraction == pytest.approx(0.25 / 1.25, rel=0.1)
    score = decompose(exact, x, t)
    true = score.conservative + score.gauge
    assert ((found.conservative - true).square().mean() / true.square().mean()).sqrt() < 0.1
    assert (found.conservative * found.gauge).sum(1).mean().abs() < 0.02 * true.square().sum(1).mean()  # orthogonal
    assert decompose(perturbed(lambda x, t, s: s, 0.5)(exact), x, t).fraction == pytest.approx(floor, rel=1e-6)


def test_sampling_and_density_are_exact_with_a_gauge_and_wrong_with_as_large_a_gradient() -> None:
    law, t = VP(), 1e-2
    exact, truth = mixture().denoiser(law), at(t)
    turned, wrong = gauge(TURN)(exact), perturbed(lambda x, t, s: s)(exact)
    run = {"steps": 100, "x": at(1.0).sample(2000, 3), "stop": t, "solver": "heun", "grid": "quadratic"}
    reference = truth.sample(2000, 9)
    floors = [sliced_wasserstein(truth.sample(2000, k), reference).value for k in (5, 6, 7, 8)]
    assert sliced_wasserstein(sf.sample(turned, **run), reference).value < 1.2 * max(floors)
    assert sliced_wasserstein(sf.sample(wrong, **run), reference).value > 3 * max(floors)
    x, solver = truth.sample(20, 4), sf.solvers.get("dpm-solver-3")
    error = {
        k: flow_log_density(d, x, t=t, steps=100, solver=solver, base=at(1.0).log_prob) - truth.log_prob(x)
        for k, d in (("turned", turned), ("wrong", wrong))
    }
    assert error["turned"].abs().mean() < 2e-3
    assert error["wrong"].abs().mean() > 0.1
    few = x[:6]
    ours = flow_log_density(exact, few, t=t, steps=60, solver=solver)
    theirs = log_likelihood(exact, few, steps=100, start=t)
    assert torch.allclose(ours, theirs, atol=5e-3)


def test_the_jacobian_of_a_gaussian_flow_is_its_linear_map_with_any_gauge() -> None:
    """Y = A with A A^T = cov(stop) cov(start)^-1 in the eigenbasis; a constant gauge keeps Y cov Y^T, not Y itself."""
    law, g, stop = VP(), gaussian([1.5, 0.3, 0.04]), 0.02
    x = normal(4, 3)
    flow = flow_jacobian(g.denoiser(law), x, steps=200, stop=stop)
    c, d = law.coef(1.0), law.coef(stop)
    assert torch.allclose(flow.x, g.transport(x, c, d), rtol=2e-3, atol=2e-3)
    expected = ((d.alpha**2 * g.variances + d.sigma**2) / (c.alpha**2 * g.variances + c.sigma**2)).sqrt()
    assert torch.allclose(flow.singular_values[-1], expected.sort(descending=True).values.expand(4, 3), rtol=2e-3)
    assert flow.singular_values.shape == (201, 4, 3) and torch.equal(
        flow.singular_values[0], torch.ones(4, 3, dtype=F64)
    )
    omega = torch.tensor([[0.0, 0.4, 0.0], [-0.4, 0.0, 0.3], [0.0, -0.3, 0.0]])
    turned = flow_jacobian(gauge(omega)(g.denoiser(law)), x, steps=400, stop=stop).jacobian
    before, after = (g.basis @ torch.diag(k.alpha**2 * g.variances + k.sigma**2) @ g.basis.T for k in (c, d))
    assert torch.allclose(turned @ before @ turned.mT, after.expand(4, 3, 3), atol=2e-3)
    assert not torch.allclose(turned, flow.jacobian, atol=0.1)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_the_dimension_of_a_linear_subspace_is_found(k: int) -> None:
    basis = torch.linalg.qr(normal(5, k, seed=k)).Q
    latent = sf.oracles.GaussianMixture(normal(3, k, seed=7), 0.5 * torch.ones(3))
    data = sf.oracles.LinearSubspace(basis, latent)
    x = data.sample(12, 3)
    found, flow = intrinsic_dimension(data.denoiser(VP()), x, t=1e-3, steps=60)
    assert (found == k).all()
    assert torch.allclose(flow.x, x, atol=0.1)  # encoded and decoded
    across = flow.singular_values[-1][:, k:]
    assert torch.allclose(across, torch.full_like(across, VP().coef(1e-3).sigma), rtol=0.1)  # noise of the last time
    dense = data.sample(3000, 4)
    assert (local_pca_dimension(x, dense) == k).all()
    assert float(maximum_likelihood_dimension(x, dense, neighbours=50).mean()) == pytest.approx(k, rel=0.2)


def test_a_shear_hides_a_dimension() -> None:
    """speed = k log(rho) / int g^2 / 2: a rotation by k log(rho), singular values (sqrt(k^2 + 4) +- k) / 2 in the plane."""
    law, k = VP(), 8.0
    disc = sf.oracles.Gaussian([0.0, 0.0, 0.0], [1.0, 1.0, 1e-4])
    total = 0.25 * (law.beta_min + law.beta_max)
    sheared = swirl(lambda rho, t: k / total * rho.log())(disc.denoiser(law))
    x = disc.sample(16, 5)
    found, flow = intrinsic_dimension(sheared, x, t=1e-4, steps=150)
    plain, _ = intrinsic_dimension(disc.denoiser(law), x, t=1e-4, steps=60)
    assert (plain == 2).all() and (found == 1).all()
    pair = torch.tensor([(math.sqrt(k * k + 4) + k) / 2, (math.sqrt(k * k + 4) - k) / 2], dtype=F64)
    assert torch.allclose(flow.singular_values[-1][:, :2].median(0).values, pair, rtol=0.02)


@pytest.mark.parametrize(("turned", "shift", "dimension"), [(True, 0.0, 1), (False, 0.25, 2), (True, 0.25, 3)])
def test_views_of_a_picture_have_the_dimension_of_their_moves(turned: bool, shift: float, dimension: int) -> None:
    line = torch.linspace(-1, 1, 32)
    picture = torch.exp(-3 * ((line[:, None] - 0.3) ** 2 + 4 * (line[None] + 0.1 + 0.5 * line[:, None] ** 2) ** 2))
    views = moved_picture(picture, 3000, turned=turned, shift=shift)
    assert views.shape == (3000, 12) and float(views.std()) == pytest.approx(1.0)
    assert float(maximum_likelihood_dimension(views[:64], views).mean()) == pytest.approx(dimension, rel=0.2)


def test_the_largest_gap() -> None:
    assert largest_gap(torch.tensor([[9.0, 8.0, 1e-3], [9.0, 1e-3, 1e-4], [1.0, 1.0, 0.0]])).tolist() == [2, 1, 2]


def test_what_cannot_be_asked_is_refused() -> None:
    exact, x = mixture().denoiser(VP()), normal(6, 2)
    with pytest.raises(InputError, match="not antisymmetric"):
        gauge([[1.0, 1.0], [-1.0, 0.0]])
    with pytest.raises(InputError, match="draws noise"):
        flow_jacobian(exact, x, solver=sf.solvers.get("ddpm"))
    with pytest.raises(InputError, match="carries more"):
        flow_jacobian(exact, x, solver=sf.solvers.get("dpm-solver++"))
    with pytest.raises(InputError, match="samples"):
        decompose(exact, x[:2], 0.4)
    with pytest.raises(InputError, match="neighbours"):
        local_pca_dimension(x, x, neighbours=6)
    with pytest.raises(InputError, match="nothing else|stay|infinite"):
        asymmetry(mixture().denoiser(Flow()), x, 0.0)
