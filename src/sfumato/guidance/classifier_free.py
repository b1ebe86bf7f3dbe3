"""Classifier-free guidance: both readings in one batched call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sfumato.core import Context, Denoiser, Guidance, InputError, Posterior, Wrapper, linear, tree_map


class ClassifierFree(Wrapper):
    """See :func:`cfg`."""

    def __init__(
        self,
        inner: Denoiser,
        scale: float,
        interval: tuple[float, float] | None = None,
        rescale: float = 0.0,
        null: Mapping[str, Any] | None = None,
        batched: bool = True,
    ) -> None:
        super().__init__(inner)
        if interval is not None and not 0 <= interval[0] < interval[1] <= 1:
            raise InputError(f"interval = {interval}: (low, high) with 0 <= low < high <= 1 in time t")
        if not 0 <= rescale <= 1:
            raise InputError(f"rescale = {rescale}: between 0 (off) and 1")
        self.scale, self.interval, self.rescale, self.batched = scale, interval, rescale, batched
        self.empty = null

    def forward(self, x: Any, t: Any, ctx: Context) -> Any:
        scale = self._scale(t)
        if not isinstance(scale, Tensor) and scale == 1:
            return self.inner(x, t, ctx.fork("conditional"))
        null = dict(ctx.cond) | dict(self._null(ctx))
        if self.batched and isinstance(x, Tensor):
            conditional, unconditional = self._both(x, t, ctx, null)
        else:
            conditional = self.inner(x, t, ctx.fork("conditional"))
            unconditional = self.inner(x, t, ctx.fork("unconditional", cond=null))
        return self._guided(conditional, unconditional, scale)

    def _scale(self, t: Any) -> float | Tensor:
        """The scale at t: 1 outside the interval, row by row with a clock an item."""
        if self.interval is None:
            return self.scale
        low, high = self.interval
        if isinstance(t, Tensor):
            return torch.where((low <= t) & (t <= high), self.scale, 1.0)
        return self.scale if low <= t <= high else 1.0

    def _null(self, ctx: Context) -> Mapping[str, Any]:
        null = self.inner.null if self.empty is None else self.empty
        if not any(key in ctx.cond for key in null):
            raise InputError(
                f"no null condition for any of {sorted(ctx.cond) or 'no conditions'}: guidance needs a model trained with "
                "condition dropout; give null={name: value} if this one was"
            )
        return {k: _like(v, ctx.cond[k]) for k, v in null.items() if k in ctx.cond}

    def _both(self, x: Tensor, t: Any, ctx: Context, null: Mapping[str, Any]) -> tuple[Posterior, Posterior]:
        n = len(x)
        twice = {k: _stack(v, null[k], n) for k, v in ctx.cond.items()}
        clock = torch.cat([t, t]) if isinstance(t, Tensor) else t
        both = torch.cat([x, x])
        post = self.inner(both, clock, ctx.fork("both", cond=twice))
        same = x if post.x is both else None
        return _rows(post, slice(0, n), same), _rows(post, slice(n, 2 * n), same)

    def _guided(self, conditional: Any, unconditional: Any, scale: float | Tensor) -> Any:
        if not isinstance(conditional, Posterior):
            raise InputError(
                f"guidance of a {type(conditional).__name__} belief: only Gaussian readings can be extrapolated"
            )
        kind = conditional.kind
        away = unconditional.view(kind) if isinstance(kind, str) else unconditional.at(*kind)
        native = linear(scale, conditional.native, 1.0 - scale, away)
        x = conditional.x
        if unconditional.x is not x:  # an inner wrapper moved them: the pairs (x0, eps) are extrapolated
            x = linear(scale, x, 1.0 - scale, unconditional.x)
        guided = replace(conditional, native=native, x=x, var=None)
        if not self.rescale:
            return guided
        x0, reference = guided.mean, conditional.mean
        ratio = _std(reference) / _std(x0)
        return guided.but(x0=x0 * (self.rescale * ratio + 1 - self.rescale))


def _std(x: Tensor) -> Tensor:
    return x.flatten(1).std(1).view(-1, *[1] * (x.ndim - 1))


def _like(null: Any, given: Any) -> Any:
    """The null condition in the shape of the given one (one row is repeated for every item)."""
    if not isinstance(given, Tensor):
        return null
    value = torch.as_tensor(null, dtype=given.dtype, device=given.device)
    try:
        return value.expand_as(given)
    except RuntimeError:
        raise InputError(
            f"a null of shape {tuple(value.shape)} cannot stand for conditions {tuple(given.shape)}"
        ) from None


def _stack(given: Any, null: Any, n: int) -> Any:
    if isinstance(given, Tensor) and given.ndim and len(given) == n:
        return torch.cat([given, null])
    if given is null:
        return given
    raise InputError(
        "conditions that are not tensors of one row an item cannot be stacked: use cfg(..., batched=False)"
    )


def _rows(post: Posterior, items: slice, x: Tensor | None) -> Posterior:
    def cut(v: Any) -> Any:
        return v[items] if isinstance(v, Tensor) and v.ndim and len(v) == len(post.x) else v

    coef = type(post.coef)(*(cut(v) for v in post.coef))
    kind = post.kind if isinstance(post.kind, str) else (cut(post.kind[0]), cut(post.kind[1]))
    aux = {k: tree_map(cut, v) for k, v in post.aux.items()}
    return Posterior(post.native[items], kind, post.x[items] if x is None else x, coef, cut(post.var), aux)


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

    Raises InputError where no condition has a null. Source: Ho & Salimans, 2022, "Classifier-Free Diffusion Guidance".
    """
    return lambda inner: ClassifierFree(inner, scale, interval, rescale, null, batched)
