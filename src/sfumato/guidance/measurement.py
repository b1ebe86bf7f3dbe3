"""Guidance by a measurement y = A(x0) + noise: any solver then draws reconstructions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sfumato.core import Context, Denoiser, Guidance, InputError, Posterior, Wrapper, linear
from sfumato.guidance.loss import belief_variance, through_network, tweedie, where_blind


class Measured(Wrapper):
    """See :func:`measurement`."""

    def __init__(
        self, inner: Denoiser, operator: Any, y: Any, data_std: float = 0.5, jacobian: bool = False, scale: float = 1.0
    ) -> None:
        super().__init__(inner)
        if not (data_std >= 0 and scale >= 0):
            raise InputError(f"data_std = {data_std} and scale = {scale}: not negative")
        if not operator.linear and not jacobian:
            raise InputError("a non-linear operator has no closed proximal map: use jacobian=True, data_std=0")
        if operator.noise == 0 and jacobian and (data_std == 0 or not operator.linear):
            raise InputError(
                "the likelihood of an exact measurement at the mean is no density: give the operator a noise"
            )
        if data_std != 0 and not operator.linear:
            raise InputError("the spread of the belief cannot be sent through a non-linear operator: use data_std=0")
        if data_std == 0 and not jacobian:
            raise InputError(
                "data_std=0 says that the belief is certain, so no measurement moves it: use jacobian=True"
            )
        self.operator, self.y, self.data_std, self.jacobian, self.scale = operator, y, data_std, jacobian, scale

    def forward(self, x: Tensor, t: Any, ctx: Context) -> Posterior:
        coef = self.process.coef(t)
        variance = belief_variance(coef, self.data_std)
        if not self.jacobian or (not isinstance(coef.alpha, Tensor) and coef.alpha == 0):
            post = self.inner(x, t, ctx)
            mean = post.mean
            return post.but(x0=linear(1.0, mean, self.scale, self._moved(mean, variance)))
        post, slope, pull = through_network(self.inner, x, t, ctx, lambda mean: (mean, self._pull(mean, variance)))
        moved = linear(tweedie(coef, variance), where_blind(coef, pull, slope))
        return post.but(x0=linear(1.0, post.mean, self.scale, moved))

    def _moved(self, mean: Tensor, variance: Any) -> Tensor:
        """variance A* (noise^2 + variance A A*)^-1 (y - A mean)."""
        if self.data_std == 0:
            return torch.zeros_like(mean)
        return self.operator.prox(mean, self.y, variance) - mean  # type: ignore[no-any-return]

    def _pull(self, mean: Tensor, variance: Any) -> Tensor:
        """The gradient in x0 of log p(y | x_t) for the believed spread of x0."""
        if self.data_std > 0:
            return linear(1.0 / variance, self._moved(mean, variance))  # type: ignore[no-any-return]
        if self.operator.linear:
            return self.operator.pull(linear(1.0, self.y, -1.0, self.operator(mean)))  # type: ignore[no-any-return]
        residual = self.operator.residual(mean, self.y).sum()
        return -torch.autograd.grad(residual, mean, create_graph=True)[0]


def measurement(
    operator: Any, y: Any, *, data_std: float = 0.5, jacobian: bool = False, scale: float = 1.0
) -> Guidance:
    """Condition on y = A(x0) + noise: E[x0 | x_t, y] from E[x0 | x_t], for any operator of :mod:`sfumato.operators`.

    With the belief read as N(E[x0 | x_t], v I), v = sigma^2 / (alpha^2 + sigma^2 / data_std^2), the measurement says

        g = A* (noise^2 + v A A*)^-1 (y - A E[x0 | x_t]),

    and x0 becomes E[x0 | x_t] + v g, the proximal map of the operator (one call, no gradient), or with ``jacobian``
    E[x0 | x_t] + (sigma^2 / alpha) J^T g with J = d E[x0 | x_t] / d x_t, which is Tweedie's formula for the conditional score:
    (sigma^2 / alpha) J is the covariance of the belief, so it knows the data where v I does not. Both are exact for
    x0 ~ N(m, data_std^2 I). Where alpha = 0 x says nothing of x0, and both use v.

    operator  with its noise; 0 projects: A x0 = y at every step
    y         what was measured, one row an item (or one for all); guidance that stacks its inputs goes inside this one
    data_std  of the data; infinity trusts y more; 0 (with jacobian) takes the likelihood at the mean, and is the only choice
              for a non-linear operator
    scale     of the move; 1 is the formula

    Without jacobian and with noise 0 it is DDNM, with infinite data_std DiffPIR's step; with jacobian and data_std=1 it is
    PiGDM, with data_std=0 DPS up to its choice of step size. Sources: Chung, Kim, McCann, Klasky, Ye, 2023, "Diffusion
    Posterior Sampling for General Noisy Inverse Problems"; Song, Vahdat, Mardani, Kautz, 2023, "Pseudoinverse-Guided Diffusion
    Models for Inverse Problems"; Wang, Yu, Zhang, 2023, "Zero-Shot Image Restoration Using Denoising Diffusion Null-Space
    Model"; Zhu et al. 2023, "Denoising Diffusion Models for Plug-and-Play Image Restoration".
    """
    return lambda inner: Measured(inner, operator, y, data_std, jacobian, scale)


__all__ = ["Measured", "belief_variance", "measurement"]
