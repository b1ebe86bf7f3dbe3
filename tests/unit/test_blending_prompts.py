"""Several prompts: averaged, interpolated and selected, on exact beliefs; and what an option is worth."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sfumato import grids, solvers
from sfumato.core import Context, InputError, Streams, sample, trajectory
from sfumato.denoisers.mixtures import Mixture
from sfumato.denoisers.oracles import Gaussian
from sfumato.guidance import also, alternating, cfg, composed, get, interpolated, selected, selections, switched
from sfumato.guidance.rules import BlackScholes, Cosine, Lowest, Random, gaussian_price, log_call_price
from sfumato.processes import VP, Flow

MEANS = torch.tensor([[1.0, 0.0], [-1.0, 0.5], [0.0, -1.0]], dtype=torch.float64)
LAW = Mixture([Gaussian(m, [0.2, 0.3]) for m in MEANS])
B = 6


def tell(*labels: int, n: int = B) -> dict[str, Any]:
    one, *others = ({"label": torch.full((n,), k)} for k in labels)
    return one | also(*others)


def context(cond: Any, seed: Any = 0, n: int = B) -> Context:
    return Context.of(n, seed, cond=cond, dtype=torch.float64)


def run(denoiser: Any, ctx: Context, steps: int = 12, solver: str = "ddpm", **options: Any) -> Tensor:
    options = options or {"shape": (ctx.batch, 2)}
    return sample(denoiser, solvers.registry.make(solver), grids.get("uniform"), steps, ctx=ctx, **options)


def near(x0: Tensor) -> Tensor:
    """A positive score of each item against each mean."""
    return 30 - torch.cdist(x0.double(), MEANS)


def test_composed_is_the_average_of_the_scores() -> None:
    oracle, x = LAW.labelled(Flow()), Streams.of(0, B).normal(torch.empty(B, 2, dtype=torch.float64))
    for batched in (True, False):
        got = composed([0.25, 0.75], batched=batched)(oracle)(x, 0.6, context(tell(0, 2)))
        each = [oracle(x, 0.6, context(tell(k))).view("score") for k in (0, 2)]
        torch.testing.assert_close(got.view("score"), 0.25 * each[0] + 0.75 * each[1])


def test_composed_around_guidance_is_the_published_form() -> None:
    """null + sum_i s w_i (belief_i - null)."""
    oracle, x = LAW.labelled(VP()), Streams.of(0, B).normal(torch.empty(B, 2, dtype=torch.float64))
    got = composed()(cfg(3.0)(oracle))(x, 0.4, context(tell(0, 1, 2)))
    null, *each = (oracle(x, 0.4, context(tell(k))).view("eps") for k in (3, 0, 1, 2))
    torch.testing.assert_close(got.view("eps"), null + sum(3.0 / 3 * (e - null) for e in each))


class Reader(torch.nn.Module):
    """A network that says what it was told."""

    def forward(self, x: Tensor, label: Tensor, *, text: Tensor, mask: Tensor, vendor: Tensor) -> Tensor:
        return x * 0 + (text * mask[..., None]).sum((1, 2))[:, None] + vendor[:, None]


def test_interpolated_features_and_united_masks() -> None:
    from sfumato.denoisers import parametrized

    net = parametrized(Reader(), VP(), "x0")
    text = torch.tensor([[[1.0], [0.0]], [[3.0], [5.0]]])
    mask = torch.tensor([[True, False], [True, True]])
    one, two = ({"text": text[i : i + 1].expand(B, -1, -1), "mask": mask[i : i + 1].expand(B, -1)} for i in (0, 1))
    same = {"vendor": torch.ones(B)}
    ctx = Context.of(B, 0, cond=one | same | also(two | {"vendor": torch.ones(1)}))
    got = interpolated([0.75, 0.25])(net)(torch.zeros(B, 1), 0.5, ctx).mean
    torch.testing.assert_close(got, torch.full((B, 1), 0.75 * 1 + 0.25 * 8 + 1))
    with pytest.raises(InputError, match="label"):
        interpolated()(LAW.labelled(VP()))(torch.zeros(B, 2), 0.5, context(tell(0, 1)))


WAYS = {
    "alternating": alternating(), "switched": switched(), "random": selected(Random()), "composed": composed(),
    "lowest": selected(Lowest(near)), "black-scholes": selected(BlackScholes(near)),
}  # fmt: skip


@pytest.mark.parametrize("process", [VP(), Flow()], ids=["vp", "flow"])
@pytest.mark.parametrize("name", list(WAYS))
def test_equal_prompts_are_one_prompt(process: Any, name: str) -> None:
    oracle = LAW.labelled(process)
    torch.testing.assert_close(run(WAYS[name](oracle), context(tell(1, 1, 1))), run(oracle, context(tell(1))))


def test_turns_are_taken_as_said() -> None:
    oracle = LAW.labelled(VP())
    for way, expected in (
        (alternating(), [0, 1, 2] * 4),
        (alternating(2), [0, 0, 1, 1, 2, 2] * 2),
        (switched(), [0] * 4 + [1] * 4 + [2] * 4),
    ):
        ctx = context(tell(0, 1, 2))
        run(way(oracle), ctx)
        assert selections(ctx).tolist() == [[k] * B for k in expected]
    ctx = context(tell(0, 1))
    run(switched(0.25)(oracle), ctx)
    assert selections(ctx)[:, 0].tolist() == [0] * 3 + [1] * 9
    torch.testing.assert_close(run(switched(0.0)(oracle), context(tell(0, 1))), run(oracle, context(tell(1))))


@pytest.mark.parametrize("solver", ["heun", "dpm-solver++", "ddpm"])
def test_a_choice_lasts_a_step_whatever_the_solver(solver: str) -> None:
    ctx = context(tell(0, 1))
    run(alternating()(LAW.labelled(VP())), ctx, solver=solver)
    assert selections(ctx)[:, 0].tolist() == [0, 1] * 6


def test_feedback_reads_the_last_belief() -> None:
    """The choice of a step is the lowest score of what was believed in the step before; the first is the first prompt's."""
    seen: list[Tensor] = []

    def score(x0: Tensor) -> Tensor:
        seen.append(x0)
        return near(x0)

    ctx = context(tell(0, 1, 2))
    rule = selected(Lowest(score))(LAW.labelled(VP()))
    run(rule, ctx, 20, "ddim")
    choices = selections(ctx)
    assert len(seen) == 19 and choices[0].tolist() == [0] * B
    assert torch.equal(choices[1:], torch.stack([near(x0).argmin(1) for x0 in seen]))
    assert len(choices.unique()) > 1


def test_a_choice_is_an_items_own() -> None:
    way = selected(BlackScholes(near))(LAW.labelled(VP()))
    whole, part = context(tell(0, 1, 2)), context(tell(0, 1, 2, n=2), n=2)
    part.rng = Streams.of(0, B).select([4, 2])
    x = run(way, whole)
    torch.testing.assert_close(run(way, part, shape=(2, 2)), x[[4, 2]])
    assert torch.equal(selections(part), selections(whole)[:, [4, 2]])
    again = context(tell(0, 1, 2))
    torch.testing.assert_close(run(way, again), x, rtol=0, atol=0)


def test_black_scholes_is_the_lowest_score() -> None:
    ends = [
        run(selected(rule)(LAW.labelled(VP())), context(tell(0, 1, 2)), 40)
        for rule in (BlackScholes(near), Lowest(near))
    ]
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=0)


scores = st.floats(1.0, 250.0)
numbers = {"volatility": st.floats(1e-4, 0.2), "steps": st.integers(2, 200)}


@given(a=scores, b=scores, after=st.data(), **numbers)
def test_the_cheaper_option_is_the_lower_score(a: float, b: float, after: Any, volatility: float, steps: int) -> None:
    """The call price grows with the spot price, so at one strike the choice never differs from the lowest score."""
    if abs(a - b) < 1e-3:
        return
    step = after.draw(st.integers(0, steps - 1))
    chosen = BlackScholes(near).choose(torch.tensor([[a, b]]), steps, step, volatility)
    assert int(chosen) == int(b < a)


@given(spot=scores, volatility=st.floats(0.01, 0.2), steps=st.integers(2, 200))
def test_the_published_kernel_is_zero(spot: float, volatility: float, steps: int) -> None:
    price = gaussian_price(torch.tensor([spot]), 100.0, 1 / steps, volatility, steps)
    assert abs(float(price)) <= 1e-10 * 100


@given(spot=st.floats(60.0, 160.0), volatility=st.floats(0.05, 0.3), maturity=st.floats(1.0, 50.0))
def test_the_call_price_is_the_expected_payoff(spot: float, volatility: float, maturity: float) -> None:
    """e^(-r tau) E[max(0, S exp((r - v^2/2) tau + v sqrt(tau) z) - K)], by quadrature."""
    rate, strike = 0.01, 100.0
    z = torch.linspace(-12, 12, 40_001, dtype=torch.float64)
    end = spot * ((rate - volatility**2 / 2) * maturity + volatility * math.sqrt(maturity) * z).exp()
    payoff = (end - strike).clamp(min=0) * (-z * z / 2).exp() / math.sqrt(2 * math.pi)
    expected = math.exp(-rate * maturity) * torch.trapezoid(payoff, z)
    got = log_call_price(torch.tensor([spot]), strike, rate, volatility, maturity).exp()
    torch.testing.assert_close(got[0], expected, rtol=1e-5, atol=1e-9)


def test_strikes_of_their_own_change_the_choice() -> None:
    spot = torch.tensor([[30.0, 33.0]])
    assert int(BlackScholes(near).choose(spot, 50, 10, 0.1)) == 0
    assert int(BlackScholes(near, strike=[60.0, 100.0]).choose(spot, 50, 10, 0.1)) == 1


def test_ties() -> None:
    even = torch.tensor([[20.0, 20.0]])
    assert int(BlackScholes(near).choose(even, 50, 10, 0.1)) == 0
    assert int(BlackScholes(near, kernel="pdf").choose(even, 50, 10, 0.1)) == 1


def test_cosine_scores() -> None:
    x = torch.tensor([[2.0, 0.0], [0.0, 3.0]])
    score = Cosine(lambda v: v, lambda v: v, torch.tensor([[1.0, 0.0], [1.0, 1.0]]), offset=1.0)
    torch.testing.assert_close(score(x), 100 * torch.tensor([[2.0, 1 + 0.5**0.5], [1.0, 1 + 0.5**0.5]]))


def test_names_on_the_command_line() -> None:
    for spec in ("composed", "interpolated", "alternating(every=2)", "switched(at=0.3)", "superposition(mode='and')"):
        assert callable(get(spec))


def test_bad_input_is_said() -> None:
    oracle, x = LAW.labelled(VP()), torch.zeros(B, 2, dtype=torch.float64)

    def ask(way: Any, cond: Any) -> Any:
        return way(oracle)(x, 0.5, context(cond))

    cases = (
        (lambda: ask(composed(), tell(0)), "also"),
        (lambda: ask(composed([1.0]), tell(0, 1)), "1 weights for 2"),
        (lambda: composed([0.7, 0.7])(oracle), "add up to 1"),
        (lambda: ask(composed(), tell(0) | also({"text": x})), "text"),
        (lambda: ask(switched(0.5), tell(0, 1, 2)), "two prompts"),
        (lambda: switched(1.5), "share"),
        (lambda: alternating(0), "at least 1"),
        (lambda: run(selected(BlackScholes(near))(oracle), context(tell(0, 1))), "6 items and 2 prompts"),
        (lambda: run(selected(BlackScholes(lambda v: near(v) - 99))(oracle), context(tell(0, 1, 2))), "positive"),
        (lambda: BlackScholes(near, kernel="put"), "cdf"),
        (lambda: BlackScholes(near, strike=-1.0), "positive"),
        (lambda: selections(context(tell(0))), "no selection"),
    )
    for call, words in cases:
        with pytest.raises(InputError, match=words):
            call()


def test_a_resumed_run_needs_its_context() -> None:
    way = selected(Lowest(near))(LAW.labelled(VP()))
    args = way, solvers.get("ddim"), grids.get("uniform"), 10
    steps = list(trajectory(*args, shape=(B, 2), ctx=context(tell(0, 1, 2))))
    with pytest.raises(InputError, match="last belief"):
        list(trajectory(*args, x=steps[5], ctx=context(tell(0, 1, 2))))
