"""Classifier-free guidance: both readings in one batched call."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sfumato.core import Context, Denoiser, Guidance, InputError, Wrapper
from sfumato.guidance._beliefs import apart, beliefs, beside, combine, like
from sfumato.guidance._registry import register


class ClassifierFree(Wrapper):
    """See :func:`cfg`."""

    called = "cfg"

    def __init__(
        self,
        inner: Denoiser,
        scale: float | Tensor,
        interval: tuple[float, float] | None = None,
        rescale: float = 0.0,
        null: Mapping[str, Any] | None = None,
        batched: bool = True,
    ) -> None:
        super().__init__(inner)
        check_interval(interval)
        if not isinstance(scale, Tensor) and not math.isfinite(scale):
            raise InputError(f"scale = {scale}: guidance takes a finite scale")
        if not 0 <= rescale <= 1:
            raise InputError(f"rescale = {rescale}: between 0 (off) and 1")
        self.scale, self.interval, self.rescale, self.batched = scale, interval, rescale, batched
        self.empty = null

    def forward(self, x: Any, t: Any, ctx: Context) -> Any:
        own, negatives = apart(ctx.cond, "negative")
        scale = scale_at(t, self.scale, self.interval)
        if not isinstance(scale, Tensor) and scale == 1:
            return self.inner(x, t, ctx.fork("conditional", cond=own))
        found = beliefs(
            self.inner, x, t, ctx, self._sets(own, negatives), batched=self.batched, together="both", name=self.called
        )
        return self._guided(found, scale, ctx)

    def _sets(self, own: dict[str, Any], negatives: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """What the beliefs are conditioned on, by name."""
        if negatives and self.empty is not None:
            raise InputError("null= says what is guided away from, and so does the negative prompt: give one of them")
        if len(negatives) > 1:
            raise InputError(f"{len(negatives)} negative prompts: {self.called} takes one, 'perp-neg' takes several")
        return {"conditional": own, "unconditional": own | self._null(own, *negatives)}

    def _null(self, own: Mapping[str, Any], negative: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The conditions of the unconditional belief, in the shapes of the run's own."""
        null = negative or (self.inner.null if self.empty is None else self.empty)
        if not any(key in own for key in null):
            raise InputError(
                f"no null condition for any of {sorted(own) or 'no conditions'}: guidance needs a model trained with "
                "condition dropout; give null={name: value} if this one was"
            )
        return {k: like(v, own[k]) for k, v in null.items() if k in own}

    def _guided(self, found: list[Any], scale: float | Tensor, ctx: Context) -> Any:
        """The beliefs of :meth:`_sets` as one."""
        guided = combine(found, [scale, 1.0 - scale])
        if not self.rescale:
            return guided
        x0, reference = guided.mean, found[0].mean
        spread = _std(x0)  # 0 where every entry is the same: nothing saturates
        ratio = torch.where(spread > 0, _std(reference) / torch.where(spread > 0, spread, 1.0), 1.0)
        return guided.but(x0=x0 * (self.rescale * ratio + 1 - self.rescale))


def check_interval(interval: tuple[float, float] | None) -> None:
    """InputError unless it is None or (low, high) in time."""
    if interval is not None and not 0 <= interval[0] < interval[1] <= 1:
        raise InputError(f"interval = {interval}: (low, high) with 0 <= low < high <= 1 in time t")


def scale_at(t: Any, scale: float | Tensor, interval: tuple[float, float] | None) -> float | Tensor:
    """The scale at t: 1 outside the interval, row by row with a clock an item."""
    if interval is None:
        return scale
    low, high = interval
    if isinstance(t, Tensor):
        return torch.where((low <= t) & (t <= high), scale, 1.0)
    return scale if low <= t <= high else 1.0


def _std(x: Tensor) -> Tensor:
    """The standard deviation of the entries of each item, (B, 1, ...); 0 for an item of one entry."""
    return x.flatten(1).std(1, correction=0).view(-1, *[1] * (x.ndim - 1))


def negative(*conditions: Mapping[str, Any]) -> dict[str, Any]:
    """Negative prompts as conditions beside those of the picture, one set of tensors (B, *) each.

    ``cond = model.conditions(n, prompts) | sf.guidance.negative(model.conditions(n, ["dull"] * n))``: guidances that know
    them ('cfg' and 'apg' one, 'perp-neg' any number) take them out; any other denoiser refuses them. A pipeline does this
    for ``generate(..., negative="dull")``.
    """
    return beside("negative", conditions)


@register("cfg")
def cfg(
    scale: float,
    interval: tuple[float, float] | None = None,
    *,
    rescale: float = 0.0,
    null: Mapping[str, Any] | None = None,
    batched: bool = True,
) -> Guidance:
    """Classifier-free guidance: null + scale (conditional - null), in the network's own reading.

    scale     1 is no guidance (and one call), larger is stronger; other conventions write w = scale - 1
    interval  (low, high): guide only while low <= t <= high (Kynkäänniemi et al. 2024)
    rescale   move the std of the guided x0 back towards the conditional one's (Lin et al. 2024), 0 is off
    null      what "no condition" is, by name (default: the denoiser's own ``null``)
    batched   both readings in one call of twice the rows; else two calls, each with its own branch of the memory

    A negative prompt in the conditions (:func:`negative`) takes the place of the null. Raises InputError where no condition
    has a null. Source: Ho & Salimans, 2022, "Classifier-Free Diffusion Guidance".
    """
    return lambda inner: ClassifierFree(inner, scale, interval, rescale, null, batched)


__all__ = ["ClassifierFree", "cfg", "check_interval", "negative", "scale_at"]
