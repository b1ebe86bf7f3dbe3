"""Boundary forms: how a consistency function is made of x and a network, so that it returns x itself at the last time."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sfumato.core import Coef, InputError, Posterior, linear

FORMS = ("x0", "lcm", "karras")


def boundary(
    form: str, c: Coef, t: Any, data_std: float = 0.5, sharpness: float = 1e4, last: float = 0.0
) -> tuple[Any, Any]:
    """(a, b) of f(x, t) = a x + b x0, at coefficients c of time t: numbers, or (B,) for a clock an item.

    'x0'      (0, 1): the belief itself, which is x where sigma = 0
    'lcm'     (d^2 / (u^2 + d^2), u / sqrt(u^2 + d^2)) with u = sharpness t: x at t = 0 (Luo et al., 2023, "Latent Consistency
              Models"; there u = 10 times an index of 1000)
    'karras'  with rho = sigma / alpha and d = data_std: d^2 / ((rho - last)^2 + d^2) x / alpha + (rho - last) d /
              sqrt(rho^2 + d^2) F, where F is the preconditioned network of Karras et al. 2022: x / alpha at rho = ``last``
              (Song, Dhariwal, Chen, Sutskever, 2023, "Consistency Models")

    Raises InputError for another name.
    """
    d = data_std
    if form == "x0":
        return 0.0, 1.0
    if form == "lcm":
        u = sharpness * t
        return d**2 / (u**2 + d**2), u / (u**2 + d**2) ** 0.5
    if form == "karras":
        alpha, sigma = c.alpha, c.sigma
        out = 1.0 - last * alpha / sigma if last else 1.0
        skip = d**2 * alpha / ((sigma - last * alpha) ** 2 + (d * alpha) ** 2)
        return skip - out * d**2 * alpha / (sigma**2 + (d * alpha) ** 2), out
    raise InputError(f"boundary = {form!r}: use one of {', '.join(FORMS)}")


def consistent(post: Posterior, t: Any, form: str = "x0", **numbers: float) -> Tensor:
    """f(x, t) (B, *): the clean end of the trajectory through x, as a consistency model says it."""
    a, b = boundary(form, post.coef, t, **numbers)
    return linear(a, post.x, b, post.mean)  # type: ignore[no-any-return]
