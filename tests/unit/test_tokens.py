"""Optimising what a frozen model is given: against known minima, item by item, for any condition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sfumato as sf
from sfumato.core import InputError
from sfumato.denoisers import parametrized
from sfumato.denoisers.oracles import GaussianMixture
from sfumato.editing.tokens import CountLoss, Token, optimise_token
from sfumato.guidance import cfg
from sfumato.processes import VP, Flow
from sfumato.tuning.inputs import Generator, optimise, random_search


class Says(nn.Module):
    """A network whose x0 is the sum of its tokens plus its vector: what a token does is known."""

    def forward(
        self,
        x: Tensor,
        label: Tensor,
        text: Tensor | None = None,
        text_mask: Tensor | None = None,
        vector: Tensor | None = None,
    ) -> Tensor:
        out = 0.0 * x
        if text is not None:
            out = out + (text if text_mask is None else text * text_mask[..., None]).sum(1)
        return out if vector is None else out + vector


def says(process: Any = None) -> Any:
    return parametrized(Says(), process or Flow(), "x0", null={"text": 0.0, "vector": 0.0})


def noise(n: int, d: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def words(n: int, length: int = 4) -> dict[str, Tensor]:
    text = noise(n * length, 3, 1).view(n, length, 3)
    return {"text": text, "text_mask": torch.arange(length) < torch.arange(1, n + 1)[:, None]}


# The generator


@pytest.mark.parametrize("solver", ["dpm-solver++", "heun", "ddpm"])
def test_a_generator_is_the_sampler_and_its_gradient(solver: str) -> None:
    denoiser = GaussianMixture([[-1.0, 0.3], [0.8, -0.5]], [0.3, 0.5]).denoiser(VP())
    x = noise(5, 2).double()
    found = []
    for method in ("plain", "checkpoint"):
        at = x.clone().requires_grad_()
        y = Generator(denoiser, solver, steps=6, method=method)(at, {})
        assert torch.allclose(y, sf.sample(denoiser, solver=solver, steps=6, x=x))
        found.append(torch.autograd.grad(y.square().sum(), at)[0])
    assert torch.allclose(*found, rtol=1e-8)


def test_the_residual_path_changes_the_gradient_and_not_the_value() -> None:
    """By residual times the Jacobian of the belief on the way."""
    denoiser = GaussianMixture([[-1.0, 0.3], [0.8, -0.5]], [0.3, 0.5]).denoiser(VP())
    x, slopes = noise(5, 2).double(), {}
    for weight in (0.0, 1.0, 3.0):
        at = x.clone().requires_grad_()
        y = Generator(denoiser, steps=6, residual=weight)(at, {})
        assert torch.allclose(y, sf.sample(denoiser, steps=6, x=x))
        slopes[weight] = torch.autograd.grad(y.sum(), at)[0]
    extra = slopes[1.0] - slopes[0.0]
    assert extra.abs().max() > 1e-3 and torch.allclose(slopes[3.0], slopes[0.0] + 3 * extra)


def test_generations_are_counted() -> None:
    generate = Generator(says(), steps=3)
    with torch.no_grad():
        generate(noise(2), words(2))
    assert generate.calls == [1.0]
    generate(noise(2).requires_grad_(), words(2))
    generate(noise(2), words(2))
    assert generate.calls == [5.0], "a gradient is two more"


def test_the_generator_of_a_pipeline_draws_its_pictures() -> None:
    from sfumato import codecs

    pipeline = sf.load("digits")
    generate = Generator.of(pipeline, steps=4)
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    cond = pipeline.conditions(3, ["one", "two", "nine"])
    with torch.no_grad():
        ours = codecs.to_uint8(generate(x, cond))
    theirs = sf.sample(pipeline.guided(), steps=4, x=x, cond=cond)
    assert torch.equal(ours, codecs.to_uint8(theirs))


# Optimisation


def test_items_are_independent_problems() -> None:
    """An item's path is that of the item alone; the best that was seen is kept, also of a loss that overshoots."""
    aims = noise(4, 3, 5)

    def loss(rows: Any) -> Any:
        return lambda given: (given["e"] - aims[rows]).square().sum(1)

    options: dict[str, Any] = {"steps": 25, "lr": 0.5, "clip": 1.0}
    whole = optimise({"e": torch.zeros(4, 3)}, loss(slice(0, 4)), **options)
    one = optimise({"e": torch.zeros(1, 3)}, loss(slice(2, 3)), **options)
    assert torch.allclose(whole.values["e"][2:3], one.values["e"]) and torch.allclose(
        whole.history[:, 2], one.history[:, 0]
    )
    assert torch.equal(whole.loss, whole.history.min(0).values)
    assert torch.allclose(loss(slice(0, 4))(whole.values), whole.loss)


def test_optimisation_stops_and_projects() -> None:
    calls = []

    def loss(given: Any) -> Tensor:
        calls.append(1)
        return (given["e"] - 1).square().sum(1)

    optimise({"e": torch.ones(2, 3)}, loss, steps=20, target=0.0)
    assert len(calls) == 1
    optimise({"e": torch.ones(2, 3)}, loss, steps=20, patience=3)
    assert len(calls) == 5
    found = optimise({"e": torch.zeros(2, 3)}, loss, steps=40, lr=0.3, project=lambda v: {"e": v["e"].clamp(max=0.25)})
    assert torch.equal(found.values["e"], torch.full((2, 3), 0.25))
    strange = optimise({"e": torch.zeros(2, 3)}, lambda v: loss(v) * torch.tensor([1.0, torch.nan]), steps=3)
    assert strange.loss[1] == torch.inf and strange.loss[0] < 3
    given = torch.zeros(2, 3)
    optimise({"e": given}, loss, steps=2)
    assert not given.any() and not given.requires_grad


def test_wrong_losses_are_refused() -> None:
    e = {"e": torch.zeros(2, 3)}
    with pytest.raises(InputError, match=r"a loss \(2, 3\) of variables"):
        optimise(e, lambda v: v["e"])
    with pytest.raises(InputError, match=r"a loss \(3,\)"):
        optimise(e, lambda v: v["e"].sum(0))
    with pytest.raises(InputError, match="use random_search"):
        optimise(e, lambda v: v["e"].sum(1).detach())


def test_random_search_keeps_the_best_of_each() -> None:
    draws = [noise(3, 2, i) for i in range(10)]
    found = random_search(lambda i: {"x": draws[i]}, lambda v: v["x"].square().sum(1), 10)
    sizes = torch.stack([d.square().sum(1) for d in draws])
    assert torch.equal(found.loss, sizes.min(0).values) and torch.equal(found.values["x"].square().sum(1), found.loss)


# Tokens


def test_a_token_is_put_beside_the_words() -> None:
    cond = words(3) | {"vendor": torch.zeros(3)}
    token = Token(torch.ones(2, 3))
    out = token.put(cond)
    assert (
        out["text"].shape == (3, 6, 3)
        and torch.equal(out["text"][:, :4], cond["text"])
        and bool((out["text"][:, 4:] == 1).all())
    )
    assert out["text_mask"][:, 4:].all() and torch.equal(out["text_mask"][:, :4], cond["text_mask"])
    assert out["vendor"] is cond["vendor"] and cond["text"].shape == (3, 4, 3)
    moved = Token(torch.ones(2, 3), "vector").put({"vector": torch.zeros(3, 3)})
    assert torch.equal(moved["vector"], torch.full((3, 3), 2.0))
    each = Token(torch.arange(3.0).view(3, 1, 1).expand(3, 1, 3))
    assert torch.equal(each.put(cond)["text"][:, 4, 0], torch.arange(3.0))
    assert torch.equal(each.item(2).put(cond)["text"][:, 4, 0], torch.full((3,), 2.0))
    for wrong in (Token(torch.ones(1, 4)), Token(torch.ones(1, 3), "words"), Token(torch.ones(2, 1, 3))):
        with pytest.raises(InputError, match="does not fit conditions|2 tokens for 3 items"):
            wrong.put(cond)


def test_a_saved_token_is_the_token(tmp_path) -> None:
    token = Token(torch.randn(1, 3), "text", "mask")
    again = Token.load(token.save(tmp_path / "five.safetensors"))
    assert torch.equal(again.value, token.value) and (again.name, again.mask) == ("text", "mask")
    (tmp_path / "broken").write_bytes(b"x" * 20)
    with pytest.raises(InputError, match="is not a saved token"):
        Token.load(tmp_path / "broken")


@pytest.mark.parametrize("process", [Flow(), VP()], ids=str)
@pytest.mark.parametrize("name", ["text", "vector"])
def test_the_optimal_token_is_found(process: Any, name: str) -> None:
    """x0 is the sum of what the network reads, so the token is what is missing from the prompt."""
    cond = words(3) | {"vector": noise(3, 3, 2)}
    said = Says()(noise(3), torch.zeros(3), **cond)
    aim = noise(3, 3, 9)
    learnt = optimise_token(
        Generator(says(process), steps=3), noise(3), cond, lambda y: (y - aim).square().sum(1), init=torch.zeros(1, 3),
        name=name, steps=120, lr=0.1, clip=None, patience=None,
    )  # fmt: skip
    assert torch.allclose(learnt.token.value[:, 0], aim - said, atol=0.05) and float(learnt.loss.max()) < 1e-2


def test_a_shared_token_serves_all_items_and_a_bound_holds() -> None:
    cond = words(3)
    said = Says()(noise(3), torch.zeros(3), **cond)
    options: dict[str, Any] = {
        "init": torch.zeros(1, 3),
        "shared": True,
        "steps": 300,
        "lr": 0.05,
        "clip": None,
        "patience": None,
    }
    generate = Generator(says(), steps=2)
    learnt = optimise_token(generate, noise(3), cond, lambda y: y.square().sum(1), **options)
    assert learnt.token.value.shape == (1, 3) and torch.allclose(learnt.token.value[0], -said.mean(0), atol=0.05)
    short = optimise_token(generate, noise(3), cond, lambda y: y.square().sum(1), bound=0.1, **options)
    assert torch.allclose(short.token.value.norm(), torch.tensor(0.1), atol=1e-3)
    pairs = optimise_token(
        generate, noise(3), cond, lambda y: y.square().sum(1), **options | {"shared": torch.tensor([0, 1, 0])}
    )
    assert torch.allclose(pairs.token.value[:2, 0], torch.stack([-said[::2].mean(0), -said[1]]), atol=0.05)
    assert torch.equal(pairs.token.value[2], pairs.token.value[0]) and pairs.loss.shape == (2,)
    with pytest.raises(InputError, match="shared is True, False or"):
        optimise_token(
            generate, noise(3), cond, lambda y: y.sum(1), init=torch.zeros(1, 3), shared=torch.zeros(2).long()
        )
    with pytest.raises(InputError, match="init is"):
        optimise_token(generate, noise(3), cond, lambda y: y.sum(1), init=torch.zeros(3))


def test_a_token_under_guidance_is_pushed_by_the_scale() -> None:
    """The null half of guidance reads no token."""
    cond = words(2)
    token = Token(torch.ones(1, 3))
    y, base = (sf.sample(cfg(2.0)(says()), steps=2, x=noise(2), cond=c) for c in (token.put(cond), cond))
    assert torch.allclose(y - base, torch.full((2, 3), 2.0), atol=1e-5)


# Counting


def test_the_count_loss_is_its_formula() -> None:
    """With a detector the value is |n - N| and the gradient that of the density, scaled by what one object has of it."""
    x = torch.rand(4, 1, 6, 6).requires_grad_()
    n, wanted = torch.tensor([3.0, 5.0, 2.0, 0.0]), torch.tensor([5, 2, 2, 4])
    loss = CountLoss(lambda v: 2 * v, wanted, 10.0, lambda v: n)(x)
    total = 2 * x.flatten(1).sum(1)
    assert torch.allclose(loss[:3], torch.tensor([2.0, 3.0, 0.0]), atol=1e-5)
    assert torch.allclose(loss[3], (total[3] / 10 - 4).abs()), "where none is found the fixed scale stays"
    (slope,) = torch.autograd.grad(loss[:2].sum(), x)
    assert torch.allclose(slope[0], -(2 * n[0] / total[0]).expand_as(slope[0])) and torch.allclose(
        slope[1], (2 * n[1] / total[1]).expand_as(slope[1])
    )
    assert torch.allclose(CountLoss(lambda v: v, 3, 2.0)(x), (total / 4 - 3).abs())
    for wrong in ({"wanted": 0}, {"wanted": 2, "scale": 0.0}, {"wanted": torch.tensor([1, -1])}):
        with pytest.raises(InputError, match="positive numbers"):
            CountLoss(lambda v: v, **wrong)
