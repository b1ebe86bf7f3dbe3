"""FlowChef: move the state itself down the gradient of a cost of x0, with the velocity held, and never differentiate the network."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from sfumato.core import Context, Denoiser, Guidance, InputError
from sfumato.guidance.loss import Cost, LossGuided, gradient

OPTIMIZERS = ("sgd", "adam")


class DataFit:
    """cost(x0, cond) = max(|A x0 - y|^2 - n noise^2, 0) / 2, (B,): see :func:`data_fit`."""

    def __init__(self, operator: Any, y: Any) -> None:
        self.operator, self.y = operator, y

    def __call__(self, x0: Tensor, cond: Mapping[str, Any]) -> Tensor:
        misfit = self.operator.misfit(x0, self.y)
        explained = self.operator.noise**2 * self._measured(x0) if self.operator.noise else 0.0
        return (misfit - explained).clamp(min=0) / 2  # type: ignore[no-any-return]

    def _measured(self, x0: Tensor) -> int:
        """How many numbers of an item are measured."""
        with torch.no_grad():
            y = self.operator(x0[:1])
            seen = self.operator.restrict(torch.ones_like(y))
        return int(seen.real.sum()) * (2 if seen.is_complex() else 1)


def data_fit(operator: Any, y: Any) -> DataFit:
    """Half the misfit of y = A(x0) + noise beyond what its noise explains, as a cost: its gradient is A* (A x0 - y).

    operator  of :mod:`sfumato.operators`, linear or not; its noise says when to stop: below n noise^2 (n numbers measured) the
              cost is 0, so that the noise is not fitted. A mean over the n numbers, as often written, has 2 / n times this
              gradient
    y         one row an item, or one for all
    """
    return DataFit(operator, y)


class FlowChef(LossGuided):
    """See :func:`flowchef`."""

    def __init__(
        self, inner: Denoiser, cost: Cost, step: Any, iterations: int = 1, optimizer: str = "sgd", **options: Any
    ) -> None:
        if optimizer not in OPTIMIZERS or iterations < 1:
            raise InputError(
                f"optimizer = {optimizer!r}, iterations = {iterations}: {' or '.join(OPTIMIZERS)}, at least 1"
            )
        super().__init__(inner, cost, step, "belief", **options)
        self.iterations, self.optimizer = iterations, optimizer

    def move(self, x0: Tensor, scale: Any, coef: Any, ctx: Context) -> Tensor:
        """How far x0 goes in all iterations."""
        if self.optimizer == "adam":
            return self._adam(x0, scale, ctx)
        at = x0
        for _ in range(self.iterations):
            at = at + self.moved(gradient(lambda u: self.value(u, ctx.cond), at), scale, coef)
        return at - x0

    def _adam(self, x0: Tensor, rate: Any, ctx: Context) -> Tensor:
        """Adam's moves from 0 (Kingma & Ba, 2015), entry by entry, so items do not meet."""
        if not isinstance(rate, (int, float)) or (torch.is_grad_enabled() and x0.requires_grad):
            raise InputError("Adam takes one rate for the batch, and nothing differentiates through it: use 'sgd'")
        delta, start = torch.zeros_like(x0, requires_grad=True), x0.detach()
        adam = torch.optim.Adam([delta], lr=rate)
        for _ in range(self.iterations):
            delta.grad = gradient(lambda u: self.value(u, ctx.cond), start + delta.detach())
            adam.step()
        return delta.detach()


def flowchef(
    cost: Cost,
    step: float | Tensor | Callable[[Any], Any] = 1.0,
    *,
    iterations: int = 1,
    optimizer: str = "sgd",
    keep: str = "flow",
    weight: str | Callable[[Any], Any] = "constant",
    interval: tuple[float, float] | None = None,
    codec: Any = None,
    limit: float = math.inf,
) -> Guidance:
    """Steer a flow: x_t <- x_t - step gradient of cost(x0), then go on with the velocity that was there before.

    Along a straight path x0 = x_t - t v moves as x_t does while v stays, so the gradient in x0 serves as that in x_t: no
    backward pass through the network, and later velocities mend what the shortcut errs. It is :func:`sfumato.guidance.loss`
    of the 'belief' with the velocity kept; it is plain gradient descent on x0 along the way.

    cost        (x0, cond) -> (B,): :func:`data_fit` for an inverse problem, ``ClassCost`` for a classifier, any other
    step        of the gradient descent: 1 is a whole step for :func:`data_fit` with |A| = 1; a function of t, or one an item.
                Published as s with the mean over n numbers: step = 2 s / n
    iterations  gradient steps a call; the network is asked once
    optimizer   'sgd', or 'adam' with ``step`` as its rate: the variant for latents
    keep        'flow' the velocity; 'eps' is the same shortcut in a DDIM step, where curved paths leave it without a reason
    interval    (low, high): steer only while low <= t <= high; the published way leaves the last step alone
    codec       decodes x0 for the cost; ``limit`` bounds the root mean square of a move

    The state moves, so the solver must step from the belief: 'ddim' (Euler) and 'ddpm' do, and ``steering.follow`` makes any
    solver do. Source: Patel, Wen, Metaxas, Yang, 2024, "Steering Rectified Flow Models in the Vector Field for Controlled
    Image Generation".
    """
    options = {"interval": interval, "weight": weight, "keep": keep, "codec": codec, "limit": limit}
    return lambda inner: FlowChef(inner, cost, step, iterations, optimizer, **options)


__all__ = ["DataFit", "FlowChef", "data_fit", "flowchef"]
