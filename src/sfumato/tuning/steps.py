"""AutoDiffusion: which few of many times to visit, and which blocks of the network to leave out at each of them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.core import Context, Denoiser, InputError, Solver, Wrapper
from sfumato.tuning.evolution import Evolution, Found
from sfumato.tuning.target import Target


@dataclass(frozen=True)
class Choice:
    """Indices into a pool of times, rising from 0 (the noisiest), and for each step the blocks that are left out."""

    indices: tuple[int, ...]
    skips: tuple[tuple[str, ...], ...] = ()

    def times(self, pool: Sequence[float], stop: float = 0.0) -> tuple[float, ...]:
        """The times to visit, and the end."""
        return (*(pool[i] for i in self.indices), stop)

    def evaluations(self, blocks: int) -> int:
        """Block evaluations of a run of a network of so many blocks."""
        return blocks * len(self.indices) - sum(map(len, self.skips))


@dataclass(frozen=True)
class StepSpace:
    """Subsets of ``count`` of ``pool`` times, the first time always among them (a run starts from pure noise, and a subset
    that began later would be fed the wrong noise level), and skip lists of at most ``most`` of the named blocks a step.

    rate     the probability with which each gene is redrawn
    allowed  block evaluations of a run, at most: no other candidate is ever made
    """

    pool: int
    count: int
    blocks: tuple[str, ...] = ()
    most: int = 0
    rate: float = 0.1
    allowed: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.count <= self.pool:
            raise InputError(f"{self.count} steps of a pool of {self.pool} times: between 1 and {self.pool}")
        if not 0 <= self.most <= len(self.blocks):
            raise InputError(
                f"at most {self.most} blocks left out of {len(self.blocks)}: between 0 and {len(self.blocks)}"
            )

    def even(self) -> Choice:
        """Equally spaced in the pool: the DDIM grid."""
        return Choice(tuple(round(i * self.pool / self.count) for i in range(self.count)), self._none())

    def fits(self, one: Choice) -> bool:
        """Whether it stays within the allowed block evaluations."""
        return self.allowed is None or one.evaluations(len(self.blocks)) <= self.allowed

    def fresh(self, draw: random.Random) -> Choice | None:
        """Any subset, and skip lists of random length."""
        rest = draw.sample(range(1, self.pool), self.count - 1)
        made = Choice((0, *sorted(rest)), self._drawn(draw, 1.0, self._none()))
        return made if self.fits(made) else None

    def mutate(self, one: Choice, draw: random.Random) -> Choice | None:
        """Each gene is replaced by an unused time with probability ``rate``; skip lists are redrawn as often."""
        kept = [i for i in one.indices[1:] if draw.random() >= self.rate]
        unused = [i for i in range(1, self.pool) if i not in one.indices]
        fill = self.count - 1 - len(kept)
        if fill > len(unused):
            return None
        made = Choice((0, *sorted([*kept, *draw.sample(unused, fill)])), self._drawn(draw, self.rate, one.skips))
        return made if made != one and self.fits(made) else None

    def nudge(self, one: Choice, draw: random.Random) -> Choice | None:
        """Some times move to a nearby unused one (ours: near the optimum uniform redraws seldom help)."""
        indices = list(one.indices)
        for i in range(1, self.count):
            if draw.random() < max(self.rate, 1 / self.count):
                indices[i] += draw.choice((-1, 1)) * draw.randint(1, max(1, self.pool // (8 * self.count)))
        if len(set(indices)) < self.count or min(indices[1:], default=1) < 1 or max(indices) >= self.pool:
            return None
        made = Choice(tuple(sorted(indices)), self._drawn(draw, self.rate, one.skips))
        return made if made != one and self.fits(made) else None

    def cross(self, one: Choice, other: Choice, draw: random.Random) -> Choice | None:
        """A coin flip a gene between the sorted parents; duplicates are replaced by unused times."""
        genes = {draw.choice(pair) for pair in zip(one.indices, other.indices, strict=True)} | {0}
        unused = [i for i in range(1, self.pool) if i not in genes]
        genes |= set(draw.sample(unused, self.count - len(genes)))
        skips = tuple(draw.choice(pair) for pair in zip(one.skips, other.skips, strict=True))
        made = Choice(tuple(sorted(genes)), skips)
        return made if made not in (one, other) and self.fits(made) else None

    def trade(
        self, one: Choice, ranked: Sequence[tuple[int, str]], draw: random.Random, reach: float = 7.0
    ) -> Choice | None:
        """One block that was left out at some step is called again and another is not: of ``ranked`` (step, block) that are
        called one of about the first ``reach``."""
        out = [(i, name) for i, names in enumerate(one.skips) for name in names]
        rest = [place for place in ranked if place not in out]
        if not out or not rest:
            return None
        out.remove(draw.choice(out))
        return Choice(one.indices, self.lists([*out, rest[min(int(draw.expovariate(1 / reach)), len(rest) - 1)]]))

    def lists(self, places: Sequence[tuple[int, str]]) -> tuple[tuple[str, ...], ...]:
        """Skip lists that leave out these (step, block)."""
        return tuple(tuple(sorted(name for j, name in places if j == i)) for i in range(self.count))

    def _none(self) -> tuple[tuple[str, ...], ...]:
        """Skip lists that leave nothing out, where blocks may be left out at all."""
        return ((),) * self.count if self.most else ()

    def _drawn(
        self, draw: random.Random, rate: float, skips: tuple[tuple[str, ...], ...]
    ) -> tuple[tuple[str, ...], ...]:
        """Skip lists, each redrawn with probability ``rate``."""
        return tuple(
            tuple(sorted(draw.sample(self.blocks, draw.randint(0, self.most)))) if draw.random() < rate else kept
            for kept in skips
        )


def evolve(
    fitness: Callable[[Choice], float],
    space: StepSpace,
    *,
    budget: int = 200,
    population: int = 50,
    start: Sequence[Choice] = (),
    nudges: bool = False,
    seed: int = 0,
    told: Callable[[int, int, float], None] | None = None,
) -> Found[Choice]:
    """The published evolution: the even grid, half a population of random subsets and mutations of the even grid first;
    then each generation is half mutants of the ten best, a fifth crosses of them, and the rest random.

    ``start`` adds known candidates, ``nudges`` lets half of the mutants move to nearby times instead (ours).
    Source: Li, Li, Zheng, Wu, Xiao, Wang, Zheng, Pan, Chao, Ji, 2023, "AutoDiffusion: Training-Free Optimization of Time Steps
    and Architectures for Automated Diffusion Model Acceleration".
    """
    draw = random.Random(seed)
    even = space.even()

    def mutate(one: Choice, source: random.Random) -> Choice | None:
        return (space.nudge if nudges and source.random() < 0.5 else space.mutate)(one, source)

    first: list[Choice | None] = [*start, even, *(space.fresh(draw) for _ in range(population // 2))]
    first += [mutate(even, draw) for _ in range(population - population // 2 - 1)]
    known = [c for c in first if c is not None and space.fits(c)]
    evolution = Evolution(
        mutate, space.cross, space.fresh, population=population, parents=min(10, population), mutants=population // 2,
        crossed=population // 5,
    )  # fmt: skip
    return evolution.run(fitness, known[:budget], budget=budget, seed=seed, told=told)


def steps(
    target: Target,
    solver: Solver,
    count: int,
    *,
    pool: Sequence[float] | None = None,
    blocks: Sequence[str] = (),
    most: int = 0,
    rehearsals: int = 0,
    start: Sequence[Choice] = (),
    seed: int = 0,
    **options: Any,
) -> Found[Choice]:
    """Evolve ``count`` of the ``pool`` of times (default: 250, even in t) for a solver on a target; see :func:`evolve`.

    blocks, most  submodules that a step may leave out, and how many at most
    rehearsals    candidates that are evolved on the replay of the target first, without calling the network (ours; only
                  without blocks, which a replay knows nothing of)
    """
    if rehearsals and most:
        raise InputError("a replay cannot foretell what leaving blocks out does: rehearsals=0 with most > 0")
    times = uniform_pool(target) if pool is None else pool
    space = StepSpace(len(times), count, tuple(blocks), most)

    def fitness(one: Choice) -> float:
        denoiser = Skipping(target.denoiser, one.skips) if one.skips else None
        return target.score(target.errors(solver, one.times(times, target.times[-1]), denoiser))

    if rehearsals:
        replay = target.replay()
        first = evolve(
            lambda one: replay.error(solver, one.times(times, target.times[-1])), space, budget=rehearsals, start=start,
            nudges=True, seed=seed,
        )  # fmt: skip
        start = [*start, *(one for one, _ in first.ranked[:8])]
    return evolve(fitness, space, start=start, seed=seed, **options)


def joint(
    fitness: Callable[[Choice], float],
    pool: int,
    count: int,
    blocks: Sequence[str],
    allowed: int,
    *,
    budget: int = 400,
    seed: int = 0,
) -> Found[Choice]:
    """Times, and blocks left out at each of them, together: at most ``allowed`` block evaluations a run.

    Times are evolved with whole networks on an eighth of the budget; then each block is left out at each step alone, which
    says what it costs there; the rest of the budget improves the times with as many of the cheapest omissions as it takes:
    a child of the best so far moves times, trades one omission for another that costs little alone, or both (the publication
    redraws whole skip lists at random). Raises InputError where leaving one block out at every step is not enough, and for a
    budget that ends before the last stage.
    """
    out, stage = count * len(blocks) - allowed, max(budget // 8, 1)
    if not 0 < out <= count * (len(blocks) - 1):
        raise InputError(f"{allowed} block evaluations of {count * len(blocks)}: fewer than all, at least one a step")
    if budget <= stage + count * len(blocks):
        raise InputError(
            f"budget = {budget}: each of {count * len(blocks)} omissions is tried alone, and more is needed"
        )
    times = evolve(fitness, StepSpace(pool, count), budget=stage, population=min(16, stage), seed=seed).best
    space = StepSpace(pool, count, tuple(blocks), len(blocks), 0.0, allowed)
    cost = {
        (i, name): fitness(Choice(times.indices, space.lists([(i, name)]))) for i in range(count) for name in blocks
    }
    cheapest = sorted(cost, key=cost.__getitem__)

    def child(one: Choice, draw: random.Random) -> Choice | None:
        kind = draw.random()
        traded = (space.trade(one, cheapest, draw) if kind < 0.6 else None) or one
        return space.nudge(traded, draw) or traded if kind > 0.4 else traded

    climb = Evolution(child, space.cross, lambda draw: None, population=1, parents=1, mutants=1, crossed=0)
    start = [Choice(times.indices, space.lists(cheapest[:out]))]
    return climb.run(fitness, start, budget=budget - stage - len(cost), seed=seed)


def uniform_pool(target: Target, n: int = 250) -> tuple[float, ...]:
    """n times even in t from the target's start, its end excluded."""
    a, b = target.times[0], target.times[-1]
    return tuple(a + (b - a) * i / n for i in range(n))


class Skipping(Wrapper):
    """Leaves named blocks out: step i of a run calls the network with ``plan[i]`` replaced by their own input.

    Blocks must keep shapes (residual blocks: what stays is the shortcut); :func:`skippable` lists a network's. Steps beyond
    the plan are whole.
    """

    def __init__(self, inner: Denoiser, plan: Sequence[Sequence[str]]) -> None:
        super().__init__(inner)
        self.plan = tuple(tuple(names) for names in plan)

    def forward(self, x: Any, t: Any, ctx: Context) -> Any:
        names = self.plan[ctx.run.step] if ctx.run.step < len(self.plan) else ()
        return self.inner(x, t, ctx.fork(taps=[(name, _skip) for name in names]) if names else ctx)


def _skip(ctx: Context, call: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """A tap that gives a block's input in the place of its output."""
    return x


def skippable(
    net: nn.Module, run: Callable[[], Any], kinds: Sequence[str] = ("ResidualBlock", "ImageAttention", "Block")
) -> list[str]:
    """Paths of the blocks of these classes whose output has the shape of their first input, as seen while ``run`` calls the
    network once. Raises InputError where there is none."""
    legal: list[str] = []
    hooks = []
    for name, module in net.named_modules():
        if any(base.__name__ in kinds for base in type(module).__mro__):

            def look(module: nn.Module, given: tuple[Any, ...], out: Any, name: str = name) -> None:
                if given and isinstance(out, Tensor) and isinstance(given[0], Tensor) and out.shape == given[0].shape:
                    legal.append(name)

            hooks.append(module.register_forward_hook(look))
    try:
        with torch.no_grad():
            run()
    finally:
        for hook in hooks:
            hook.remove()
    if not legal:
        raise InputError(
            f"no block of {type(net).__name__} is a {' or '.join(kinds)} that keeps its input's shape: name its classes in kinds="
        )
    return sorted(set(legal))


def planned(denoiser: Denoiser, plan: Sequence[Sequence[str]]) -> Denoiser:
    """The denoiser with a skip plan, or itself where nothing is left out."""
    return Skipping(denoiser, plan) if any(plan) else denoiser
