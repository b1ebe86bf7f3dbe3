"""Thresholding against NumPy, and what it leaves alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sfumato import codecs, grids, solvers
from sfumato.core import Context, Denoiser, InputError, Posterior, sample
from sfumato.denoisers.oracles import GaussianMixture
from sfumato.guidance import threshold
from sfumato.guidance.threshold import quantile
from sfumato.networks import AutoencoderKL
from sfumato.processes import VP, Flow

T = 0.4


class Says(Denoiser):
    """Always the same x0."""

    def __init__(self, x0: Tensor, process: Any) -> None:
        super().__init__()
        self.x0, self.process = x0, process

    def forward(self, x: Tensor, t: Any, ctx: Context) -> Posterior:
        return Posterior(self.x0.expand_as(x).to(x), "x0", x, self.process.coef(t))


def believed(x0: Tensor, **settings: Any) -> Posterior:
    denoiser = threshold(**settings)(Says(x0, VP()))
    return denoiser(torch.ones_like(x0), T, Context.of(len(x0), None))


@given(st.integers(1, 40), st.floats(0.01, 1.0), st.integers(0, 99))
def test_the_quantile_is_numpys(n: int, ratio: float, seed: int) -> None:
    values = torch.randn(3, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    assert np.allclose(quantile(values, ratio).numpy(), np.quantile(values.numpy(), ratio, axis=1))


def test_dynamic_and_static_thresholds() -> None:
    """Each item by its own quantile; the state stays and eps follows; what is in range is not touched."""
    x0 = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0)).double() * torch.tensor(
        [0.1, 1.0, 9.0]
    ).view(3, 1, 1, 1)
    post = believed(x0, ratio=0.9)
    for item, out in zip(x0.numpy(), post.mean.numpy(), strict=True):
        s = max(np.quantile(np.abs(item), 0.9), 1.0)
        assert np.allclose(out, np.clip(item, -s, s) / s)
    assert torch.equal(post.mean[0], x0[0]) and torch.equal(post.x, torch.ones_like(x0))
    c = VP().coef(T)
    assert torch.allclose(post.view("eps"), (post.x - c.alpha * post.mean) / c.sigma)
    assert torch.equal(believed(x0, mode="static", bound=0.5).mean, x0.clamp(-0.5, 0.5))
    assert torch.allclose(
        believed(x0, bound=2.0).mean.abs().amax((1, 2, 3)), torch.tensor([0.2, 2.0, 2.0]).double(), atol=1.0
    )
    assert float(believed(x0, bound=2.0).mean.abs().max()) <= 2.0
    alone = threshold(ratio=0.9)(Says(x0[2:], VP()))(torch.ones_like(x0[2:]), T, Context.of(1, None))
    assert torch.equal(alone.mean[0], post.mean[2])


@pytest.mark.parametrize("solver", ["ddim", "dpm-solver++", "dpm-solver-2", "unipc", "ddpm", "heun"])
@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_every_solver_ends_in_range(mode: str, solver: str) -> None:
    """From a belief far out of range; and a law inside of the range is sampled as without a threshold."""
    made, grid = solvers.get(solver), grids.get("arctan")
    far = threshold(mode)(Says(torch.full((8, 8), 5.0), VP()))
    assert float(sample(far, made, grid, 6, shape=(3, 8, 8), seed=1).abs().max()) <= 1.0 + 1e-5
    inside = GaussianMixture([[0.3, -0.2], [-0.4, 0.1]], [0.05, 0.02]).denoiser(Flow())
    one, other = (sample(d, made, grid, 6, shape=(4, 2), seed=1) for d in (inside, threshold(mode, ratio=1.0)(inside)))
    assert torch.allclose(one, other, atol=1e-4)


@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_low_precision_the_meta_device_and_a_clock_an_item(mode: str) -> None:
    x0 = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1)) * 3
    for kind in (torch.bfloat16, torch.float16):
        assert believed(x0.to(kind), mode=mode).mean.dtype == kind
    assert believed(x0.to("meta"), mode=mode).mean.device.type == "meta"
    denoiser, clock = threshold(mode)(Says(x0, VP())), torch.tensor([0.2, 0.9]).double()
    rows = denoiser(torch.ones_like(x0), clock, Context.of(2, None))
    assert torch.allclose(rows.mean, believed(x0, mode=mode).mean) and rows.view("eps").isfinite().all()
    assert torch.equal(denoiser(x0, 0.0, Context.of(2, None)).mean, x0), "at sigma = 0 the belief stays"


def test_what_has_no_range_is_refused() -> None:
    with pytest.raises(InputError, match="for pixels"):
        threshold(codec=codecs.KL(AutoencoderKL(factor=4, width=8)))
    threshold(codec=codecs.build("identity"))
    for bad in ({"mode": "soft"}, {"ratio": 0.0}, {"ratio": 1.1}, {"bound": 0.0}):
        with pytest.raises(InputError):
            believed(torch.ones(1, 2), **bad)

    class Tokens(Denoiser):
        def forward(self, x: Any, t: Any, ctx: Context) -> Any:
            return x

    with pytest.raises(InputError, match="no range"):
        threshold()(Tokens())(torch.ones(1, 2), T, Context.of(1, None))
