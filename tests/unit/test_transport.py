"""Discrete ordinates in a slab: balance, exact limits, and the speed of both iterations."""

from __future__ import annotations

import pytest
import torch

from sfumato.analysis.transport import Slab
from sfumato.core import InputError


def test_deep_inside_a_thick_slab_what_is_born_is_absorbed() -> None:
    phi, _ = Slab(width=60, cells=120, ratio=0.5).solve(1.0)
    assert abs(float(phi[60]) - 1.0 / (1.0 * (1 - 0.5))) < 1e-6


def test_without_scattering_one_sweep_is_the_answer() -> None:
    """A purely absorbing slab: phi in the middle is the integral of (1 - exp(-w / 2 mu)) over directions."""
    slab = Slab(width=4, cells=801, ratio=0.0, angles=16)
    phi = slab.sweep(torch.zeros(801, dtype=torch.float64), 1.0)
    mu = torch.linspace(0, 1, 200_001, dtype=torch.float64)[1:]
    exact = float((1 - (-2.0 / mu).exp()).mean())
    assert abs(float(phi[400]) - exact) < 1e-4


def test_acceleration_changes_the_speed_and_not_the_answer() -> None:
    slab = Slab(width=50, cells=60, ratio=0.95)
    slow, many = slab.solve(1.0, "none", tolerance=1e-12)
    quick, few = slab.solve(1.0, "consistent", tolerance=1e-12)
    assert (slow - quick).abs().max() < 1e-8 and few < many / 10


@pytest.mark.parametrize("thickness", [0.5, 10.0])
def test_the_factors_are_those_of_theory(thickness: float) -> None:
    slab = Slab(width=60 * thickness, cells=60, ratio=0.99)
    assert slab.factor("consistent", 15) < 0.25
    if thickness > 1:
        assert 0.97 < slab.factor("none", 15) / 0.99 <= 1.0


def test_an_inconsistent_stencil_diverges_on_thick_cells() -> None:
    assert Slab(width=600, cells=60, ratio=0.99).factor("centred", 15) > 1
    with pytest.raises(InputError, match="no convergence"):
        Slab(width=600, cells=60, ratio=0.99).solve(1.0, "centred", most=40)


def test_without_a_source_there_is_nothing_and_no_iteration_is_no_answer() -> None:
    phi, iterations = Slab(cells=10).solve(0.0)
    assert iterations == 1 and bool((phi == 0).all())
    with pytest.raises(InputError, match="at least one"):
        Slab(cells=10).solve(1.0, most=0)


def test_impossible_slabs_are_refused() -> None:
    for wrong in ({"ratio": 1.0}, {"angles": 3}, {"cells": 1}, {"width": 0.0}):
        with pytest.raises(InputError):
            Slab(**wrong)
