"""How much each time counts: one table of weights of the x0 error, read in whatever a network predicts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from torch import Tensor

from sfumato.core import KINDS, Coef, InputError, row

Weighting: TypeAlias = "str | Callable[[Coef], Tensor]"

# name -> sigma^2 w(t), with loss = w(t) |x0^ - x0|^2; times sigma^2 everything is finite at both ends of time.
TABLE: dict[str, Callable[..., Any]] = {
    "snr": lambda c: c.alpha**2,
    "min-snr": lambda c, gamma=5.0: (c.alpha**2).minimum(gamma * c.sigma**2),
    "max-snr": lambda c, gamma=1.0: (c.alpha**2).maximum(gamma * c.sigma**2),
    "edm": lambda c, data_std=0.5: (c.sigma**2 + (c.alpha * data_std) ** 2) / data_std**2,
    "p2": lambda c, k=1.0, gamma=1.0: c.alpha**2 * (c.sigma**2 / (k * c.sigma**2 + c.alpha**2)) ** gamma,
    "sigmoid": lambda c, bias=1.0: c.alpha**2 * c.sigma**2 / (c.sigma**2 + c.alpha**2 * 2.718281828459045**-bias),
}


def names() -> list[str]:
    """All names of weightings."""
    return ["uniform", *(k for k in KINDS if k != "score"), *TABLE]


def weight(name: Weighting, kind: Any, c: Coef, **numbers: float) -> Tensor | float:
    """The factor on |prediction - target|^2 of a network of ``kind``, (B,) float64.

    At fixed x_t an x0 error e is an error (p sigma - q alpha) / sigma e of the row (p, q), so a weight w of the x0 error
    is w sigma^2 / (p sigma - q alpha)^2 there: the loss is the same number in every kind.

    'uniform'                       1 in the native kind
    'x0' | 'eps' | 'v' | 'flow'     the plain squared error of that kind
    'snr'                           w = alpha^2 / sigma^2, the same as 'eps' (Ho, Jain, Abbeel, 2020)
    'min-snr'                       w = min(snr, gamma = 5) (Hang et al., 2023, "Efficient Diffusion Training via Min-SNR")
    'max-snr'                       w = max(snr, gamma = 1), truncated snr (Salimans & Ho, 2022, "Progressive Distillation")
    'edm'                           w = (sigma^2 + s^2) / (sigma s)^2 at sigma / alpha, s = data_std (Karras et al., 2022)
    'p2'                            eps loss / (k + snr)^gamma (Choi et al., 2022, "Perception Prioritized Training")
    'sigmoid'                       eps loss times sigmoid(bias - ln snr) (Kingma & Gao, 2023; Hoogeboom et al., 2024)

    or a callable c -> w(t). Raises InputError for another name.
    """
    if name == "uniform" or (isinstance(name, str) and name == kind):
        return 1.0
    p, q = row(kind, c)
    here = (p * c.sigma - q * c.alpha) ** 2
    if callable(name):
        return name(c) * c.sigma**2 / here  # type: ignore[no-any-return]
    if name in TABLE:
        return TABLE[name](c, **numbers) / here  # type: ignore[no-any-return]
    if name in names():
        r, s = row(name, c)
        return (r * c.sigma - s * c.alpha) ** 2 / here  # type: ignore[no-any-return]
    raise InputError(f"weighting = {name!r}: use one of {', '.join(names())}, or a function of the coefficients")
