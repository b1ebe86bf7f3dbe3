"""Skip coefficients: what they multiply, that 1 is nothing, that they are searched, kept in a card and refused elsewhere."""

from __future__ import annotations

import pytest
import torch

import sfumato as sf
from sfumato import grids, networks, processes, solvers
from sfumato.core import Context, InputError, trajectory
from sfumato.denoisers import parametrized
from sfumato.tuning import scales
from sfumato.tuning.card import SamplerCard
from sfumato.tuning.target import aim


def unet() -> networks.UNet:
    torch.manual_seed(0)
    net = networks.UNet(1, width=8, multipliers=(1, 2), blocks=(2, 1), attention=False).eval()
    with torch.no_grad():
        for p in net.parameters():
            p += 0.1 * torch.randn_like(p)
    return net


def test_a_coefficient_of_1_changes_nothing_and_others_act_at_their_step_only():
    denoiser, x = parametrized(unet(), processes.VP()), torch.randn(2, 1, 8, 8)
    ones = (1.0, 1.0, 1.0)

    def states(plan):
        run = trajectory(scales.Scaled(denoiser, plan), solvers.get("ddim"), grids.get("uniform"), 3, x=x)
        return [st.x for st in run]

    plain = [st.x for st in trajectory(denoiser, solvers.get("ddim"), grids.get("uniform"), 3, x=x)]
    assert scales.scaled(denoiser, (ones,) * 3) is denoiser
    assert all(torch.equal(a, b) for a, b in zip(states((ones,) * 3), plain, strict=True))
    moved = states((ones, (1.0, 0.5, 1.0), ones))
    assert torch.equal(moved[1], plain[1]) and not torch.equal(moved[2], plain[2])


@pytest.mark.parametrize("place", range(3))
def test_a_coefficient_is_that_factor_on_the_weights_that_read_the_skip_connection(place):
    """A merge is linear: scaling the map equals scaling the half of the convolution that reads it."""
    net, x = unet(), torch.randn(2, 1, 8, 8)
    paths, row = scales.merges(net), [1.0, 1.0, 1.0]
    row[place] = 0.7
    ours = scales.Scaled(parametrized(net, processes.VP()), (tuple(row),))(x, 0.4, Context.of(2)).mean
    weight = net.get_submodule(paths[place]).weight
    with torch.no_grad():
        weight[:, weight.shape[1] // 2 :] *= 0.7
    assert torch.allclose(ours, parametrized(net, processes.VP())(x, 0.4, Context.of(2)).mean, atol=1e-6)


def test_the_search_starts_from_1_never_loses_to_it_and_a_card_keeps_what_it_found(tmp_path):
    denoiser = parametrized(unet(), processes.VP())
    target = aim(denoiser, (6, 1, 8, 8), seed=1, steps=24)
    times = tuple(grids.get("uniform")(target.process, 3, 1.0, 0.0).tolist())
    found = scales.coefficients(target, solvers.get("ddim"), times, budget=25, seed=0)
    assert found.tried[0][0] == ((1.0, 1.0, 1.0),) * 3 and len(found.tried) == 25
    assert found.progress[-1] < found.progress[0]
    card = SamplerCard("usf", {"spec": "ddim"}, 3, 3, times=times, scales=found.best)
    card.save(tmp_path / "card.json")
    again = SamplerCard.load(tmp_path / "card.json")
    ends = [target.run(card.solver(), times, c.prepared(denoiser)) for c in (card, again)]
    assert again.scales == found.best and torch.equal(*ends)
    assert target.score(target.distance(ends[0])) == pytest.approx(found.progress[-1])


def test_networks_without_skip_connections_refuse_and_so_do_wrong_numbers():
    other = sf.parametrized(networks.MLP(3, width=8, depth=1), processes.VP())
    with pytest.raises(InputError, match="no skip connections"):
        scales.Scaled(other, ((0.9,),))
    assert not scales.possible(other)
    with pytest.raises(InputError, match="3 skip connections"):
        scales.Scaled(parametrized(unet(), processes.VP()), ((0.9,),))
