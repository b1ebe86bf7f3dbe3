"""Projected, perpendicular, auto- and regional guidance: what each is equal to, on exact beliefs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from sfumato import gradients, grids, guidance, solvers
from sfumato.core import Context, Denoiser, InputError, Posterior, Wrapper, linear, sample
from sfumato.denoisers import parametrized
from sfumato.denoisers.mixtures import Mixture
from sfumato.denoisers.oracles import Gaussian
from sfumato.guidance import apg, autoguidance, box, cfg, negative, perp_neg, regional, regions
from sfumato.processes import EDM, VP, Flow

PROCESSES = {"vp": VP(), "edm": EDM(), "flow": Flow()}
laws = pytest.mark.parametrize("law", list(PROCESSES))
MEANS = [[-1.2, 0.3, 0.4], [0.9, 0.9, -0.6], [0.5, -1.1, 0.1]]
STDS = [[0.35, 0.2, 0.3], [0.25, 0.45, 0.2], [0.5, 0.3, 0.6]]
PARTS = [Gaussian(m, torch.tensor(s).double() ** 2) for m, s in zip(MEANS, STDS, strict=True)]
NULL = 3
LABEL = torch.tensor([0, 1, 2, 1])
X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def exact(law: str = "vp") -> Denoiser:
    return Mixture(PARTS, [0.5, 0.3, 0.2]).labelled(PROCESSES[law])


def context(**more: Any) -> Context:
    return Context.of(4, None, cond={"label": LABEL} | more, dtype=torch.float64)


def away(*labels: int) -> dict[str, Any]:
    return negative(*({"label": torch.full((4,), k)} for k in labels))


def same(a: Posterior, b: Posterior) -> None:
    for kind in ("x0", "eps"):
        assert torch.allclose(a.view(kind), b.view(kind), rtol=1e-9, atol=1e-9)


class Nulled(Wrapper):
    """The same model without its condition."""

    def forward(self, x: Any, t: Any, ctx: Context) -> Any:
        return self.inner(x, t, ctx.fork(cond={"label": torch.full_like(ctx.cond["label"], NULL)}))


class Moved(Wrapper):
    """Pulls x0 in and keeps eps: x moves, as under clipping."""

    def forward(self, x: Any, t: Any, ctx: Context) -> Any:
        post = self.inner(x, t, ctx)
        return post.but(keep=("eps",), x0=0.5 * post.mean)


# Negative prompts


@laws
def test_a_negative_prompt_takes_the_place_of_the_null(law: str) -> None:
    for label in (0, 2, NULL):
        told = cfg(3.0)(exact(law))(X, 0.6, context(**away(label)))
        same(told, cfg(3.0, null={"label": label})(exact(law))(X, 0.6, context()))
    same(cfg(3.0)(exact(law))(X, 0.6, context(**away(NULL))), cfg(3.0)(exact(law))(X, 0.6, context()))


def test_a_negative_prompt_is_never_ignored() -> None:
    with pytest.raises(InputError, match="2 negative prompts: cfg takes one, 'perp-neg' takes several"):
        cfg(3.0)(exact())(X, 0.5, context(**away(0, 1)))
    with pytest.raises(InputError, match="give one of them"):
        cfg(3.0, null={"label": 1})(exact())(X, 0.5, context(**away(0)))
    with pytest.raises(InputError, match="perp-neg needs a negative prompt"):
        perp_neg(3.0)(exact())(X, 0.5, context())
    net = parametrized(Text(), VP(), "x0")
    with pytest.raises(InputError, match=r"reads no condition \['negative.0/text'\]"):
        net(X, 0.5, Context.of(4, None, cond={"text": X, "negative.0/text": X}))
    inside = Context.of(4, None, cond={"text": X, "negative.0/text": X})
    assert torch.equal(
        cfg(2.0, interval=(0.0, 0.2))(net)(X, 0.5, inside).mean, net(X, 0.5, Context.of(4, None, cond={"text": X})).mean
    )


class Text(nn.Module):
    def forward(self, x: Tensor, label: Tensor, text: Tensor) -> Tensor:
        return 0.5 * x + text.to(x)


# Adaptive projected guidance


@laws
@given(scale=st.floats(0, 12), t=st.floats(0.05, 0.95))
def test_apg_that_takes_nothing_out_is_cfg(law: str, scale: float, t: float) -> None:
    ours = apg(scale, eta=1.0, momentum=0.0)(exact(law))(X, t, context())
    theirs = cfg(scale)(exact(law))(X, t, context())
    assert torch.allclose(ours.mean, theirs.mean, rtol=1e-9, atol=1e-9 * (1 + scale))


@pytest.mark.parametrize("t", [0.0, 1.0])
def test_apg_at_both_ends_of_time(t: float) -> None:
    post = apg(5.0)(exact("flow"))(X, t, context())
    assert post.at(0.5, 0.5).isfinite().all()
    if t == 0.0:
        same(post, cfg(5.0)(exact("flow"))(X, t, context()))


@laws
def test_apg_is_its_equations(law: str) -> None:
    """What is added is perpendicular to the conditional x0 (eta = 0), no longer than the bound, and remembers a step."""
    conditional, free = (cfg(s)(exact(law))(X, 0.6, context()).mean for s in (1.0, 0.0))
    added = apg(4.0, momentum=0.0)(exact(law))(X, 0.6, context()).mean - conditional
    assert torch.allclose((added * conditional).sum(1), torch.zeros(4).double(), atol=1e-9)
    along = ((conditional - free) * conditional).sum(1, keepdim=True) / conditional.square().sum(1, keepdim=True)
    assert torch.allclose(added, 3 * (conditional - free - along * conditional), atol=1e-9)
    bound = 0.05
    short = apg(4.0, eta=1.0, bound=bound, momentum=0.0)(exact(law))(X, 0.6, context()).mean - conditional
    size = short.square().mean(1).sqrt() / 3
    full = (conditional - free).square().mean(1).sqrt()
    assert torch.allclose(size, full.clamp(max=bound)) and (full > bound).any()


def test_apg_remembers_accepted_steps_only() -> None:
    """The second step sees the first one's difference; trial calls of a step change nothing."""
    denoiser, ctx = apg(3.0, eta=1.0, momentum=-0.5)(exact()), context()
    once = denoiser(X, 0.6, ctx)
    same(once, denoiser(X, 0.6, ctx))
    for fn in ctx.run.accepted:
        fn(X, 0.5)
    twice = denoiser(X, 0.6, ctx)
    conditional, free = (cfg(s)(exact())(X, 0.6, context()).mean for s in (1.0, 0.0))
    assert torch.allclose(twice.mean, conditional + 2 * 0.5 * (conditional - free), atol=1e-9)
    look = ctx.fork(look=True)
    same(denoiser(X, 0.6, look), twice)


def test_apg_with_momentum_is_differentiated_through_checkpoints() -> None:
    """The memory of accepted steps is recomputed as it was."""
    found = []
    for method in ("plain", "checkpoint"):
        x = X.clone().requires_grad_()
        y = gradients.sample(apg(3.0, bound=0.3)(exact()), method=method, x=x, cond={"label": LABEL}, steps=5)
        found.append(torch.autograd.grad(y.square().sum(), x)[0])
    assert torch.allclose(*found, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    "numbers", [{"bound": 0.0}, {"bound": -1.0}, {"momentum": 1.0}, {"momentum": -1.5}, {"interval": (1, 0)}]
)
def test_apg_refuses_impossible_numbers(numbers: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="bound = |momentum = |interval = "):
        apg(2.0, **numbers)(exact())


# Perp-Neg


@laws
@pytest.mark.parametrize("batched", [True, False])
def test_perp_neg_of_nothing_new_is_cfg(law: str, batched: bool) -> None:
    """The null is no direction; the prompt itself has no perpendicular part."""
    plain = cfg(4.0)(exact(law))(X, 0.6, context())
    given = perp_neg(4.0, weight=0.7, batched=batched)(exact(law))
    same(given(X, 0.6, context(**away(NULL))), plain)
    same(given(X, 0.6, context(**negative({"label": LABEL}))), plain)
    same(
        perp_neg(4.0, negative=[{"label": torch.tensor([NULL])}], batched=batched)(exact(law))(X, 0.6, context()), plain
    )


@laws
def test_perp_neg_is_its_equation(law: str) -> None:
    """And the part taken away is perpendicular to the prompt's direction, in any reading."""
    null = torch.full((4,), NULL)
    free, wanted, one, two = (
        exact(law)(X, 0.6, Context.of(4, None, cond={"label": k})) for k in (null, LABEL, null * 0, null * 0 + 2)
    )
    post = perp_neg(5.0, weight=(0.8, 0.3))(exact(law))(X, 0.6, context(**away(0, 2)))
    for kind in ("eps", "x0"):
        u, p = free.view(kind), wanted.view(kind) - free.view(kind)
        total = p.clone()
        for w, n in ((0.8, one), (0.3, two)):
            d = n.view(kind) - u
            total -= w * (d - (d * p).sum(1, keepdim=True) / p.square().sum(1, keepdim=True) * p)
        assert torch.allclose(post.view(kind), u + 5 * total, rtol=1e-8, atol=1e-8)
        moved = (post.view(kind) - u) / 5 - p
        assert torch.allclose((moved * p).sum(1), torch.zeros(4).double(), atol=1e-8)


def test_perp_neg_counts_its_calls_and_weights() -> None:
    ctx = context(**away(0, 2))
    perp_neg(3.0)(exact())(X, 0.5, ctx)
    assert ctx.run.nfe == 4
    with pytest.raises(InputError, match="3 weights for 2 negative prompts"):
        perp_neg(3.0, weight=(1, 2, 3))(exact())(X, 0.5, context(**away(0, 2)))


# Autoguidance


@laws
def test_autoguidance_by_the_unconditional_model_is_cfg(law: str) -> None:
    ours = autoguidance(3.0, worse=Nulled(exact(law)))(exact(law))
    same(ours(X, 0.6, context()), cfg(3.0)(exact(law))(X, 0.6, context()))
    ctx = context()
    ours(X, 0.6, ctx)
    assert ctx.run.nfe == 2
    ctx = context()
    autoguidance(1.0, worse=exact(law))(exact(law))(X, 0.6, ctx)
    assert ctx.run.nfe == 1


def test_autoguidance_by_itself_is_itself() -> None:
    same(autoguidance(7.0, worse=exact())(exact())(X, 0.4, context()), exact()(X, 0.4, context()))


def test_autoguidance_by_the_same_law_with_more_variance_sharpens() -> None:
    """N(0, 1) against N(0, 2): the guided law is the Gaussian that the two scores say, narrower than the model's."""
    better, worse = (Gaussian([0.0], v).denoiser(VP()) for v in (1.0, 2.0))
    y = sample(
        autoguidance(2.0, worse=worse)(better),
        solvers.get("ddim"),
        grids.get("uniform"),
        200,
        shape=(4000, 1),
        dtype=torch.float64,
    )
    assert 0.3 < float(y.std()) < 0.9


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Linear(3, 3).double() for _ in range(2))

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        return self.second(self.first(x))


def test_skipped_submodules_are_the_worse_model() -> None:
    torch.manual_seed(0)
    net = Stack()
    ctx = Context.of(4, None)
    post = autoguidance(2.0, skip=("first",))(parametrized(net, VP(), "eps"))(X, 0.5, ctx)
    assert torch.allclose(post.native, 2 * net.second(net.first(X)) - net.second(X)) and ctx.run.nfe == 2
    with pytest.raises(InputError, match="no submodule 'third' to tap"):
        autoguidance(2.0, skip=("third",))(parametrized(net, VP(), "eps"))(X, 0.5, ctx)


def test_autoguidance_says_what_it_needs() -> None:
    for numbers in ({}, {"worse": exact(), "skip": ("first",)}):
        with pytest.raises(InputError, match="needs a worse model"):
            autoguidance(2.0, **numbers)(exact())
    with pytest.raises(InputError, match="follows Flow.*sf.denoisers.converted"):
        autoguidance(2.0, worse=exact("flow"))(exact("vp"))
    with pytest.raises(InputError, match="'early' is the name of a model"):
        autoguidance(2.0, worse="early")(exact())


# Regional prompts


class Halves(Denoiser):
    """A law whose two halves are independent given the label: each half is N(mean of the label, variance of the label)."""

    def __init__(self, process: Any) -> None:
        super().__init__()
        self.process, self.null = process, {"label": 0}

    def forward(self, x: Tensor, t: Any, ctx: Context) -> Posterior:
        c = self.process.coef(t)
        k = ctx.cond["label"].to(x)[:, None]
        mean, variance = k - 0.5, 0.2 + 0.3 * k
        total = c.alpha**2 * variance + c.sigma**2
        x0 = mean + c.alpha * variance / total * (x - c.alpha * mean)
        eps = c.sigma / total * (x - c.alpha * mean)
        ctx.run.nfe += len(x) / ctx.batch
        return Posterior(linear(-c.sigma, x0, c.alpha, eps), "v", x, c)


def labelled(k: int, n: int = 1) -> dict[str, Tensor]:
    return {"label": torch.full((n,), k)}


@laws
@pytest.mark.parametrize("name", ["dpm-solver++", "heun", "ddpm"])
def test_two_halves_of_a_factorising_law_are_exactly_their_own(law: str, name: str) -> None:
    denoiser, solver = Halves(PROCESSES[law]), solvers.get(name)
    left = torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    options: dict[str, Any] = {"shape": (5, 4), "seed": 3, "dtype": torch.float64}
    cond = labelled(0, 5) | regions(5, (left, labelled(1)), (1 - left, labelled(2)))
    grid = grids.get("uniform")
    both = sample(regional(0.0)(denoiser), solver, grid, 8, cond=cond, **options)
    one, two = (sample(denoiser, solver, grid, 8, cond=labelled(k, 5), **options) for k in (1, 2))
    assert torch.allclose(both[:, :2], one[:, :2], rtol=1e-9, atol=1e-9)
    assert torch.allclose(both[:, 2:], two[:, 2:], rtol=1e-9, atol=1e-9)


@laws
@pytest.mark.parametrize("batched", [True, False])
def test_one_full_mask_is_the_plain_prompt(law: str, batched: bool) -> None:
    cond = regions(4, (torch.ones(1, 3), labelled(2)))
    ours = regional(0.0, batched=batched)(exact(law))(X, 0.6, context(**cond))
    same(ours, exact(law)(X, 0.6, Context.of(4, None, cond=labelled(2, 4))))
    background = regional(1.0, batched=batched)(exact(law))(X, 0.6, context(**cond))
    same(background, exact(law)(X, 0.6, context()))


def test_guidance_inside_guides_each_region() -> None:
    """Also where it moves the state; and by linearity as guidance outside, in an unguided background's place."""
    mask = torch.tensor([[1.0, 0.5, 0.0]])
    cond = regions(4, (mask, labelled(2)))
    ctx = context(**cond)
    post = regional(0.0)(cfg(3.0)(Moved(exact())))(X, 0.6, ctx)
    assert ctx.run.nfe == 4
    inside = cfg(3.0)(Moved(exact()))(X, 0.6, Context.of(4, None, cond=labelled(2, 4)))
    outside = cfg(3.0)(Moved(exact()))(X, 0.6, context())
    for kind in ("x0", "eps"):
        assert torch.allclose(post.view(kind), mask * inside.view(kind) + (1 - mask) * outside.view(kind), atol=1e-9)


def test_overlaps_are_shared_and_the_background_is_bounded() -> None:
    full = torch.ones(1, 3)
    cond = regions(4, (full, labelled(0)), (full, labelled(2)))
    post = regional(0.25)(exact())(X, 0.6, context(**cond)).mean
    each = [
        exact()(X, 0.6, Context.of(4, None, cond={"label": k})).mean
        for k in (torch.zeros(4).long(), torch.full((4,), 2), LABEL)
    ]
    assert torch.allclose(post, 0.375 * each[0] + 0.375 * each[1] + 0.25 * each[2], atol=1e-9)


def test_regions_with_negatives_and_other_batches() -> None:
    """Item i does not depend on its batch, and the sets keep apart."""
    masks = torch.rand(4, 3, generator=torch.Generator().manual_seed(1))
    cond = {"label": LABEL} | regions(4, (masks, labelled(0))) | away(1)
    denoiser = regional(0.1)(apg(3.0, momentum=0.0)(exact()))
    post = denoiser(X, 0.6, Context.of(4, None, cond=cond))
    part = denoiser(X[1:3], 0.6, Context.of(2, None, cond={k: v[1:3] for k, v in cond.items()}))
    assert torch.allclose(part.mean, post.mean[1:3], atol=1e-12)


@given(st.floats(0, 0.9), st.floats(0, 0.9), st.floats(0.05, 1), st.floats(0.05, 1))
def test_a_box_covers_its_area(left: float, top: float, width: float, height: float) -> None:
    right, bottom = min(left + width, 1.0), min(top + height, 1.0)
    mask = box(left, top, right, bottom, (12, 20))
    assert mask.shape == (1, 1, 12, 20) and mask.min() >= 0 and mask.max() <= 1 + 1e-6
    assert float(mask.mean()) == pytest.approx((right - left) * (bottom - top), abs=1e-5)


def test_masks_follow_the_resolution_of_the_state() -> None:
    """A mask in pixels is averaged down to a latent's cells."""
    mask = box(0.0, 0.0, 0.5, 1.0, (8, 8))

    class Flat(Denoiser):
        process, null = Flow(), {"label": 0}

        def forward(self, x: Tensor, t: Any, ctx: Context) -> Posterior:
            return Posterior(ctx.cond["label"].to(x).view(-1, 1, 1, 1).expand_as(x), "x0", x, self.process.coef(t))

    cond = labelled(1, 2) | regions(2, (mask, labelled(3)))
    x0 = regional(0.0)(Flat())(torch.zeros(2, 1, 4, 4), 0.5, Context.of(2, None, cond=cond)).mean
    assert torch.equal(x0[0, 0], torch.tensor([[3.0, 3.0, 1.0, 1.0]]).expand(4, 4))


def test_regions_say_what_is_wrong() -> None:
    with pytest.raises(InputError, match="no regions"):
        regional()(exact())(X, 0.5, context())
    with pytest.raises(InputError, match="background = 1.5"):
        regional(1.5)(exact())
    with pytest.raises(InputError, match="a box is left, top"):
        box(0.5, 0.0, 0.5, 1.0, (4, 4))
    with pytest.raises(InputError, match="a mask is a float tensor"):
        regions(4, (torch.full((1, 3), 1.5), labelled(0)))
    with pytest.raises(InputError, match=r"a mask \(4, 5\) does not fit states \(4, 3\)"):
        regional()(exact())(X, 0.5, context(**regions(4, (torch.ones(1, 5), labelled(0)))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spec", ["apg(scale=3, bound=0.2)", "perp-neg(scale=3)", "cfg(scale=3)"])
def test_dtypes_agree(spec: str, dtype: torch.dtype) -> None:
    """And a run item by item is the run of all."""
    denoiser = guidance.get(spec)(exact("flow"))
    cond = {"label": LABEL} | away(1)
    run = lambda rows, d: sample(  # noqa: E731
        denoiser,
        solvers.get("dpm-solver++"),
        grids.get("arctan"),
        6,
        x=X[rows].to(d),
        cond={k: v[rows] for k, v in cond.items()},
    )
    whole = run(slice(0, 4), dtype)
    assert whole.dtype == dtype and torch.allclose(whole.double(), run(slice(0, 4), torch.float64), atol=1e-4)
    assert torch.allclose(run(slice(2, 3), dtype), whole[2:3], atol=1e-5)


# Two scales


class Told(Denoiser):
    """x0 is a sum of what is told: numbers of words and of a picture."""

    process, null = VP(), {"words": 0.0}

    def forward(self, x: Any, t: Any, ctx: Context) -> Posterior:
        ctx.run.nfe += len(x) / ctx.batch
        return Posterior(0.1 * x + ctx.cond["words"] + ctx.cond["picture"].flatten(1), "x0", x, self.process.coef(t))


def told(**more: Any) -> Context:
    cond = {"words": torch.full((4, 3), 2.0), "picture": torch.full((4, 1, 3), 5.0)}
    return Context.of(4, None, cond={k: v.double() for k, v in cond.items()} | more, dtype=torch.float64)


def test_two_scales_are_what_they_say() -> None:
    one = guidance.dual(3.0, 1.5, images=("picture",))(Told())
    ctx = told()
    assert torch.allclose(one(X, 0.5, ctx).mean, 0.1 * X + 1.5 * 5.0 + 3.0 * 2.0) and ctx.run.nfe == 3
    apart = guidance.dual(3.0, 1.5, images=("picture",), batched=False)(Told())
    same(apart(X, 0.5, told()), one(X, 0.5, told()))
    both = cfg(2.5, null={"words": 0.0, "picture": 0.0})(Told())
    same(guidance.dual(2.5, 2.5, images=("picture",))(Told())(X, 0.5, told()), both(X, 0.5, told()))
    words = guidance.dual(3.0, 1.0, images=("picture",))(Told())
    same(words(X, 0.5, told()), cfg(3.0)(Told())(X, 0.5, told()))
    off = guidance.dual(3.0, 2.0, images=("picture",), interval=(0.6, 1.0))(Told())
    ctx = told()
    same(off(X, 0.5, ctx), Told()(X, 0.5, told()))
    assert ctx.run.nfe == 1
    clock = torch.tensor([0.5, 0.7, 0.5, 0.9], dtype=torch.float64)
    inside, outside = off(X, 0.7, told()).mean, off(X, 0.5, told()).mean
    mixed = off(X, clock, told()).mean
    assert torch.allclose(mixed[[1, 3]], inside[[1, 3]]) and torch.allclose(mixed[[0, 2]], outside[[0, 2]])
    dull = negative({"words": torch.full((4, 3), -1.0, dtype=torch.float64)})
    assert torch.allclose(one(X, 0.5, told(**dull)).mean, 0.1 * X - 1.0 + 1.5 * 5.0 + 3.0 * 3.0)
    with pytest.raises(InputError, match="no picture among"):
        guidance.dual(3.0)(Told())(X, 0.5, told())
