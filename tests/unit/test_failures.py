"""Searches for failures, on generators whose worst case is known."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from sfumato.analysis.failures import Margin, Shell, latent_search, prompt_search, random_latents, stability
from sfumato.core import InputError
from sfumato.denoisers.oracles import Gaussian
from sfumato.processes import VP
from sfumato.tuning.inputs import Generator

D = 16
MEAN = torch.full((D,), 0.4).double()


def linear(seed: int, k: int = 2) -> nn.Module:
    net = nn.Linear(D, k).double()
    with torch.no_grad():
        net.weight.copy_(torch.randn(k, D, generator=torch.Generator().manual_seed(seed)))
        net.bias.zero_()
    return net.requires_grad_(False)


def noise(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def generator() -> Generator:
    """The probability flow of a Gaussian: sampling is a linear map of the noise."""
    return Generator(Gaussian(MEAN, 0.3).denoiser(VP()), "ddim", "uniform", 10)


# The shell


@given(st.integers(0, 10_000), st.floats(0.05, 2.0))
def test_projections_are_on_the_shell_and_near_the_start(seed: int, radius: float) -> None:
    start, z = noise(6, seed), 3 * noise(6, seed + 1)
    shell = Shell(start, radius)
    p = shell.project(z)
    length = math.sqrt(D)
    assert torch.allclose(p.norm(dim=1), torch.full((6,), length).double())
    centre = start * (length / start.norm(dim=1, keepdim=True))
    assert bool(((p - centre).norm(dim=1) <= radius * length * (1 + 1e-6)).all())
    assert torch.allclose(shell.project(p), p, atol=1e-6)
    inside = centre + 1e-4 * noise(6, seed + 2)
    assert torch.allclose(Shell(start, 0.5).project(inside), inside * (length / inside.norm(dim=1, keepdim=True)))


def test_the_projection_is_the_nearest_point() -> None:
    start, z, shell = noise(1), noise(1, 3), Shell(noise(1), 0.4)
    others = Shell(start.expand(20_000, -1), 0.4).project(start + 0.5 * noise(20_000, 5))
    unit = z / z.norm() * math.sqrt(D)
    assert float((shell.project(z) - unit).norm()) <= float((others - unit).norm(dim=1).min()) + 1e-6


def test_typical_noise_is_typical_and_other_noise_is_not() -> None:
    shell, z = Shell(), torch.randn(4000, 64, generator=torch.Generator().manual_seed(0))
    assert 0.95 < float(shell.typical(z).float().mean()) < 0.995
    for strange in (0.7 * z, z + 0.6, z.sign(), torch.where(z.abs() > 1.5, 2.2 * z, 0.8 * z)):
        assert float(shell.typical(strange).float().mean()) < 0.5
    with pytest.raises(InputError, match="radius = 0"):
        Shell(radius=0)


# The score


def test_the_margin_is_the_mean_over_members_and_all_must_reject() -> None:
    one, two = linear(1, 4), linear(2, 4)
    x, label = noise(50), torch.arange(50) % 4
    score = Margin([one, two], label)
    each = []
    for net in (one, two):
        logits = net(x)
        best = torch.stack([logits[i][torch.arange(4) != label[i]].max() for i in range(50)])
        each.append(logits[torch.arange(50), label] - best)
        assert torch.equal(each[-1] > 0, logits.argmax(1) == label)
    assert torch.allclose(score(x), (each[0] + each[1]) / 2)
    assert torch.equal(score.rejected(x), (each[0] < 0) & (each[1] < 0))


def test_ensembles_of_one_and_of_copies_are_refused() -> None:
    one = linear(1)
    for members in ([one], [one, one], [one, linear(1)]):
        with pytest.raises(InputError, match="at least two different members"):
            Margin(members, 0)
    with pytest.raises(InputError, match="label = 2: a class from 0 to 1"):
        Margin([one, linear(2)], 2)(noise(1))


# Noise


def test_the_worst_noise_of_a_linear_generator_is_found() -> None:
    """D(G(z)) = <w, a z> + b on a sphere is least at -w: known in closed form."""
    generate, x = generator(), noise(4)
    score = Margin([linear(1), linear(2)], 0)
    flow = (generate(noise(1), {}) - generate(0 * noise(1), {})).norm() / noise(1).norm()
    w = sum(m.weight[0] - m.weight[1] for m in score.members) / 2
    least = score(generate(0 * noise(1), {}))[0] - flow * w.norm() * math.sqrt(D)
    found = latent_search(generate, x, {}, score, shell=Shell(), steps=100, lr=0.05)
    assert torch.allclose(found.score, least.expand(4), atol=0.02 * float(w.norm()))
    assert torch.allclose(score(found.samples), found.score)
    near = latent_search(generate, x, {}, score, shell=Shell(x, 0.3), steps=40, lr=0.1)
    start = score(generate(Shell().project(x), {}))
    assert bool((near.score < start).all() and (near.score > least).all())
    assert bool(((near.x - Shell().project(x)).norm(dim=1) <= 0.3 * math.sqrt(D) + 1e-6).all())


def test_random_search_is_worse_and_stays_in_the_shell() -> None:
    generate, x = generator(), noise(4)
    score = Margin([linear(1), linear(2)], 0)
    for shell in (Shell(), Shell(x, 0.3)):
        ours = latent_search(generate, x, {}, score, shell=shell, steps=30, lr=0.1)
        theirs = random_latents(generate, x, {}, score, shell=shell, tries=90, seed=1)
        assert bool((ours.score < theirs.score).all())
        assert torch.allclose(shell.project(theirs.x), theirs.x, atol=1e-5)


def test_failures_are_typical_rejected_and_confirmed_by_others() -> None:
    """The worst noise of a linear score has no typical kurtosis or mean where the weights have none."""
    generate, x = generator(), noise(6)
    score = Margin([linear(1), linear(2)], 0)
    found = latent_search(generate, x, {}, score, shell=Shell(), steps=40, lr=0.1)
    assert torch.equal(found.rejected, score.rejected(found.samples) & Shell().typical(found.x))
    agreeing, against = (lambda v: score.members[0](v)), (lambda v: -score.members[0](v))
    assert torch.equal(found.confirmed([agreeing], 0), found.rejected)
    assert not found.confirmed([agreeing, against], 0).any()


def test_stability_is_the_share_of_neighbours_that_fail() -> None:
    generate, x = generator(), noise(5)
    sums = lambda v: v.sum(1) < MEAN.sum()  # noqa: E731
    assert torch.equal(stability(generate, x, {}, lambda v: v.sum(1) < 1e9), torch.ones(5))
    assert torch.equal(stability(generate, x, {}, lambda v: v.sum(1) > 1e9), torch.zeros(5))
    share = stability(generate, x, {}, sums, delta=5.0, tries=40)
    assert 0 < float(share.mean()) < 1


# Prompts

VALUES = {word: float(i) for i, word in enumerate("abcdefghij")}


def encode(prompts: Any) -> dict[str, Tensor]:
    """The letters' numbers, in their order, and a mask."""
    rows = [[VALUES[w] for w in p.split() if w in VALUES] for p in prompts]
    return {"text": torch.tensor(rows)[..., None], "text_mask": torch.ones(len(rows), len(rows[0]), dtype=torch.bool)}


SLOTS = [list("abcdefghij")] * 3


def aim(cond: Any) -> Tensor:
    """Least at g b e."""
    return (cond["text"][..., 0] * torch.tensor([-1.0, 1.0, -0.5])).sum() + cond["text"][0, 0, 0].sub(6).relu() * 4


def test_the_worst_prompt_is_found_word_by_word() -> None:
    worst = prompt_search(aim, encode, "the {} and {} with {}", SLOTS, "cce", budget=60, top=3)
    assert worst.prompt == "the g and a with j" and worst.loss == pytest.approx(min(worst.tried.values()))
    assert worst.tried["the c and c with e"] == pytest.approx(float(aim(encode(["c c e"]))))


def test_the_gradient_spends_less_than_chance() -> None:
    """A linear loss is ranked exactly: one prompt a slot and one gradient; chance needs all of them."""
    flat = lambda cond: (cond["text"][..., 0] * torch.tensor([-1.0, 1.0, -0.5])).sum()  # noqa: E731
    ours = prompt_search(flat, encode, "{} {} {}", SLOTS, "eee", budget=10, top=1)
    assert ours.prompt == "j a j" and len(ours.tried) == 4
    theirs = [
        prompt_search(flat, encode, "{} {} {}", SLOTS, "eee", budget=10, top=1, guided=False, seed=s) for s in range(8)
    ]
    assert all(t.loss >= ours.loss for t in theirs) and max(len(t.tried) for t in theirs) == 10


def test_prompts_are_never_tried_twice_and_the_budget_holds() -> None:
    worst = prompt_search(aim, encode, "{} {} {}", [["a", "b"]] * 3, "aaa", budget=100)
    assert len(worst.tried) <= 8
    assert len(prompt_search(aim, encode, "{} {} {}", SLOTS, "aaa", budget=1).tried) == 1


@pytest.mark.parametrize("slots, start", [(SLOTS[:2], "aaa"), (SLOTS, "aa"), (SLOTS, "aaz")])
def test_templates_and_slots_must_fit(slots: Any, start: str) -> None:
    with pytest.raises(InputError, match="needs one list of words a slot"):
        prompt_search(aim, encode, "{} {} {}", slots, start)
