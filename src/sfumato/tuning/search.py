"""Searches for a schedule: strategies and times of every step (USF's S3), or times and skipped blocks (AutoDiffusion)."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sfumato import grids
from sfumato.core import InputError
from sfumato.solvers.scheduled import Move, Scheduled
from sfumato.tuning.evolution import Evolution, Found, Ranking
from sfumato.tuning.target import Target

FORMS = ("data", "noise", "v", "flow")  # what is drawn from; a schedule may have more
VARIABLES = ("lambda", "angle", "soft", "rho", "time")
CLOSEST = 1e-3  # in lambda: nearer nodes make the polynomial's weights explode


@dataclass(frozen=True)
class Schedule:
    """A decision record: the times and how each step is made."""

    times: tuple[float, ...]
    moves: tuple[Move, ...]
    free: bool = False

    @property
    def solver(self) -> Scheduled:
        """The solver that makes these moves."""
        return Scheduled(self.moves, self.free)

    @property
    def calls(self) -> int:
        """Denoiser calls of a run."""
        return self.solver.calls(len(self.moves))


def legal(process: Any, times: Sequence[float]) -> bool:
    """Whether times fall strictly, and no two nodes are so near in lambda that derivatives cannot be estimated."""
    if any(b >= a for a, b in zip(times, times[1:], strict=False)):
        return False
    lams = [process.coef(t).lam for t in times]
    return all(b - a >= CLOSEST for a, b in zip(lams, lams[1:], strict=False) if math.isfinite(b - a))


@dataclass(frozen=True)
class StrategySpace:
    """USF's space of schedules of ``nfe`` calls on a process, and its search operators.

    Times move in lambda by ``jitter`` of the gap to their neighbours (the publication moves them by N(0, 0.03^2) in t,
    which fits one clock only), or all of them are warped; order, form, variable, start, derivatives, relaxation and corrector
    are redrawn with probability ``rate`` each. ``free``: schedules may save the first call. ``low`` and ``high`` bound lambda
    at the inner times.
    """

    process: Any
    nfe: int
    start: float = 1.0
    stop: float = 0.0
    free: bool = True
    rate: float = 0.3
    jitter: float = 0.3
    low: float = -5.1
    high: float = 7.0

    def __post_init__(self) -> None:
        if self.nfe < 1:
            raise InputError(f"nfe = {self.nfe}: at least one call")

    def starts(self) -> list[Schedule]:
        """Known solvers as decision records on the known grids: the first population."""
        kinds = [
            Move(order=1), Move(), Move(order=3), Move(variable="angle"), Move("noise"), Move("noise", "time", 2),
            Move("noise", "time", 3), Move(corrector=3), Move("noise", corrector=3), Move("v", "angle", 2), Move("flow", "time", 2),
        ]  # fmt: skip
        out = []
        for spec in (
            "arctan",
            "logsnr",
            "uniform",
            "quadratic",
            "quadratic(power=1.5)",
            "quadratic(power=3.0)",
            "karras",
        ):
            for free in (False, True) if self.free and self.nfe > 1 else (False,):
                times = tuple(grids.registry.make(spec)(self.process, self.nfe + free, self.start, self.stop).tolist())
                if legal(self.process, times):
                    out += [Schedule(times, self.tapered(m, self.nfe + free), free) for m in kinds]
        if not out:
            raise InputError(f"no grid gives {self.nfe} distinct steps between {self.start} and {self.stop}")
        return out

    @staticmethod
    def tapered(move: Move, steps: int) -> tuple[Move, ...]:
        """The same move at each step, without a corrector at the last, where it could not act."""
        return (move,) * (steps - 1) + (replace(move, corrector=0, again=False),)

    def fresh(self, draw: random.Random) -> Schedule | None:
        """Uniformly drawn decisions on a randomly warped grid."""
        free = self.free and self.nfe > 1 and draw.random() < 0.3
        spec = f"quadratic(power={round(draw.uniform(0.8, 3.0), 2)})"
        times = tuple(grids.registry.make(spec)(self.process, self.nfe + free, self.start, self.stop).tolist())
        made = Schedule(times, tuple(self._move(Move(), draw, 1.0, i) for i in range(self.nfe + free)), free)
        return self._moved(made, draw, 1.0)

    def mutate(self, one: Schedule, draw: random.Random) -> Schedule | None:
        """Each kind of decision with probability ``rate``; at least one."""
        kind = draw.random()
        if kind < 0.4:
            made = self._moved(one, draw, self.jitter)
        elif kind < 0.5:
            made = self._warped(one, draw)
        else:
            made = self._moved(one, draw, self.jitter) if draw.random() < self.rate else one
        if made is None:
            return None
        if kind >= 0.5:
            rate = self.rate / max(1.0, math.sqrt(len(one.moves) / 2))
            moves = tuple(self._move(m, draw, rate, i) for i, m in enumerate(made.moves))
            made = replace(made, moves=(*moves[:-1], replace(moves[-1], corrector=0, again=False)))
        return made if made != one else None

    def cross(self, one: Schedule, other: Schedule, draw: random.Random) -> Schedule | None:
        """Times of one parent, and step by step the moves of either, where both have as many steps."""
        if len(one.times) != len(other.times):
            return None
        times = one.times
        if draw.random() < 0.3:  # between the parents
            share = draw.random()
            times = tuple(a + share * (b - a) for a, b in zip(one.times, other.times, strict=True))
        cut = draw.randrange(len(one.moves))
        made = Schedule(times, one.moves[:cut] + other.moves[cut:], one.free)
        return made if legal(self.process, times) and made not in (one, other) else None

    def encode(self, one: Schedule) -> list[float]:
        """Numbers for the ranking: lambda and decisions of each step, always as many."""
        steps = self.nfe + 1
        lams = [min(max(self.process.coef(t).lam, self.low), self.high) for t in one.times]
        out = [float(one.free)]
        for i in range(steps):
            m = one.moves[min(i, len(one.moves) - 1)]
            out += [lams[min(i, len(lams) - 1)], float(m.order), m.relax, float(m.corrector)]
            out += [float(m.start), float(m.pseudo)]
            out += [float(m.form == f) for f in FORMS] + [float(m.variable == v) for v in VARIABLES]
        return out

    def _move(self, m: Move, draw: random.Random, rate: float, i: int) -> Move:
        """A move whose decisions are redrawn with probability ``rate`` each."""

        def now() -> bool:
            return draw.random() < rate

        if now():
            m = replace(m, order=draw.choices((1, 2, 3, 4), (0.2, 0.4, 0.3, 0.1))[0])
        if now():
            m = replace(m, form=draw.choices(FORMS, (0.35, 0.35, 0.2, 0.1))[0])
        if now():
            m = replace(m, variable=draw.choice(VARIABLES))
        if now():
            m = replace(m, relax=round(min(max(m.relax + draw.gauss(0, 0.2), 0.0), 2.0), 3))
        if now():
            m = replace(m, start=draw.choices((0, 1), (0.85, 0.15))[0], pseudo=draw.random() < 0.3)
        if now():
            m = replace(m, corrector=draw.choices((0, 2, 3, 4), (0.55, 0.15, 0.2, 0.1))[0])
        return m

    def _moved(self, one: Schedule, draw: random.Random, jitter: float) -> Schedule | None:
        """The schedule with about half of its inner times moved in lambda, or None where that is not legal."""
        lams = [min(max(self.process.coef(t).lam, self.low), self.high) for t in one.times]
        chosen = range(1, len(lams) - 1)
        some = [i for i in chosen if draw.random() < 0.5] or ([draw.choice(chosen)] if chosen else [])
        for i in some:
            gap = lams[i + 1] - lams[i - 1]
            lams[i] = min(max(lams[i] + draw.gauss(0, jitter / 2) * gap, self.low), self.high)
        return self._timed(one, lams)

    def _warped(self, one: Schedule, draw: random.Random) -> Schedule | None:
        """All inner times by one affine map of lambda."""
        lams = [min(max(self.process.coef(t).lam, self.low), self.high) for t in one.times]
        stretch, shift = math.exp(draw.gauss(0, 0.15)), draw.gauss(0, 0.3)
        middle = sum(lams) / len(lams)
        return self._timed(one, [min(max(middle + shift + stretch * (v - middle), self.low), self.high) for v in lams])

    def _timed(self, one: Schedule, lams: Sequence[float]) -> Schedule | None:
        """The schedule at these lambdas, its ends kept, or None where that is not legal."""
        times = (one.times[0], *(self.process.time(v) for v in lams[1:-1]), one.times[-1])
        return replace(one, times=times) if legal(self.process, times) else None


def strategies(
    target: Target,
    nfe: int,
    *,
    budget: int = 120,
    rehearsals: int = 6000,
    seed: int = 0,
    predictor: bool = True,
    prior: bool = True,
    free: bool = True,
    told: Callable[[int, int, float], None] | None = None,
) -> Found[Schedule]:
    """S3: evolution over :class:`StrategySpace`, with a ranking that learns from what was evaluated.

    budget      true evaluations: runs of ``nfe`` calls for every item of the target
    rehearsals  candidates that are evolved on the replay of the target first, without calling the network; the first
                population is the best of them. 0: it is of known solvers on known grids
    predictor   rank a larger pool of children and evaluate the most promising only
    prior       the predictor starts from what the replay foretells, and learns from true evaluations what to add to it;
                False: it learns from them alone

    The rehearsal and the prior are ours: rehearsals=0 with prior=False is as published. Deterministic by seed. Source: Liu,
    Ning, Lin, Yang, Wang, 2023, "A Unified Sampling Framework for Solver Searching of Diffusion Probabilistic Models".
    """
    space = StrategySpace(target.process, nfe, target.times[0], target.times[-1], free)
    replay = target.replay()

    def foretold(one: Schedule) -> float:
        return replay.error(one.solver, one.times)

    def fitness(one: Schedule) -> float:
        return target.score(target.errors(one.solver, one.times))

    operators = (space.mutate, space.cross, space.fresh)
    known = space.starts()
    if rehearsals:
        wide = Evolution(*operators, population=120, parents=24, mutants=80, crossed=30)
        rehearsed = wide.run(foretold, known, budget=max(rehearsals, len(known)), seed=seed)
        start = _varied([c for c, _ in rehearsed.ranked], 12)
        known = [c for c, _ in sorted(((c, foretold(c)) for c in known), key=lambda pair: pair[1])]
        start += _varied(known, 12)
    else:  # of every grid, not of the first one only
        start = random.Random(seed).sample(known, min(24, len(known)))
    narrow = Evolution(*operators, population=16, parents=12, mutants=11, crossed=4, pool=24)

    def features(one: Schedule) -> list[float]:
        if not prior:
            return space.encode(one)
        return [math.log(min(max(foretold(one), 1e-9), 1e3)), *space.encode(one)]

    ranking = Ranking(features, prior=0 if prior else None, seed=seed) if predictor else None
    return narrow.run(fitness, start[:budget], budget=budget, seed=seed + 1, predictor=ranking, told=told)


def _varied(ranked: Sequence[Schedule], n: int) -> list[Schedule]:
    """The first of each family (moves without their relaxations), then the best of the rest: not n copies of one idea."""
    seen: dict[Any, Schedule] = {}
    for one in ranked:
        key = (one.free, tuple((m.form, m.variable, m.order) for m in one.moves))
        seen.setdefault(key, one)
    return list(seen.values())[:n]
