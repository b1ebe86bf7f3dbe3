"""Reconstruction by total variation is a minimum of what it says."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sfumato import operators
from sfumato.core import Context, InputError
from sfumato.operators import Function
from sfumato.operators.variational import largest, total_variation

skimage = pytest.importorskip("skimage")


def blocks() -> Tensor:
    x = torch.zeros(2, 1, 16, 16, dtype=torch.float64)
    x[0, :, 3:9, 4:13], x[1, :, 6:, :7] = 1.0, -0.5
    return x


def cost(operator: operators.Operator, x: Tensor, y: Tensor, weight: float) -> Tensor:
    """|A x - y|^2 / 2 + weight TV(x), written out."""
    down, right = torch.zeros_like(x), torch.zeros_like(x)
    down[..., :-1, :], right[..., :-1] = x.diff(dim=-2), x.diff(dim=-1)
    return operator.misfit(x, y) / 2 + weight * (down**2 + right**2).sqrt().flatten(1).sum(1)


@pytest.mark.parametrize("spec", ["fourier(acceleration=2, noise=0.05)", "blur(noise=0.05)", "downsample(noise=0.01)"])
def test_nothing_near_it_costs_less(spec):
    operator, truth = operators.registry.make(spec), blocks()
    y = operator.measure(truth, Context.of(2, seed=1))
    x = total_variation(operator, y, 0.05, 120)
    least = cost(operator, x, y, 0.05)
    others = [truth, operator.pinv(y), torch.zeros_like(x)]
    noise = torch.randn(6, *x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    others += [0.9 * x, 1.1 * x, *(x + 0.03 * n for n in noise), *(0.9 * x + 0.1 * v for v in others)]
    assert all((cost(operator, other, y, 0.05) >= least - 1e-3 * least).all() for other in others)
    assert (x - truth).square().sum() < (operator.pinv(y) - truth).square().sum()
    torch.testing.assert_close(total_variation(operator, y[:1], 0.05, 20), total_variation(operator, y, 0.05, 20)[:1])


def test_the_step_is_safe():
    x = torch.zeros(1, 1, 16, 16)
    assert largest(operators.get("downsample"), x) == pytest.approx(0.25, abs=1e-3)
    assert largest(operators.stack(a=operators.get("identity"), b=operators.get("identity")), x) == pytest.approx(2.0)


def test_impossible_requests_are_refused():
    y = blocks()
    for operator, weight, iterations in (
        (Function(torch.tanh), 0.1, 10),
        (operators.get("identity"), 0.0, 10),
        (operators.get("identity"), 0.1, 0),
    ):
        with pytest.raises(InputError):
            total_variation(operator, y, weight, iterations)
