"""Pseudo linear multistep methods: Adams' weights for the gradient, the exact transfer for the state; with momentum."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sfumato.core import Context, Denoiser, InputError, Solver, Step, Times, linear
from sfumato.solvers._registry import register

WARMUPS = ("runge-kutta", "euler", "ramp")
MOMENTA = ("generalized", "heavy-ball", "nesterov")


def adams_bashforth(terms: int, beta: float = 1.0) -> tuple[float, ...]:
    """Weights of a history, newest first, on equal steps; beta < 1 are those of a history averaged with momentum.

    They sum to 1 and, for v_n = (1 - beta) v_{n-1} + beta e_n, give the integral of e to the order ``terms``.
    """
    if terms not in _ADAMS:
        raise InputError(f"terms = {terms}: 1 to 5")
    divisor, rows = _ADAMS[terms]
    return tuple((constant + slope * beta) / (divisor * beta) for constant, slope in rows)


# terms: (divisor, ((constant, slope), ...)), a weight being (constant + slope beta) / (divisor beta)
_ADAMS: Mapping[int, tuple[int, tuple[tuple[int, int], ...]]] = {
    1: (1, ((0, 1),)),
    2: (2, ((2, 1), (-2, 1))),
    3: (12, ((18, 5), (-24, 8), (6, -1))),
    4: (24, ((46, 9), (-78, 19), (42, -5), (-10, 1))),
    5: (720, ((1650, 251), (-3420, 646), (2880, -264), (-1380, 106), (270, -19))),
}


@register("pndm")
@register("s-pndm", terms=2)
@register("plms", warmup="euler")
@register("ipndm", warmup="ramp")
@register("ghvb", terms=3, beta=0.5, warmup="ramp")
@dataclass(frozen=True)
class PseudoLinearMultistep(Solver):
    """x_s = (alpha_s / alpha_t) x_t + (sigma_s - alpha_s sigma_t / alpha_t) e', e' = sum_j w_j e_j: one call a step.

    The transfer is exact where eps is constant (it is DDIM's), the weights are Adams-Bashforth's of ``terms`` readings of
    eps on *equally spaced times*: on others it is refused ("deis" has the weights of any spacing).

    warmup     'runge-kutta' (PNDM: pseudo Runge-Kutta of 4 calls, or of 2 where terms = 2), 'euler' (PLMS: one pseudo
               improved Euler step, then shorter histories), 'ramp' (iPNDM: shorter histories only)
    beta       momentum, 1 is none. 'generalized' (GHVB) averages eps before the combination and keeps the order, with a
               dial between accuracy (1) and stability (towards 0); 'heavy-ball' and 'nesterov' average after it: order 1
    A step to sigma = 0 is never a Runge-Kutta step, which would read eps there.
    The order is 2 however many terms: eps is not constant and equal times are not equal steps of sigma / alpha. A step that
    leaves alpha = 0 is DDIM's. GHVB n.m of the paper is terms = n + 1, beta = 0.m.
    Source: Liu, Ren, Lin, Zhao, 2022, "Pseudo Numerical Methods for Diffusion Models on Manifolds"; Zhang & Chen, 2023
    (iPNDM); Wizadwongsa et al., 2024, "Diffusion Sampling with Momentum for Mitigating Divergence Artifacts".
    """

    terms: int = 4
    warmup: str = "runge-kutta"
    beta: float = 1.0
    momentum: str = "generalized"

    grid = "uniform"

    def __post_init__(self) -> None:
        if self.warmup not in WARMUPS or self.momentum not in MOMENTA:
            raise InputError(f"warmup is one of {', '.join(WARMUPS)}, momentum one of {', '.join(MOMENTA)}, not {self}")
        if not (0 < self.beta <= 1 and 1 <= self.terms <= 5):
            raise InputError(f"beta = {self.beta}, terms = {self.terms}: 0 < beta <= 1 and 1 <= terms <= 5")
        if self.beta < 1 and self.warmup != "ramp":
            raise InputError(f"momentum needs warmup='ramp', not {self.warmup!r}")

    @property
    def order(self) -> int:  # type: ignore[override]
        return 1 if self.terms == 1 or (self.beta < 1 and self.momentum != "generalized") else 2

    def times(self, process: Any, grid: Sequence[float], x: Any, ctx: Context) -> Iterator[Times]:
        gaps = [abs(t - s) for t, s in zip(grid, grid[1:], strict=False)]
        if self.terms > 1 and max(gaps) > 1.1 * min(gaps):
            raise InputError(
                f"{type(self).__name__} needs equally spaced times (grid 'uniform' or 'trailing'), not steps between "
                f"{min(gaps):.3g} and {max(gaps):.3g}: 'deis' has the weights of any grid"
            )
        return iter(grid[1:])

    def init(self, x: Any, t: Times, denoiser: Denoiser, ctx: Context) -> Step:
        return Step(x, t, ((), None))

    def step(self, st: Step, s: Times, denoiser: Denoiser, ctx: Context) -> Step:
        process, (history, velocity) = denoiser.process, st.carry
        a, post = process.coef(st.t), denoiser(st.x, st.t, ctx)
        if not isinstance(a.alpha, float) and bool((a.alpha == 0).any()):
            raise InputError("an item's clock stands at alpha = 0, where the transfer divides by 0: step it by DDIM")
        b = process.coef(s)
        if isinstance(a.alpha, float) and a.alpha == 0:
            return Step(post.at(b.alpha, b.sigma), s, st.carry)
        e = post.view("eps")
        if self.momentum == "generalized" and self.beta < 1 and history:
            e = linear(1 - self.beta, history[0], self.beta, e)
        history = (e, *history)[: self.terms]
        short = len(history) < self.terms and not (isinstance(b.sigma, float) and b.sigma == 0)
        if short and (self.warmup == "runge-kutta" or (self.warmup == "euler" and len(history) == 1)):
            return Step(transfer(process, st.x, self._start(st, e, s, denoiser, ctx), st.t, s), s, (history, None))
        beta = self.beta if self.momentum == "generalized" else 1.0
        w = adams_bashforth(len(history), beta)
        direction = linear(*[v for pair in zip(w, history, strict=True) for v in pair])
        if self.momentum != "generalized":
            velocity = direction if velocity is None else linear(1 - self.beta, velocity, self.beta, direction)
            ahead = self.momentum == "nesterov"
            direction = linear(1 - self.beta, velocity, self.beta, direction) if ahead else velocity
        return Step(transfer(process, st.x, direction, st.t, s), s, (history, velocity))

    def _start(self, st: Step, e1: Any, s: Times, denoiser: Denoiser, ctx: Context) -> Any:
        """The gradient of a pseudo improved Euler step, or of a pseudo Runge-Kutta step of order 4."""
        process, x, t = denoiser.process, st.x, st.t

        def ahead(e: Any, u: Times) -> Any:
            return denoiser(transfer(process, x, e, t, u), u, ctx).view("eps")

        if self.terms == 2 or self.warmup == "euler":
            return linear(0.5, e1, 0.5, ahead(e1, s))
        middle = (t + s) / 2  # type: ignore[operator]
        e2 = ahead(e1, middle)
        e3 = ahead(e2, middle)
        return linear(1 / 6, e1, 1 / 3, e2, 1 / 3, e3, 1 / 6, ahead(e3, s))


def transfer(process: Any, x: Any, e: Any, t: Times, s: Times) -> Any:
    """The state at s if eps were ``e`` all the way: DDIM's step for any eps."""
    a, b = process.coef(t), process.coef(s)
    ratio = b.alpha / a.alpha
    return linear(ratio, x, b.sigma - ratio * a.sigma, e)
