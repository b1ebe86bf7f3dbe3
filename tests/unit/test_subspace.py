"""The network for data on a linear subspace: what its form promises, whatever its weights are."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sfumato as sf
from sfumato.core import Context
from sfumato.core.errors import InputError
from sfumato.networks import SubspaceScore, build


def network(channels: int = 7, rank: int = 3, seed: int = 0) -> SubspaceScore:
    """A float64 network whose output is not zero."""
    torch.manual_seed(seed)
    net = SubspaceScore(channels, rank, width=16, depth=1).double()
    for parameter in net.inside.output.parameters():
        torch.nn.init.normal_(parameter)
    return net


def vectors(n: int, channels: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, channels, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 9).flatmap(lambda d: st.tuples(st.integers(1, d), st.just(d))), st.integers(0, 99))
def test_off_the_subspace_the_score_is_exact_for_any_weights(shape, seed):
    rank, channels = shape
    net, x = network(channels, rank, seed), 3 * vectors(5, channels, seed)
    process, t = sf.processes.VP(), 0.4
    score = sf.parametrized(net, process, "x0")(x, t, Context.of(5)).view("score")
    off = torch.eye(channels, dtype=torch.float64) - net.basis @ net.basis.T
    torch.testing.assert_close(score @ off, -(x @ off) / process.coef(t).sigma ** 2, rtol=1e-9, atol=1e-9)


def test_the_answer_is_in_the_subspace_and_only_depends_on_what_is():
    net, x, label = network(), vectors(6, 7), torch.full((6,), 0.3, dtype=torch.float64)
    basis = net.basis
    torch.testing.assert_close(basis.T @ basis, torch.eye(3, dtype=torch.float64))
    y = net(x, label)
    torch.testing.assert_close(y @ basis @ basis.T, y)
    torch.testing.assert_close(net(x + 10 * (vectors(6, 7, 1) @ (torch.eye(7) - basis @ basis.T)), label), y)


def test_turning_the_subspace_turns_the_answer():
    net, x, label = network(), vectors(6, 7), torch.full((6,), 0.3, dtype=torch.float64)
    turn = torch.linalg.qr(vectors(7, 7, 2)).Q
    turned = network()
    turned.frame.data.copy_(turn @ net.frame)
    torch.testing.assert_close(turned(x @ turn.T, label), net(x, label) @ turn.T)


def test_it_learns_the_subspace_of_an_oracle_and_then_agrees_with_it():
    """A Gaussian on a line in three dimensions: f is linear there, and V has one angle to find."""
    from sfumato.objectives import Denoising
    from sfumato.recipes._small import learn

    axis = torch.tensor([[2.0], [-1.0], [2.0]], dtype=torch.float64) / 3
    line = sf.oracles.LinearSubspace(axis, sf.oracles.Gaussian([0.5], 1.0))
    torch.manual_seed(0)
    denoiser = sf.parametrized(SubspaceScore(3, 1, width=32, depth=1), sf.processes.VP(), "x0")
    made = learn(Denoising(denoiser), {"x": line.sample(2000, 1).float()}, 0, steps=400, size=64, lr=1e-2)
    assert abs(float(made.net.basis.detach().T @ axis.float())) > 0.995
    x, t = vectors(200, 3), 0.5
    want = line.denoiser(sf.processes.VP())(x, t, Context.of(200)).mean
    with torch.no_grad():
        got = made(x.float(), t, Context.of(200)).mean
    assert float((got - want).norm() / want.norm()) < 0.25


def test_it_is_rebuilt_from_its_name_and_configuration():
    net = network()
    again = build(net.network_name, net.config).double()
    again.load_state_dict(net.state_dict())
    label = torch.full((2,), 0.3, dtype=torch.float64)
    assert torch.equal(again(vectors(2, 7), label), net(vectors(2, 7), label))


@pytest.mark.parametrize("rank", [0, 8])
def test_a_rank_that_no_subspace_has_is_refused(rank):
    with pytest.raises(InputError, match="from 1 to 7"):
        SubspaceScore(7, rank)


def test_vectors_of_another_length_are_refused():
    with pytest.raises(InputError, match="7"):
        network()(vectors(2, 6), torch.zeros(2))
