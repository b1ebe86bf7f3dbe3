"""Solvers with their own numbers for each step: strategies of the exponential family, or plain linear coefficients."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import torch

from sfumato.core import Context, Denoiser, InputError, Posterior, Solver, Step, Times, linear
from sfumato.solvers._integral import FORMS, VARIABLES, divides_by_zero, reading, weights
from sfumato.solvers._registry import register


@dataclass(frozen=True)
class Move:
    """How one step is made.

    form       'data' | 'noise' | 'v' | 'line' | 'flow': the reading that is held polynomial
    variable   'lambda' | 'angle' | 'soft' | 'rho' | 'fraction' | 'time': in what
    order      through how many of the newest beliefs, 1 to 5 (fewer while the history is short)
    relax      multiplies all that the older beliefs add: 0 is order 1, 1 the exact integral. The published relaxations of
               the derivative (bh1, bh2, linear, exponential) are functions of the step, hence one number at a given step
    corrector  beliefs through which the state that was reached is mended, the one read there among them; 0: not mended
    again      read the belief again at the mended state (an implicit corrector: one more call)
    start      from which state: 0 the one reached last, 1 the one before, ... up to 4 (fewer while the history is short)
    pseudo     derivatives from the fewest beliefs, not from all: see ``rule='pseudo'`` of :func:`weights`
    """

    form: str = "data"
    variable: str = "lambda"
    order: int = 2
    relax: float = 1.0
    corrector: int = 0
    again: bool = False
    start: int = 0
    pseudo: bool = False

    def __post_init__(self) -> None:
        if self.form not in FORMS or self.variable not in VARIABLES:
            raise InputError(
                f"form {self.form!r} is one of {', '.join(FORMS)}, variable {self.variable!r} of {', '.join(VARIABLES)}"
            )
        if not (1 <= self.order <= 5 and 0 <= self.corrector <= 5):
            raise InputError(f"order = {self.order} is 1 to 5 and corrector = {self.corrector} is 0 to 5")
        if not 0 <= self.start <= 4:
            raise InputError(f"start = {self.start}: the state reached last is 0, and four older ones are kept")
        if self.again and not self.corrector:
            raise InputError("again=True reads the belief at the mended state: it needs a corrector")


@register("scheduled")
@dataclass(frozen=True)
class Scheduled(Solver):
    """A solver schedule: move i makes step i, and the last one all that follow. One call a step, without ``again``.

    moves  of :class:`Move`, or mappings of its numbers
    free   the first belief is x0 = 0, which pure noise is nearly consistent with: one call less ("analytic first step")

    Constant moves are named solvers: order 1 is DDIM; ('data', 'lambda', 2) is "dpm-solver++"; ('noise', 'lambda', n)
    DPM-Solver's multistep form; ('noise', 'time', n) DEIS; a corrector of order + 1 beliefs is the corrector of "unipc"
    with exact weights. Beliefs are kept as Posteriors, so the forms of steps may differ. A step is DDIM where its form would
    divide by 0, and its end is not mended. The state that a run ends at is never mended.
    Source: Liu, Ning, Lin, Yang, Wang, 2023, "A Unified Sampling Framework for Solver Searching of Diffusion Probabilistic
    Models".
    """

    moves: tuple[Move, ...] = (Move(),)
    free: bool = False

    def __post_init__(self) -> None:
        if not self.moves:
            raise InputError("a schedule has at least one move")
        made = tuple(m if isinstance(m, Move) else _move(m) for m in self.moves)
        object.__setattr__(self, "moves", made)

    @property
    def order(self) -> int:  # type: ignore[override]
        last = self.moves[-1]
        order = max(last.order if last.relax == 1 else 1, last.corrector)
        return min(order, 2) if last.pseudo else order

    @property
    def nfe(self) -> float:  # type: ignore[override]
        return self.calls(len(self.moves)) / len(self.moves)

    def calls(self, steps: int) -> int:
        """Denoiser calls of a run of so many steps."""
        return steps - self.free + sum(self.move(i).again for i in range(steps - 1))

    def move(self, i: int) -> Move:
        """The move of step i."""
        return self.moves[min(i, len(self.moves) - 1)]

    def spec(self) -> dict[str, Any]:
        """The schedule as JSON values."""
        return {"moves": [asdict(m) for m in self.moves], "free": self.free}

    def init(self, x: Any, t: Times, denoiser: Denoiser, ctx: Context) -> Step:
        return Step(x, t, ((), None))

    def step(self, st: Step, s: Times, denoiser: Denoiser, ctx: Context) -> Step:
        process, (past, base) = denoiser.process, st.carry
        first = self.free and st.index == 0
        post = _nothing(st.x, process.coef(st.t)) if first else denoiser(st.x, st.t, ctx)
        x, before = st.x, self.move(st.index - 1)
        history = ((st.t, post, x), *past)[:5]
        if base is not None and before.corrector and not divides_by_zero(before.form, process.coef(base[1])):
            nodes = history[: before.corrector]
            if before.pseudo:  # derivatives are those at the state that the step left
                nodes = tuple(sorted(nodes, key=lambda known: known[0] != base[1]))
            x = _advance(process, before, 1.0, base[0], base[1], st.t, nodes)
            post = denoiser(x, st.t, ctx) if before.again else post
            history = ((st.t, post, x), *past)[:5]
        move = self.move(st.index)
        begun, _, left = history[min(move.start, len(history) - 1)]
        reached = _advance(process, move, move.relax, left, begun, s, history[: move.order])
        return Step(reached, s, (history, (left, begun)))


def _move(numbers: Any) -> Move:
    try:
        return Move(**numbers)
    except TypeError as error:
        raise InputError(f"a move is a mapping of numbers of Move, not {numbers!r} ({error})") from None


def _nothing(x: Any, c: Any) -> Posterior:
    if c.alpha > c.sigma:
        raise InputError(
            f"a first step without a call is for pure noise: alpha = {c.alpha:g} at the start, use free=False"
        )
    return Posterior(torch.zeros_like(x), "x0", x, c)


def _advance(process: Any, move: Move, relax: float, x: Any, t: Times, s: Times, history: Any) -> Any:
    """From (x, t) to s by the polynomial through these beliefs: (time, belief, state), newest first."""
    if divides_by_zero(move.form, process.coef(t)):
        b = process.coef(s)
        return history[0][1].at(b.alpha, b.sigma)
    scale, *w = process.weights(_asked(move.form, move.variable, relax, move.pseudo), t, s, *(u for u, *_ in history))
    terms = [v for wj, (_, post, _) in zip(w, history, strict=True) for v in (wj, reading(post, move.form))]
    return linear(scale, x, *terms)


@lru_cache
def _asked(form: str, variable: str, relax: float, pseudo: bool) -> Any:
    rule = "pseudo" if pseudo else "exact"

    def ask(process: Any, t: float, s: float, *nodes: float) -> tuple[float, ...]:
        scale, *w = weights(process, form, variable, t, s, nodes, 0.0, rule)
        rest = [relax * v for v in w[1:]]
        return (scale, sum(w) - sum(rest), *rest)

    return ask


@dataclass(frozen=True, eq=False)
class Subspace(Solver):
    """x_{i+1} = w_i x_start + sum_{j <= i} a_ij e_j with fitted numbers, e_j the reading at step j. One call a step.

    nodes  (K + 1) times, falling: the only ones it steps between
    rows   K rows, row i = (w_i, a_i0, ..., a_ii)
    form   'noise' | 'data' | 'v' | 'line' | 'flow': the reading
    free   the first step only scales the start, without a call: there is no e_0, and every row is one number shorter

    Every linear multistep solver on these times has this form. ``sfumato.tuning.subspace`` fits it.
    Source: Duan, Wang, Chen, Huang, Qian, 2023, "Optimal Linear Subspace Search: Learning to Construct Fast and High-Quality
    Schedulers for Diffusion Models".
    """

    nodes: tuple[float, ...]
    rows: tuple[tuple[float, ...], ...]
    form: str = "noise"
    free: bool = False

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise InputError(f"form = {self.form!r}: one of {', '.join(FORMS)}")
        wanted = [i + 2 - self.free for i in range(len(self.nodes) - 1)]
        if not wanted or [len(r) for r in self.rows] != wanted:
            raise InputError(
                f"{len(self.nodes)} times need rows of {wanted} numbers, not {[len(r) for r in self.rows]}"
            )

    @property
    def nfe(self) -> float:  # type: ignore[override]
        return 1 - self.free / len(self.rows)

    def init(self, x: Any, t: Times, denoiser: Denoiser, ctx: Context) -> Step:
        return Step(x, t, (x, ()))

    def step(self, st: Step, s: Times, denoiser: Denoiser, ctx: Context) -> Step:
        i = st.index
        if i >= len(self.rows) or (st.t, s) != self.nodes[i : i + 2]:
            raise InputError(
                f"these coefficients were fitted to the times {[round(t, 6) for t in self.nodes]}, "
                f"not to step {i} from {st.t} to {s}: use the grid of their sampler card"
            )
        begun, past = st.carry
        if i or not self.free:
            past = (*past, reading(denoiser(st.x, st.t, ctx), self.form))
        w, *a = self.rows[i]
        return Step(linear(w, begun, *(v for pair in zip(a, past, strict=True) for v in pair)), s, (begun, past))
