"""Classifier-free guidance against exact guided scores, and its algebra."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributions import Independent, Normal

from sfumato import grids, solvers
from sfumato.core import Context, Denoiser, InputError, Posterior, Wrapper, linear, row, sample
from sfumato.denoisers import parametrized
from sfumato.denoisers.parametrized import edm_row
from sfumato.guidance import cfg
from sfumato.oracles import Gaussian
from sfumato.processes import DDPM, EDM, VE, VP, Cosine, Flow

PROCESSES = {"vp": VP(), "ve": VE(), "edm": EDM(), "flow": Flow(), "cosine": Cosine(), "ddpm": DDPM()}
KINDS = ("x0", "eps", "v", "flow", "score", "edm")
MEANS = torch.tensor([[-1.2, 0.3, 0.4], [0.9, 0.9, -0.6], [0.5, -1.1, 0.1]]).double()
STDS = torch.tensor([[0.35, 0.2, 0.3], [0.25, 0.45, 0.2], [0.5, 0.3, 0.6]]).double()
WEIGHTS = torch.tensor([0.5, 0.3, 0.2]).double()
NULL = 3


def log_density(x: Tensor, a: Any, s: Any, label: Tensor) -> Tensor:
    """log p(x_t | label), (B,); label 3 is the whole mixture."""
    each = Independent(Normal(a * MEANS, (a**2 * STDS**2 + s**2).sqrt()), 1).log_prob(x[:, None])
    logits = each + WEIGHTS.log()
    own = label[:, None] == torch.arange(3)
    return torch.where(label == NULL, logits.logsumexp(-1), each.masked_fill(~own, 0.0).sum(-1))


def score(x: Tensor, t: Any, label: Tensor, process: Any) -> Tensor:
    c = process.coef(t)
    a, s = (v[:, None, None] if isinstance(v, Tensor) else torch.tensor(v) for v in c[:2])
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad(log_density(x, a, s, label).sum(), x)[0]


class Exact(Denoiser):
    """The exact belief of the mixture given its component, said as ``kind``: Tweedie's formula on the density above."""

    def __init__(self, process: Any, kind: str = "v", null: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.process, self.kind, self.null = process, kind, {"label": NULL} if null is None else null
        self.calls: list[int] = []

    def forward(self, x: Tensor, t: Any, ctx: Context) -> Posterior:
        c = self.process.coef(t)
        eps = linear(-c.sigma, score(x, t, ctx.cond["label"], self.process))
        x0 = linear(1 / c.alpha, linear(1.0, x, -c.sigma, eps))
        p, q = edm_row(c, 0.5) if self.kind == "edm" else row(self.kind, c)
        ctx.run.nfe += len(x) / ctx.batch
        self.calls.append(len(x))
        return Posterior(linear(p, x0, q, eps), (p, q) if self.kind == "edm" else self.kind, x, c)


LABEL = torch.tensor([0, 1, 2, 1])
X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def context(label: Tensor = LABEL, **fields: Any) -> Context:
    return Context.of(len(label), None, cond={"label": label}, **fields)


@pytest.mark.parametrize("law", list(PROCESSES))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batched", [True, False])
def test_the_guided_score_is_exact(law: str, kind: str, batched: bool) -> None:
    """score(x) + scale (score(x | c) - score(x)), the same in every native kind, batched or not."""
    process = PROCESSES[law]
    for t in (0.3, 0.7):
        x = X * (1 + process.coef(t).sigma)
        for scale in (0.0, 0.5, 3.0, 7.5):
            post = cfg(scale, batched=batched)(Exact(process, kind))(x, t, context())
            free, given = (score(x, t, label, process) for label in (torch.full((4,), NULL), LABEL))
            assert torch.allclose(post.view("score"), free + scale * (given - free), rtol=1e-8, atol=1e-8)
            assert post.x is x and post.var is None


@given(scale=st.floats(-2, 20), t=st.floats(0.05, 0.95))
def test_both_ways_to_call_agree(scale: float, t: float) -> None:
    one, two = (cfg(scale, batched=b)(Exact(Flow()))(X, t, context()) for b in (True, False))
    assert torch.allclose(one.native, two.native, rtol=1e-9, atol=1e-9 * (1 + abs(scale)))


@pytest.mark.parametrize("batched", [True, False])
def test_scale_1_is_the_conditional_and_costs_one_call(batched: bool) -> None:
    inner, ctx = Exact(VP()), context()
    post = cfg(1.0, batched=batched)(inner)(X, 0.5, ctx)
    assert torch.equal(post.native, Exact(VP())(X, 0.5, context()).native)
    assert inner.calls == [4] and ctx.run.nfe == 1
    inner, ctx = Exact(VP(), null={}), context()
    assert torch.equal(cfg(1.0)(inner)(X, 0.5, ctx).native, post.native), "it asks for no null either"


@pytest.mark.parametrize(("batched", "calls"), [(True, [8]), (False, [4, 4])])
def test_any_other_scale_costs_two(batched: bool, calls: list[int]) -> None:
    inner, ctx = Exact(VP()), context()
    cfg(2.0, batched=batched)(inner)(X, 0.5, ctx)
    assert inner.calls == calls and ctx.run.nfe == 2


def test_guidance_only_inside_its_interval() -> None:
    plain, full = Exact(VP()), cfg(4.0)(Exact(VP()))
    guided = cfg(4.0, interval=(0.25, 0.75))(Exact(VP()))
    for t, inside in (
        (0.1, False),
        (0.2499, False),
        (0.25, True),
        (0.5, True),
        (0.75, True),
        (0.7501, False),
        (1.0, False),
    ):
        ctx = context()
        post = guided(X, t, ctx)
        assert torch.equal(post.native, (full if inside else plain)(X, t, context()).native)
        assert ctx.run.nfe == (2 if inside else 1)
    ctx = context()
    ctx.rng = Context.of(4).rng
    sample(guided, solvers.get("ddim"), grids.get("uniform"), 10, shape=(4, 3), ctx=ctx)
    assert ctx.run.nfe == 10 + sum(0.25 <= i / 10 <= 0.75 for i in range(1, 11))


@given(rescale=st.floats(0, 1), scale=st.floats(1.5, 12))
def test_rescaling_moves_the_std_towards_the_conditional_one(rescale: float, scale: float) -> None:
    """Exactly there at 1, linearly in between, item by item."""
    given = Exact(VP())(X, 0.5, context()).mean.std(1)
    plain = cfg(scale)(Exact(VP()))(X, 0.5, context()).mean
    post = cfg(scale, rescale=rescale)(Exact(VP()))(X, 0.5, context())
    assert torch.allclose(post.mean.std(1), rescale * given + (1 - rescale) * plain.std(1), rtol=1e-9)
    assert torch.allclose(post.mean / post.mean.norm(dim=1, keepdim=True), plain / plain.norm(dim=1, keepdim=True))
    assert torch.allclose(post.x, X) and torch.allclose(post.at(*post.coef[:2]), X)


def test_rescaling_of_a_belief_without_spread_changes_nothing() -> None:
    """One entry an item, or entries that are all the same, have nothing to be rescaled: not 0 / 0."""
    law = Gaussian([0.5], [[0.3]]).denoiser(VP())
    for x in (torch.linspace(-2, 2, 4, dtype=torch.float64)[:, None], torch.zeros(4, 1, dtype=torch.float64)):
        ctx = Context.of(4, cond={"label": torch.zeros(4)}, dtype=torch.float64)
        null = {"label": 1.0}
        assert torch.equal(
            cfg(3.0, rescale=0.7, null=null)(law)(x, 0.5, ctx).mean, cfg(3.0, null=null)(law)(x, 0.5, ctx).mean
        )


@pytest.mark.parametrize("kind", KINDS)
def test_rescaling_is_the_same_in_every_kind(kind: str) -> None:
    post = cfg(5.0, rescale=0.7)(Exact(Flow(), kind))(X, 0.5, context())
    assert torch.allclose(post.mean, cfg(5.0, rescale=0.7)(Exact(Flow()))(X, 0.5, context()).mean, rtol=1e-9)


def test_nested_guidance_is_guidance_by_the_product() -> None:
    """The inner one acts on both readings; where the condition is null it has nothing to add."""
    for batched in (True, False):
        inner = Exact(VP())
        nested = cfg(2.0, batched=batched)(cfg(3.0, batched=batched)(inner))(X, 0.5, context())
        once = cfg(6.0)(Exact(VP()))(X, 0.5, context())
        assert torch.allclose(nested.mean, once.mean, rtol=1e-9)
        assert sum(inner.calls) == 16


class Clip(Wrapper):
    """Clamps x0 and keeps eps: a belief whose x is not the state."""

    def forward(self, x: Tensor, t: Any, ctx: Context) -> Posterior:
        post = self.inner(x, t, ctx)
        return post.but(keep=("eps",), x0=post.mean.clamp(-0.5, 0.5), aux={"raw": post.mean, "name": "clip"})


@pytest.mark.parametrize("kind", KINDS)
def test_beliefs_that_moved_their_state_are_extrapolated_as_pairs(kind: str) -> None:
    """x0 and eps both follow the guidance formula, batched or not."""
    free, given = (Clip(Exact(VP(), kind))(X, 0.5, context(label)) for label in (torch.full((4,), NULL), LABEL))
    assert not torch.allclose(given.x, X)
    for batched in (True, False):
        post = cfg(3.0, batched=batched)(Clip(Exact(VP(), kind)))(X, 0.5, context())
        for read in ("x0", "eps"):
            assert torch.allclose(post.view(read), 3 * given.view(read) - 2 * free.view(read), rtol=1e-8, atol=1e-9)
        assert torch.allclose(post.aux["raw"], given.aux["raw"]) and post.aux["name"] == "clip", (
            "the conditional half's"
        )


class Text(nn.Module):
    """Reads tokens (B, L, 2), a size (B,) and a table that all items share."""

    def forward(self, x: Tensor, label: Tensor, text: Tensor, size: Tensor | None = None, table: Any = None) -> Tensor:
        out = x + text.mean(1).repeat(1, 2)[:, : x.shape[1]]
        out = out if size is None else out * size[:, None]
        return out if table is None else out + table["shift"]


def test_null_conditions_take_the_shape_of_the_given_ones() -> None:
    """One row for all, one number for all, or the very shape; conditions without a null stay in both halves."""
    text, size = torch.randn(4, 5, 2, generator=torch.Generator().manual_seed(1)), torch.arange(1.0, 5.0)
    x, results = X.float(), []
    for null in (
        torch.zeros(5, 2),
        0.0,
        torch.zeros(1, 5, 2),
        torch.zeros(4, 5, 2),
        torch.zeros(2, dtype=torch.float64),
    ):
        for batched in (True, False):
            denoiser = parametrized(Text(), VP(), "x0", null={"text": null})
            ctx = Context.of(4, None, cond={"text": text, "size": size})
            results.append(cfg(3.0, batched=batched)(denoiser)(x, 0.5, ctx).mean)
    expected = (x + 3 * text.mean(1).repeat(1, 2)[:, :3]) * size[:, None]
    for y in results:
        assert torch.allclose(y, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(InputError, match=r"a null of shape \(7, 2\) cannot stand for conditions \(4, 5, 2\)"):
        cfg(3.0)(parametrized(Text(), VP(), "x0", null={"text": torch.zeros(7, 2)}))(x, 0.5, ctx)
    own = cfg(3.0, null={"size": 0.0})(parametrized(Text(), VP(), "x0"))
    ctx = Context.of(4, None, cond={"text": text, "size": size})
    assert torch.allclose(own(x, 0.5, ctx).mean, 3 * (x + text.mean(1).repeat(1, 2)[:, :3]) * size[:, None], atol=1e-5)


def test_what_cannot_be_stacked_says_so() -> None:
    table = {"shift": 2.0}
    denoiser = parametrized(Text(), VP(), "x0", null={"text": 0.0, "table": {"shift": 0.0}})
    cond = {"text": torch.ones(4, 5, 2), "table": table}
    with pytest.raises(InputError, match=r"cannot be stacked: use cfg\(..., batched=False\)"):
        cfg(2.0)(denoiser)(X.float(), 0.5, Context.of(4, None, cond=cond))
    y = cfg(2.0, batched=False)(denoiser)(X.float(), 0.5, Context.of(4, None, cond=cond)).mean
    assert torch.allclose(y, X.float() + 2.0 + 4.0)
    shared = parametrized(Text(), VP(), "x0", null={"text": 0.0})
    y = cfg(2.0)(shared)(X.float(), 0.5, Context.of(4, None, cond=cond)).mean
    assert torch.allclose(y, X.float() + 2.0 + 2.0), "the same for both halves"


@pytest.mark.parametrize("cond", [{}, {"caption": torch.zeros(4)}])
def test_without_a_null_condition_there_is_no_guidance(cond: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="no null condition for any of .*condition dropout; give null="):
        cfg(2.0)(Exact(VP()))(X, 0.5, Context.of(4, None, cond=cond))
    with pytest.raises(InputError, match="no null condition"):
        cfg(2.0)(Exact(VP(), null={}))(X, 0.5, context())


@pytest.mark.parametrize(
    "numbers",
    [{"interval": (0.5, 0.5)}, {"interval": (-0.1, 0.5)}, {"interval": (0.2, 1.1)}, {"interval": (math.nan, 0.5)},
     {"rescale": -0.1}, {"rescale": 1.1}, {"rescale": math.nan}],
)  # fmt: skip
def test_impossible_numbers_are_refused(numbers: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="interval = |rescale = "):
        cfg(2.0, **numbers)(Exact(VP()))


@pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf])
def test_a_scale_that_is_no_number_is_refused(scale: float) -> None:
    with pytest.raises(InputError, match="a finite scale"):
        cfg(scale)(parametrized(lambda x, label: x, Flow(), "flow"))


def test_a_guidance_is_a_denoiser_of_the_same_process() -> None:
    inner = Exact(VP())
    outer = cfg(2.0)(inner)
    assert outer.process is inner.process and outer.null is inner.null
    assert [type(m).__name__ for m in outer.modules()] == ["ClassifierFree", "Exact"]


def test_the_halves_have_their_own_memory() -> None:
    """Also when the interval turns guidance off and on again."""

    class Remember(Wrapper):
        def forward(self, x: Tensor, t: Any, ctx: Context) -> Posterior:
            ctx.memory.setdefault("rows", []).append(len(x))
            return self.inner(x, t, ctx)

    for batched, branches in (
        (True, {"both": [8], "conditional": [4]}),
        (False, {"conditional": [4, 4], "unconditional": [4]}),
    ):
        ctx = context()
        denoiser = cfg(2.0, interval=(0.0, 0.5), batched=batched)(Remember(Exact(VP())))
        denoiser(X, 0.9, ctx)
        denoiser(X, 0.4, ctx)
        assert {k: v["rows"] for k, v in ctx.memory.items()} == branches


def test_guided_sampling_reaches_the_condition() -> None:
    """Samples are in the component they were asked for; at scale 0 the condition is not heard."""
    label = torch.arange(3).repeat_interleave(60)
    inside = {}
    for scale in (0.0, 1.0, 4.0):
        y = sample(
            cfg(scale)(Exact(VP())), solvers.get("dpm-solver++"), grids.get("logsnr"), 15,
            shape=(180, 3), cond={"label": label}, dtype=torch.float64, seed=1,
        )  # fmt: skip
        each = torch.stack(
            [log_density(y, torch.tensor(1.0), torch.tensor(0.0), torch.full((180,), k)) for k in range(3)], -1
        )
        inside[scale] = float(((each + WEIGHTS.log()).argmax(-1) == label).double().mean())
    assert inside[0.0] < 0.6 and inside[1.0] > 0.97 and inside[4.0] > 0.97


def test_beliefs_without_gaussian_readings_cannot_be_extrapolated() -> None:
    class Tokens(Denoiser):
        process, null = VP(), {"label": NULL}

        def forward(self, x: Tensor, t: Any, ctx: Context) -> Any:
            return (x,)

    with pytest.raises(InputError, match="guidance of a tuple belief"):
        cfg(2.0, batched=False)(Tokens())(X, 0.5, context())
