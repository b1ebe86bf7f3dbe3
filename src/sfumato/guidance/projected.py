"""Adaptive projected guidance: what saturates is taken out of classifier-free guidance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sfumato.core import Context, Denoiser, Guidance, InputError, Posterior, linear
from sfumato.guidance._beliefs import combine
from sfumato.guidance._registry import register
from sfumato.guidance.classifier_free import ClassifierFree


class Projected(ClassifierFree):
    """See :func:`apg`. The momentum of the accepted steps is kept in the Context's memory."""

    called = "apg"

    def __init__(
        self,
        inner: Denoiser,
        scale: float,
        eta: float = 0.0,
        bound: float | None = None,
        momentum: float = -0.5,
        interval: tuple[float, float] | None = None,
        null: Mapping[str, Any] | None = None,
        batched: bool = True,
    ) -> None:
        super().__init__(inner, scale, interval, null=null, batched=batched)
        if bound is not None and not bound > 0:
            raise InputError(f"bound = {bound}: a positive root mean square, or None")
        if not -1 < momentum < 1:
            raise InputError(f"momentum = {momentum}: between -1 and 1 (negative is the paper's, 0 is off)")
        self.eta, self.bound, self.momentum = eta, bound, momentum

    def _guided(self, found: list[Any], scale: float | Tensor, ctx: Context) -> Any:
        """D_c + (scale - 1) of what is left of D_c - D_u."""
        plain = combine(found, [scale, 1.0 - scale])
        conditional: Posterior = found[0]
        sigma = conditional.coef.sigma
        if not isinstance(sigma, Tensor) and sigma == 0:  # the state is the data: both beliefs are
            return plain
        mean = conditional.mean
        update = self._remembered(mean - found[1].mean, ctx)
        if self.bound is not None:
            size = update.flatten(1).square().mean(1).sqrt()
            update = linear((self.bound / size.clamp(min=torch.finfo(size.dtype).tiny)).clamp(max=1.0), update)
        update = linear(1.0, update, self.eta - 1.0, along(update, mean))
        return plain.but(x0=linear(1.0, mean, scale - 1.0, update))

    def _remembered(self, difference: Tensor, ctx: Context) -> Tensor:
        """The difference with the momentum of the accepted steps."""
        if not self.momentum:
            return difference
        average: Tensor = linear(1.0, difference, self.momentum, ctx.memory.get("average"))
        ctx.after(lambda x, s: ctx.memory.update(average=average))
        return average


def along(x: Tensor, y: Tensor) -> Tensor:
    """The part of x (B, *) that is parallel to y, item by item; 0 where y is."""
    inner, square = (x * y).flatten(1).sum(1), y.square().flatten(1).sum(1)
    return linear(torch.where(square > 0, inner / torch.where(square > 0, square, 1.0), 0.0), y)  # type: ignore[no-any-return]


@register("apg")
def apg(
    scale: float,
    *,
    eta: float = 0.0,
    bound: float | None = None,
    momentum: float = -0.5,
    interval: tuple[float, float] | None = None,
    null: Mapping[str, Any] | None = None,
    batched: bool = True,
) -> Guidance:
    """Adaptive projected guidance: large scales without the oversaturation of classifier-free guidance.

    With D_c, D_u the conditional and the null x0, and d_k the difference at step k:

        d_k = D_c - D_u + momentum d_(k-1)            (reverse momentum: what the last steps did already is taken back)
        d_k = d_k min(1, bound / rms(d_k))
        x0 = D_c + (scale - 1) (d_perp + eta d_parallel),   parallel and perpendicular to D_c

    scale     as in :func:`cfg`, to which it is equal with eta=1, bound=None, momentum=0
    eta       how much is kept of the part along D_c, which makes images saturated
    bound     of the root mean square of an entry of d; the paper's norm r is bound sqrt(number of entries): 0.06 on the
              latents of Stable Diffusion (r = 15 at 1024 pixels); None is no bound
    momentum  its beta; d_(k-1) is the one of the last accepted step

    interval, null and batched as in :func:`cfg`; a negative prompt takes the place of the null. Source: Sadat, Hilliges,
    Weber, 2024, "Eliminating Oversaturation and Artifacts of High Guidance Scales in Diffusion Models".
    """
    return lambda inner: Projected(inner, scale, eta, bound, momentum, interval, null, batched)


__all__ = ["Projected", "along", "apg"]
