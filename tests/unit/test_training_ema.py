"""Averages of weights against their integrals, and power profiles rebuilt after the training."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from torch import nn

from sfumato.core import InputError
from sfumato.training import ema, reconstruct

widths = st.floats(0.01, 0.2886)
profiles = st.tuples(st.floats(10.0, 1e5), st.floats(0.0, 200.0))


@given(sigma=widths)
def test_gamma_inverts_the_width(sigma):
    g = ema.gamma(sigma)
    assert g >= 0 and ((g + 1) / ((g + 2) ** 2 * (g + 3))) ** 0.5 == pytest.approx(sigma, rel=1e-9)


@pytest.mark.parametrize("sigma", [0.05, 0.1, 0.25])
def test_width_is_the_standard_deviation_of_the_profile(sigma):
    g = ema.gamma(sigma)
    p = lambda u: (g + 1) * u**g  # noqa: E731
    mean = quad(lambda u: u * p(u), 0, 1)[0]
    assert quad(lambda u: (u - mean) ** 2 * p(u), 0, 1)[0] ** 0.5 == pytest.approx(sigma, rel=1e-6)


@settings(max_examples=40)
@given(
    one=st.tuples(st.floats(1.0, 9.0), st.floats(0.0, 30.0)), other=st.tuples(st.floats(1.0, 9.0), st.floats(0.0, 30.0))
)
def test_inner_product_is_the_integral(one, other):
    def p(tau, end, g):
        return (g + 1) / end * (tau / end) ** g

    numeric = quad(lambda tau: p(tau, *one) * p(tau, *other), 0, min(one[0], other[0]))[0]
    assert ema.inner(one, other) == pytest.approx(numeric, rel=1e-6)


@given(end=st.floats(10, 1e6), g=st.floats(0, 100))
def test_a_stored_profile_is_itself(end, g):
    wanted = [(end / 2, g), (end, g), (end, g + 5)]
    assert ema.coefficients(wanted, (end, g)) == pytest.approx([0, 1, 0], abs=1e-6)


def test_power_average_is_the_weighted_integral():
    """Of theta(n) = n / N the profile average tends to (g + 1) / (g + 2)."""
    n, sigma = 4000, 0.1
    average = ema.Average([torch.zeros(1, dtype=torch.float64)], ema.power(sigma))
    for i in range(1, n + 1):
        average.update([torch.tensor([i / n], dtype=torch.float64)], i)
    g = ema.gamma(sigma)
    assert average.tensors[0].item() == pytest.approx((g + 1) / (g + 2), rel=1e-3)


def test_exponential_average_forgets_where_it_began():
    average = ema.Average([torch.zeros(1, dtype=torch.float64)], ema.exponential(0.9999))
    for i in range(1, 101):
        average.update([torch.ones(1, dtype=torch.float64)], i)
    assert average.tensors[0].item() > 0.999  # 0.9999 alone would have kept 99 % of the zero


@pytest.mark.parametrize(("sigma", "within"), [(0.05, 1e-6), (0.1, 1e-6), (0.07, 0.03), (0.15, 0.03)])
def test_any_width_is_rebuilt_from_two_profiles(tmp_path, sigma, within):
    """A training path with drift and noise: the rebuilt average against the one kept during the training."""
    net = nn.Linear(30, 20)
    kept = ema.Profiles("net", net, (0.05, 0.1))
    direct = ema.Average([net.weight], ema.power(sigma))
    generator = torch.Generator().manual_seed(0)
    direction, n = torch.randn(20, 30, generator=generator), 1600
    with torch.no_grad():
        for i in range(1, n + 1):
            net.weight.copy_(direction * np.sin(3 * i / n) + torch.randn(20, 30, generator=generator))
            for average in kept.averages.values():
                average.update([net.weight, net.bias], i)
            direct.update([net.weight], i)
            if i % 100 == 0:
                kept.snapshot(tmp_path, i)
    rebuilt = reconstruct(tmp_path, sigma, player="net")
    spread = (direct.tensors[0] - net.weight).norm()
    assert (rebuilt["weight"] - direct.tensors[0]).norm() < within * spread
    net.load_state_dict(rebuilt, strict=False)
    assert torch.equal(net.weight, rebuilt["weight"])
    middle = reconstruct(tmp_path, 0.1, player="net", step=800)["weight"]
    from sfumato.training import checkpoint

    torch.testing.assert_close(
        middle, checkpoint.read(tmp_path / "net-0.1-000000800.safetensors")["weights"]["weight"], rtol=1e-4, atol=1e-5
    )


def test_snapshots_that_do_not_exist(tmp_path):
    with pytest.raises(InputError, match="no snapshots of 'net'"):
        reconstruct(tmp_path, 0.1, player="net")
    ema.Profiles("net", nn.Linear(1, 1), (0.1,)).snapshot(tmp_path, 50)
    with pytest.raises(InputError, match="up to step 10"):
        reconstruct(tmp_path, 0.1, player="net", step=10)
    with pytest.raises(InputError, match="sigma_rel = 0.4"):
        reconstruct(tmp_path, 0.4, player="net")
