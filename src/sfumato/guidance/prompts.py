"""Several prompts for one picture: averaged, interpolated, or one at a time by a rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from sfumato.core import Context, Denoiser, Guidance, InputError, Posterior, Wrapper, linear
from sfumato.guidance._beliefs import apart, beliefs, beside, combine, like
from sfumato.guidance._registry import register


def also(*conditions: Mapping[str, Any]) -> dict[str, Any]:
    """Further prompts as conditions beside those of the run: tensors of one row or of one row an item.

    ``cond = model.conditions(n, ["a cat"] * n) | sf.guidance.also(model.conditions(n, ["an apple"] * n))``. The guidances
    of this module and ``superposition`` read them; what a prompt does not name is the run's.
    """
    return beside("also", conditions)


def prompts(ctx: Context) -> list[dict[str, Any]]:
    """The run's own conditions and those of each prompt beside them. InputError where there is none."""
    own, others = apart(ctx.cond, "also")
    if not others:
        raise InputError(
            "one prompt only: give also=, --also, or put sf.guidance.also(conditions, ...) beside the conditions of the run"
        )
    for key in sorted({k for other in others for k in other} - set(own)):
        raise InputError(f"a prompt beside the run's has {key!r}, which the run's own conditions do not have")
    return [own, *(own | {k: like(v, own[k]) for k, v in other.items()} for other in others)]


def _shares(weights: Sequence[float] | None, n: int) -> list[float]:
    """One weight a prompt: the given ones, or equal ones."""
    found = [1.0 / n] * n if weights is None else [float(w) for w in weights]
    if len(found) != n:
        raise InputError(f"{len(found)} weights for {n} prompts: give one each")
    return found


def _check_weights(weights: Sequence[float] | None) -> None:
    """InputError unless they add up to 1."""
    if weights is not None and not abs(sum(weights) - 1) < 1e-6:
        raise InputError(f"weights add up to 1, not to {sum(weights):g}")


class Composed(Wrapper):
    """See :func:`composed`."""

    joins = True

    def __init__(self, inner: Denoiser, weights: Sequence[float] | None = None, batched: bool = True) -> None:
        super().__init__(inner)
        _check_weights(weights)
        self.weights, self.batched = weights, batched

    def forward(self, x: Any, t: Any, ctx: Context) -> Posterior:
        told = prompts(ctx)
        sets = {f"prompt {i}": cond for i, cond in enumerate(told)}
        found = beliefs(self.inner, x, t, ctx, sets, batched=self.batched, name="composed")
        return combine(found, _shares(self.weights, len(told)))


@register("composed")
def composed(weights: Sequence[float] | None = None, *, batched: bool = True) -> Guidance:
    """Composable diffusion: sum_i w_i belief_i, the prompts' scores averaged (equally, or by weights of sum 1).

    With guidance inside, ``composed()(cfg(s)(denoiser))``, it is null + sum_i s w_i (belief_i - null), the published form.
    It samples no law in particular: prompts that exclude each other meet between. One call a prompt. Source: Liu, Li,
    Du, Torralba, Tenenbaum, 2022, "Compositional Visual Generation with Composable Diffusion Models".
    """
    return lambda inner: Composed(inner, weights, batched)


class Interpolated(Wrapper):
    """See :func:`interpolated`."""

    joins = True

    def __init__(self, inner: Denoiser, weights: Sequence[float] | None = None) -> None:
        super().__init__(inner)
        _check_weights(weights)
        self.weights = weights

    def forward(self, x: Any, t: Any, ctx: Context) -> Any:
        told = prompts(ctx)
        shares = _shares(self.weights, len(told))
        cond = {key: _between(key, [c[key] for c in told], shares) for key in told[0]}
        return self.inner(x, t, ctx.fork("interpolated", cond=cond))


def _between(key: str, values: list[Any], shares: list[float]) -> Any:
    """The condition ``key`` between those of the prompts."""
    one = values[0]
    if isinstance(one, Tensor) and one.is_floating_point():
        return linear(*(v for pair in zip(shares, values, strict=True) for v in pair))
    if isinstance(one, Tensor) and one.dtype == torch.bool:  # masks of padding: any prompt's token is there
        return torch.stack(values).any(0)
    if all(v is one or (isinstance(one, Tensor) and torch.equal(v, one)) for v in values):
        return one
    raise InputError(f"nothing lies between different values of {key!r}, a class: keep it the same in all prompts")


@register("interpolated")
def interpolated(weights: Sequence[float] | None = None) -> Guidance:
    """Linear interpolation of the prompts' features, sum_i w_i c_i (equal weights, or those of sum 1): one call a step.

    Masks of tokens are united. Raises InputError for conditions that are classes and differ.
    """
    return lambda inner: Interpolated(inner, weights)


class Belief(NamedTuple):
    """What was believed in the last step, for a rule with feedback: x0 (B, *), the time of asking, and the process."""

    x0: Tensor
    t: float
    process: Any


class Rule(Protocol):
    """Which of M prompts conditions the step under way: indices (B,) int64. ``last`` is None at the first step."""

    def __call__(self, ctx: Context, last: Belief | None, prompts: int) -> Tensor: ...


class Selected(Wrapper):
    """See :func:`selected`."""

    joins = True

    def __init__(self, inner: Denoiser, rule: Rule) -> None:
        super().__init__(inner)
        self.rule = rule

    def forward(self, x: Any, t: Any, ctx: Context) -> Any:
        told = prompts(ctx)
        own = ctx.fork("selected").memory
        if "now" not in own:  # later calls of the same step keep its choice
            own["now"] = self.rule(ctx, own.get("last"), len(told))
        now: Tensor = own["now"]
        cond = {key: _row(key, [c[key] for c in told], now) for key in told[0]}
        post = self.inner(x, t, ctx.fork("one", cond=cond))

        def accepted(*_: Any) -> None:
            if own.pop("now", None) is not None:
                own.setdefault("choices", []).append(now)
                own["last"] = Belief(post.mean, ctx.run.t, self.process)  # type: ignore[arg-type]

        ctx.after(accepted)
        return post


def _row(key: str, values: list[Any], now: Tensor) -> Any:
    """The condition ``key`` of the prompt that each item has now."""
    one = values[0]
    if isinstance(one, Tensor) and one.ndim and len(one) == len(now):
        return torch.stack([v.to(one) for v in values])[now.to(one.device), torch.arange(len(now), device=one.device)]
    if all(v is one for v in values):
        return one
    raise InputError(f"{key!r} differs between the prompts but has no row an item: give tensors (B, *)")


def selected(rule: Rule) -> Guidance:
    """One prompt a step and item, chosen by a rule: ``selected(BlackScholes(scorer))(cfg(3.0)(denoiser))``.

    ``selections(ctx)`` tells the choices afterwards. The call costs what one prompt costs.
    """
    return lambda inner: Selected(inner, rule)


def selections(ctx: Context) -> Tensor:
    """(steps, B) int64: which prompt conditioned each step of a run with this context."""
    if "choices" not in ctx.memory.get("selected", {}):
        raise InputError(
            "no selection of prompts ran outermost with this context: give it to sample(..., ctx=ctx) first"
        )
    return torch.stack(ctx.memory["selected"]["choices"])


__all__ = [
    "Belief", "Composed", "Interpolated", "Rule", "Selected", "also", "composed", "interpolated", "prompts", "selected",
    "selections",
]  # fmt: skip
