"""Empirical model statistics: measured where they are known."""

from __future__ import annotations

import math

import pytest
import torch

from sfumato import grids, oracles
from sfumato.core import Context, InputError, Posterior, Wrapper, sample
from sfumato.processes import EDM, VP, Flow
from sfumato.solvers.empirical import DPMSolverV3, EmpiricalStatistics
from sfumato.solvers.exponential import Multistep
from sfumato.tuning.statistics import estimate

STDS = torch.linspace(0.05, 1.5, 5).double()


@pytest.mark.parametrize("process", [VP(), EDM(), Flow()], ids=["vp", "edm", "flow"])
def test_a_gaussian_is_measured_exactly_and_solved_in_one_step(process: object) -> None:
    """l = rho^2 / (v + rho^2): the field is linear, so f vanishes and order 1 makes no error, on any process."""
    gaussian = oracles.Gaussian(torch.zeros(5), torch.diag(STDS**2))
    denoiser = gaussian.denoiser(process)
    found = estimate(denoiser, gaussian.sample(256), levels=40)
    for j in (0, 13, 30, 39):
        rho2 = math.exp(-2 * float(found.lams[j]))
        assert torch.allclose(found.l[j], rho2 / (STDS**2 + rho2), rtol=0.01, atol=1e-4)
    assert float(found.s.abs().max()) == 0
    t, s = process.time(-1.5), process.time(2.0)  # type: ignore[attr-defined]
    a, b = process.coef(t), process.coef(s)  # type: ignore[attr-defined]
    x = torch.randn(32, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * a.sigma
    exact = gaussian.transport(x, a, b)
    errors = {
        name: float((sample(denoiser, solver, grids.get("uniform"), 1, x=x, start=t, stop=s) - exact).norm())
        for name, solver in (("measured", DPMSolverV3(found, 1)), ("ddim", Multistep(1)))
    }
    assert errors["measured"] < 0.05 * errors["ddim"]  # what is left is the interpolation between levels


def test_two_halves_of_the_data_agree_and_the_first_order_error_falls() -> None:
    """The claim that defines them: an order-1 run with them is closer to the end point than DDIM."""
    draw = torch.Generator().manual_seed(5)
    mixture = oracles.GaussianMixture(
        torch.randn(6, 8, generator=draw).double(), torch.full((6,), 0.3), torch.ones(6) / 6
    )
    denoiser, data = mixture.denoiser(VP()), mixture.sample(512)
    one, other = (estimate(denoiser, part, levels=30) for part in data.chunk(2))
    assert float((one.l - other.l).norm() / one.l.norm()) < 0.1
    x = torch.randn(64, 8, dtype=torch.float64, generator=draw)
    fine = sample(denoiser, Multistep(3, variable="angle", last=2), grids.get("arctan", lam_max=8.0), 200, x=x)
    for steps in (6, 12):
        ours, ddim = (
            (sample(denoiser, solver, grids.get("logsnr"), steps, x=x) - fine).norm(dim=1).median()
            for solver in (DPMSolverV3(one, 1), Multistep(1))
        )
        assert ours < ddim


def test_the_error_of_a_network_where_alpha_is_small_is_the_noise_form() -> None:
    """There f is e^(-lambda) times an error of eps that hardly changes along the flow: s = -1, which keeps eps.

    Beliefs magnified by sigma / alpha = 50 would otherwise be extrapolated as if they were x0.
    """

    class Wrong(Wrapper):
        def forward(self, x: torch.Tensor, t: float, ctx: Context) -> Posterior:
            return self.inner(x, t, ctx).but(eps=self.inner(x, t, ctx).view("eps") + 0.02 * torch.sin(3 * x))

    denoiser = oracles.Gaussian(torch.zeros(5), torch.diag(STDS**2)).denoiser(VP())
    data = oracles.Gaussian(torch.zeros(5), torch.diag(STDS**2)).sample(1024)
    found = estimate(Wrong(denoiser), data, levels=20, lam_max=0.0)
    assert bool((found.lams[:5] < -3).all())
    assert float((found.s[:5] + 1).abs().max()) < 0.15


def test_they_come_back_from_their_tensors_and_refuse_nonsense() -> None:
    made = EmpiricalStatistics(torch.tensor([-2.0, 0.0, 2.0]), *torch.rand(3, 3, 4, dtype=torch.float64))
    again = EmpiricalStatistics(**made.tensors())
    assert all(torch.equal(a, b) for a, b in zip(made.at(0.7), again.at(0.7), strict=True))
    with pytest.raises(InputError, match="levels"):
        estimate(oracles.Gaussian(torch.zeros(2), torch.eye(2)).denoiser(VP()), torch.zeros(4, 2), levels=2)
    with pytest.raises(InputError, match="finite"):
        EmpiricalStatistics(torch.tensor([0.0, 1.0]), *[torch.tensor([0.0, math.nan])] * 3)
