"""What a denoiser believes about the clean state, read in any parameterisation. Conversions are written only here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor

from sfumato.core.errors import InputError
from sfumato.core.trees import linear

Row: TypeAlias = "tuple[Any, Any]"
KINDS = ("x0", "eps", "v", "flow", "score")


class Coef(NamedTuple):
    """y_t = alpha x0 + sigma eps and the time derivatives: floats, or float64 tensors (B,) for a clock an item."""

    alpha: Any
    sigma: Any
    dalpha: Any
    dsigma: Any

    @property
    def lam(self) -> Any:
        """Half the log signal-to-noise ratio, log(alpha / sigma); infinite at the ends."""
        if isinstance(self.alpha, Tensor):
            return self.alpha.log() - self.sigma.log()
        if self.sigma == 0 or self.alpha == 0:
            return math.inf if self.sigma == 0 else -math.inf
        return math.log(self.alpha / self.sigma)

    @property
    def angle(self) -> Any:
        """atan2(sigma, alpha): 0 at clean data, pi / 2 at pure noise, finite everywhere."""
        return self.sigma.atan2(self.alpha) if isinstance(self.alpha, Tensor) else math.atan2(self.sigma, self.alpha)


def row(kind: str | Row, c: Coef) -> Row:
    """(p, q) with prediction = p x0 + q eps. A kind may also be given as its row."""
    if not isinstance(kind, str):
        return kind
    match kind:
        case "x0":
            return 1.0, 0.0
        case "eps":
            return 0.0, 1.0
        case "v":
            return -c.sigma, c.alpha
        case "flow":
            if isinstance(c.dsigma, float) and math.isinf(c.dsigma):
                raise InputError(
                    "the flow of this process is infinite where sigma = 0: stop at a later time, or read 'v'"
                )
            return c.dalpha, c.dsigma
        case "score":
            if isinstance(c.sigma, float) and c.sigma == 0:
                raise InputError("the score is infinite where sigma = 0: stop at a later time, or read 'eps'")
            return 0.0, -1.0 / c.sigma
    raise InputError(f"prediction {kind!r} is not one of {', '.join(KINDS)}")


def solve(target: Row, one: Row, other: Row) -> Row:
    """(u, w) with target = u one + w other, for rows over (x0, eps)."""
    det = one[0] * other[1] - one[1] * other[0]
    if not isinstance(det, Tensor) and abs(det) < 1e-12:
        raise InputError("these two readings say the same thing at this time: no third follows from them")
    return (target[0] * other[1] - target[1] * other[0]) / det, (one[0] * target[1] - one[1] * target[0]) / det


@dataclass(frozen=True, eq=False)
class Posterior:
    """One native reading, ``native = p x0 + q eps`` at x = alpha x0 + sigma eps; every other reading is one solve.

    native, x   (B, *)
    kind        'x0' | 'eps' | 'v' | 'flow' | 'score', or the row (p, q) itself
    var         the variance of x0 given x, where the denoiser knows it
    aux         whatever else it says (features, a rendered scene), by name

    Shapes follow x. A reading that the prediction does not determine (x0 of an 'eps' prediction where alpha = 0)
    raises InputError.
    """

    native: Tensor
    kind: str | Row
    x: Tensor
    coef: Coef
    var: Any = None
    aux: Mapping[str, Any] = field(default_factory=dict)

    def at(self, p: Any, q: Any) -> Tensor:
        """p x0 + q eps: DDIM is ``at(alpha_s, sigma_s)`` for every kind of prediction, alpha = 0 included."""
        here = row(self.kind, self.coef)
        try:
            u, w = solve((p, q), (self.coef.alpha, self.coef.sigma), here)
        except InputError:
            return self._degenerate(p, q, here)
        return linear(u, self.x, w, self.native)  # type: ignore[no-any-return]

    def _degenerate(self, p: Any, q: Any, here: Row) -> Tensor:
        """x and the prediction say the same thing (or the prediction none); only its multiples can be read."""
        (p0, q0), said = (here, self.native) if any(here) else (self.coef[:2], self.x)
        if not isinstance(gap := p * q0 - q * p0, Tensor) and abs(gap) <= 1e-12 * max(abs(p), abs(q)):
            return linear(p / p0 if p0 else q / q0, said)  # type: ignore[no-any-return]
        raise InputError(
            f"a {self.kind!r} prediction says nothing else where alpha = {self.coef.alpha:g} and sigma = "
            f"{self.coef.sigma:g}: use a 'v' or 'flow' network there, or stay off that end of time"
        )

    def view(self, kind: str) -> Tensor:
        """The belief read as 'x0' | 'eps' | 'v' | 'flow' | 'score'."""
        return self.native if kind == self.kind else self.at(*row(kind, self.coef))

    @property
    def mean(self) -> Tensor:
        """E[x0 | x]."""
        return self.view("x0")

    def but(self, keep: tuple[str, ...] = (), aux: Mapping[str, Any] | None = None, **reading: Tensor) -> Posterior:
        """This belief with one reading replaced: ``but(x0=...)``. By default x stays and the other readings follow.

        ``keep=('eps',)`` freezes that reading instead and lets x follow, so any pair (x0, eps) is a Posterior: this is
        how clipping that keeps the old noise, thresholding and split guidance directions are written.
        """
        aux = {**self.aux, **aux} if aux else self.aux
        if not reading:
            return replace(self, aux=aux)
        if len(reading) != 1 or len(keep) > 1:
            raise InputError(f"replace one reading and keep at most one, not {sorted(reading)} and {list(keep)}")
        ((kind, value),) = reading.items()
        one = row(kind, self.coef)
        if not keep:
            return replace(self, native=value, kind=kind, var=None, aux=aux)
        other, kept, v = row(keep[0], self.coef), self.view(keep[0]), row("v", self.coef)
        x, native = (linear(u, value, w, kept) for u, w in (solve(r, one, other) for r in (self.coef[:2], v)))
        return replace(self, native=native, kind="v", x=x, var=None, aux=aux)
