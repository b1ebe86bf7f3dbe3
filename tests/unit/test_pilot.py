"""PILOT: its losses by hand, descent that descends, and blended diffusion where nothing is optimised."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_text import text_unet

import sfumato as sf
from sfumato import editing, grids, solvers
from sfumato.codecs import build
from sfumato.core import Context, InputError, Step
from sfumato.editing.attention import At, Watch, controlled, watched
from sfumato.editing.methods.pilot import Confine, Descend, Pilot, centralization, queries
from sfumato.guidance import cfg

N, SIDE = 3, 8


def task(n: int = N, **fields: Any) -> editing.Task:
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randn(n, 2, SIDE, SIDE, generator=generator).double() * 0.5
    mask = torch.zeros(n, 1, SIDE, SIDE)
    mask[..., 2:6, 2:6] = 1
    text = torch.randn(n, 5, 8, generator=generator).double()
    cond = {"text": text, "text_mask": torch.ones(n, 5, dtype=torch.bool)}
    denoiser = sf.parametrized(
        text_unet(), fields.pop("process", sf.processes.Flow()), "v", null={"text": 0.0, "text_mask": False}
    )
    facts: dict[str, Any] = {
        "denoiser": denoiser, "codec": build("identity", {"channels": 2}), "x0": x0, "images": torch.zeros(n, 3, SIDE, SIDE),
        "source": cond, "target": cond, "guidance": cfg(2.0), "scale": 2.0, "solver": solvers.get("ddim"),
        "grid": grids.get("uniform"), "steps": 5, "mask": mask, "given": frozenset({"prompt", "mask"}),
    }  # fmt: skip
    return editing.Task(**facts | fields)


METHOD = Pilot(gamma=0.7, interval=2, inner=2)


def test_without_optimisation_it_is_blended_diffusion() -> None:
    """gamma = 0 without confinement is SDEdit from pure noise with a mask, which is blended diffusion."""
    one = Pilot(gamma=0.0, confine=False)(task())
    other = editing.get("sdedit", strength=1.0)(task())
    torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize(
    "process", [sf.processes.Flow(), sf.processes.VP(), sf.processes.Cosine()], ids=["flow", "vp", "cosine"]
)
@pytest.mark.parametrize("solver", ["ddim", "dpm-solver++", "heun", "ddpm"])
def test_what_is_known_returns_exactly(process: Any, solver: str) -> None:
    asked = task(process=process, solver=solvers.get(solver))
    out = METHOD(asked)
    outside = asked.latent_mask.expand_as(out) == 0
    assert torch.equal(out[outside], asked.x0[outside]) and out.isfinite().all()
    assert not torch.equal(out[~outside], asked.x0[~outside])


def test_items_do_not_depend_on_the_batch() -> None:
    whole, asked = METHOD(task()), task()
    first = {k: v[:1] for k, v in asked.target.items()}
    alone = METHOD(
        replace(
            asked, x0=asked.x0[:1], images=asked.images[:1], source=first, target=first, mask=asked.mask[:1], nfe=[0.0]
        )
    )
    torch.testing.assert_close(alone, whole[:1], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(METHOD(task()), whole, rtol=0, atol=0)


def test_calls_are_counted() -> None:
    asked = task()
    METHOD(asked)
    # five steps of two readings; descents of two calls each before steps 0 and 2 (t = 1 and 0.6 are above 0.3)
    assert asked.nfe[0] == pytest.approx(5 * 2 + 2 * 2)


def test_descent_finds_the_minimum_of_a_quadratic() -> None:
    """Heavy-ball descent of ||x - a||^2 on the state: the published recurrence, step by step."""
    aim = torch.randn(2, 3, generator=torch.Generator().manual_seed(0)).double()
    still = solvers.get("ddim")
    one = Descend(still, still, lambda x, t, ctx: (x - aim).square().sum(1), lambda t: 0.05 * t, 1, 4, 0.0, 0.7)
    x = pace = torch.zeros_like(aim)
    for _ in range(4):
        pace = 0.7 * pace - 0.05 * 0.5 * 2 * (x - aim)
        x = x + pace
    torch.testing.assert_close(one.descend(torch.zeros_like(aim), 0.5, Context.of(2)), x)
    far = replace(one, repeats=300)
    torch.testing.assert_close(far.descend(torch.zeros_like(aim), 0.5, Context.of(2)), aim, rtol=1e-6, atol=1e-6)


def test_descent_lowers_the_published_cost() -> None:
    asked = task()
    hole = (asked.latent_mask > 0).double()
    from sfumato.editing.words import words

    cost = METHOD.cost(asked, hole, words(asked.target))
    x = torch.randn(asked.x0.shape, generator=torch.Generator().manual_seed(5)).double()
    descend = Descend(asked.solver, asked.solver, cost, lambda t: 0.02, 1, 8)
    before, after = (cost(v, 0.8, asked.context()) for v in (x, descend.descend(x, 0.8, asked.context())))
    assert (after < before).all()


def test_the_background_term_on_an_exact_denoiser() -> None:
    """||B (x0 - E)||^2 / 4, the sum and not the mean, with no attention where there is none."""
    asked = task()
    belief = sf.oracles.Gaussian(torch.zeros(2 * SIDE * SIDE), torch.eye(2 * SIDE * SIDE)).denoiser(sf.processes.VP())
    hole = (asked.latent_mask > 0).double()

    class Flat(sf.core.Denoiser):
        process = sf.processes.VP()

        def forward(self, x: Any, t: Any, ctx: Any) -> Any:
            post = belief(x.flatten(1), t, ctx)
            return sf.core.Posterior(post.mean.view_as(x), "x0", x, post.coef)

    flat = replace(asked, denoiser=Flat(), target={})
    x = torch.randn_like(asked.x0)
    got = METHOD.cost(flat, hole, None)(x, 0.5, Context.of(N, None, dtype=torch.float64))
    alpha = sf.processes.VP().coef(0.5).alpha  # E[x0 | x] = alpha x for unit Gaussian data
    torch.testing.assert_close(got, ((1 - hole) * (asked.x0 - alpha * x)).square().sum((1, 2, 3)) / 4)


def test_centralization_by_hand() -> None:
    """One layer of 2 x 2 queries, two heads, three tokens of which the last two are words."""
    maps = torch.rand(1, 2, 4, 3, generator=torch.Generator().manual_seed(0)).double()
    hole = torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]])
    tokens = torch.tensor([[False, True, True]])
    heard = maps[0, :, :, 1:].sum(-1).sum(0)
    want = heard[1:].sum() / (3 * 2) - heard[0] / (1 * 2)
    torch.testing.assert_close(centralization([maps], hole, tokens), want[None])
    blind = torch.rand(1, 2, 1, 3).double()  # one query: no cell lies wholly inside, the layer counts 0
    torch.testing.assert_close(centralization([maps, blind], hole, tokens), want[None] / 2)


def test_words_are_heard_in_the_hole_only() -> None:
    asked = task()
    hole, ctx = asked.latent_mask, asked.context()
    denoiser = controlled(asked.denoiser, Watch(key="before"), Confine(mask=hole), Watch(key="after"))
    cfg(2.0)(denoiser)(asked.x0, 0.5, ctx)
    for (_, before), (_, after) in zip(watched(ctx, "before"), watched(ctx, "after"), strict=True):
        inside = queries(hole, before).bool().repeat(2, 1)
        assert inside.any() and not inside.all()
        assert torch.equal(after[..., :1], before[..., :1])
        for got, was, where in zip(after, before, inside, strict=True):
            assert torch.equal(got[:, where], was[:, where]) and not got[:, ~where, 1:].any()


def test_the_weights_of_time() -> None:
    method = Pilot()
    assert method.speed(1.0) == 0.007 and method.speed(0.5) == pytest.approx(0.03 * 1.002**500)
    assert method.weight(0.2) == pytest.approx(13) and method.weight(1.0) == pytest.approx(130)


def test_a_whole_hole_is_plain_sampling() -> None:
    asked = task(mask=torch.ones(N, 1, SIDE, SIDE))
    out = Pilot(gamma=0.7, interval=2, inner=2, semantic=0.0, confine=False)(asked)
    ctx = asked.context()
    noise = ctx.draw(asked.process.space, asked.x0)
    torch.testing.assert_close(out, asked.run(noise, ctx=ctx).x, rtol=1e-10, atol=1e-10)


def test_a_model_without_text_and_a_diffusers_one() -> None:
    pytest.importorskip("diffusers")
    from sfumato.interop import tiny

    made = sf.from_diffusers(tiny.pipeline("sd"))
    image = torch.randint(0, 256, (1, 3, *made.size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    mask = torch.zeros(made.size)
    mask[: made.size[0] // 2] = 1
    out = editing.perform(made, image, "a dog", method=METHOD, mask=mask, steps=3, guidance=2.0)
    assert out.state.isfinite().all()
    digits = sf.load("digits")
    picture = torch.zeros(
        1,
        digits.codec.images(torch.zeros(1, *digits.codec.shape(*digits.size))).shape[1],
        *digits.size,
        dtype=torch.uint8,
    )
    half = torch.zeros(digits.size)
    half[: digits.size[0] // 2] = 1
    assert editing.perform(digits, picture, method=METHOD, mask=half, steps=3, guidance=1.0).state.isfinite().all()


@pytest.mark.parametrize(
    "numbers", [{"gamma": 2.0}, {"momentum": 1.0}, {"interval": 0}, {"semantic": -1.0}, {"rate": -1.0}]
)
def test_wrong_numbers_are_refused(numbers: dict[str, float]) -> None:
    with pytest.raises(InputError):
        Pilot(**numbers)


def test_wrong_use_is_refused() -> None:
    with pytest.raises(InputError, match="mask"):
        Pilot().check("pilot", frozenset({"prompt"}))
    with pytest.raises(InputError, match="mask="):
        Confine()(At("", True, 0.5, 0, Context.of(1)), torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1))
    still = solvers.get("ddim")
    with pytest.raises(InputError, match="one clock"):
        Descend(still, still, lambda x, t, ctx: x.sum(1), lambda t: 0.1).step(
            Step(torch.zeros(1, 2), torch.ones(1)), 0.5, task().denoiser, Context.of(1)
        )
