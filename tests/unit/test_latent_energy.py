"""Langevin dynamics in the space of all noise, against the posterior that a linear generator has in closed form."""

from __future__ import annotations

import pytest
import torch

from sfumato import oracles
from sfumato.core import InputError
from sfumato.editing.latent_energy import drawn, langevin
from sfumato.editing.recorded import record
from sfumato.processes import VP, Flow

LAWS = {"vp": VP(), "flow": Flow()}


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("solver", ["ddpm", "ddpm(eta=0.3)", "dpm-solver++(order=2, eta=1.0)"])
def test_a_drawn_run_is_replayed_by_its_noise(solver, law):
    denoiser = oracles.GaussianMixture([[1.0], [-1.0]], [0.2, 0.3]).denoiser(LAWS[law])
    maps = drawn(denoiser, (50, 1), solver=solver, steps=6, seed=3, dtype=torch.float64)
    assert torch.equal(maps.decode(denoiser), maps.states[-1])
    again = record(denoiser, maps.states[-1], solver=solver, steps=6)
    assert len(again.noise) == len(maps.noise) and again.times == maps.times


def test_the_law_of_what_is_drawn_is_the_tilted_one():
    """G is linear for Gaussian data: x0 ~ N(0, v) and the cost (x0 - a)^2 / 2 at weight w give N(w v a / (1 + w v), v / (1 + w v))."""
    denoiser, a, w = oracles.Gaussian(torch.zeros(1), 0.5 * torch.eye(1)).denoiser(VP()), 1.5, 2.0
    maps = drawn(denoiser, (2000, 1), steps=3, seed=1, dtype=torch.float64)
    v = float(maps.states[-1].var())

    def cost(x0, cond):
        return 0.5 * (x0 - a).square().sum(1)

    led = langevin(maps, denoiser, cost, weight=w, rate=0.1, iterations=45, seed=2).decode(denoiser, keep_last=False)
    assert led.mean() == pytest.approx(w * v * a / (1 + w * v), abs=0.06)
    assert led.var() == pytest.approx(v / (1 + w * v), rel=0.15)


def test_without_a_cost_the_noise_stays_normal_and_items_stay_apart():
    denoiser = oracles.Gaussian(torch.zeros(3), torch.eye(3)).denoiser(Flow())
    maps = drawn(denoiser, (600, 3), steps=3, seed=1, dtype=torch.float64)

    def nothing(x0, cond):
        return 0 * x0.sum(1)

    led = langevin(maps, denoiser, nothing, rate=0.2, iterations=20)
    for z in (led.states[0], *led.noise[:-1]):
        assert abs(float(z.mean())) < 0.08 and float(z.std()) == pytest.approx(1 / (1 - 0.05) ** 0.5, abs=0.06)
    small = drawn(denoiser, (2, 3), steps=3, seed=1, dtype=torch.float64)
    alone = langevin(small, denoiser, nothing, rate=0.2, iterations=20)
    assert torch.allclose(alone.noise[0], led.noise[0][:2])


def test_what_cannot_be_led_is_refused():
    denoiser = oracles.Gaussian(torch.zeros(1), torch.eye(1)).denoiser(VP())
    maps = drawn(denoiser, (2, 1), steps=4, dtype=torch.float64)
    for options, said in [({"rate": 0.0}, "positive rate"), ({"iterations": 0}, "at least one")]:
        with pytest.raises(InputError, match=said):
            langevin(maps, denoiser, lambda x0, cond: x0.sum(1), **options)
    with pytest.raises(InputError, match="whole run"):
        langevin(maps.skip(1), denoiser, lambda x0, cond: x0.sum(1))
    with pytest.raises(InputError, match="draws 0 times"):
        drawn(denoiser, (2, 1), solver="ddim", steps=3)
