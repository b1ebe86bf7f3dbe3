"""Evolution of small discrete things with an expensive fitness, and a learned ranking that saves evaluations."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from sfumato.core import InputError, mix

C = TypeVar("C", bound=Hashable)


@dataclass(frozen=True)
class Found(Generic[C]):
    """All candidates that were truly evaluated, in order, with their fitness (smaller is better; inf: failed)."""

    tried: tuple[tuple[C, float], ...]

    @property
    def best(self) -> C:
        """The fittest."""
        return self.ranked[0][0]

    @property
    def ranked(self) -> list[tuple[C, float]]:
        """Fittest first; of equals the earlier."""
        return sorted(self.tried, key=lambda pair: pair[1])

    @property
    def progress(self) -> list[float]:
        """The best fitness after each evaluation."""
        out: list[float] = []
        for _, value in self.tried:
            out.append(min(value, out[-1]) if out else value)
        return out


@dataclass(frozen=True)
class Evolution(Generic[C]):
    """A population that mutates and crosses over; a candidate is never evaluated twice.

    mutate, cross   (candidate, random) and (one, other, random) to a candidate, or to None where the result is not legal
    fresh           random -> a new candidate
    population      evaluations a generation
    parents         how many of the best so far have children
    mutants, crossed  how many of a generation are mutants and crosses of the parents; the rest is fresh
    pool            with a predictor: how many times as many children are made, of which the most promising are evaluated
    """

    mutate: Callable[[C, random.Random], C | None]
    cross: Callable[[C, C, random.Random], C | None]
    fresh: Callable[[random.Random], C | None]
    population: int = 50
    parents: int = 10
    mutants: int = 25
    crossed: int = 10
    pool: int = 8

    def __post_init__(self) -> None:
        if not 1 <= self.parents <= self.population or self.mutants + self.crossed > self.population or self.pool < 1:
            raise InputError(f"1 <= parents <= population and mutants + crossed <= population, pool >= 1, not {self}")

    def run(
        self,
        fitness: Callable[[C], float],
        start: Sequence[C],
        *,
        budget: int,
        seed: int = 0,
        predictor: Callable[[Sequence[tuple[C, float]], Sequence[C]], Sequence[float]] | None = None,
        told: Callable[[int, int, float], None] | None = None,
    ) -> Found[C]:
        """Evaluate at most ``budget`` candidates, ``start`` first. ``predictor(tried, pool)`` foretells the pool's ranks;
        ``told(done, budget, best)`` hears of each evaluation. A fitness that is not a number counts as infinite."""
        if budget < 1 or not start:
            raise InputError(f"budget = {budget} evaluations of {len(start)} starts: at least one of each")
        draw, tried = random.Random(seed), dict[C, float]()

        def evaluate(candidates: Sequence[C]) -> None:
            for candidate in candidates:
                if candidate in tried or len(tried) >= budget:
                    continue
                value = float(fitness(candidate))
                tried[candidate] = value if not math.isnan(value) else math.inf
                if told is not None:
                    told(len(tried), budget, min(tried.values()))

        evaluate(start)
        while len(tried) < budget:
            before = len(tried)
            children = self._children(tried, draw, self.pool if predictor else 1)
            if predictor is not None and len(children) > self.population:
                ranks = predictor(list(tried.items()), children)
                children = [children[i] for i in sorted(range(len(children)), key=lambda i: ranks[i])]
            evaluate(children[: self.population])
            if len(tried) == before:
                break  # nothing new can be made of it
        return Found(tuple(tried.items()))

    def _children(self, tried: dict[C, float], draw: random.Random, times: int) -> list[C]:
        """New candidates by mutation, crossing and chance, ``times`` as many as a generation takes."""
        best = sorted(tried, key=lambda c: tried[c])[: self.parents]
        rest = self.population - self.mutants - self.crossed
        makers: list[tuple[int, Callable[[], C | None]]] = [
            (self.mutants, lambda: self.mutate(draw.choice(best), draw)),
            (self.crossed, lambda: self.cross(draw.choice(best), draw.choice(best), draw)),
            (rest, lambda: self.fresh(draw)),
        ]
        made: dict[C, None] = {}
        for count, make in makers:
            wanted = len(made) + count * times
            for _ in range(max(10 * count * times, 100)):
                if len(made) >= wanted:
                    break
                child = make()
                if child is not None and child not in tried:
                    made[child] = None
        return list(made)


@dataclass
class Ranking(Generic[C]):
    """Foretells the order of candidates from the evaluated ones: small networks with a pairwise hinge loss.

    encode  candidate -> numbers, always as many
    nets    how many networks are averaged: one alone, of some dozens of evaluations, is no better than none
    prior   where the encoding holds a foretold figure, its place: the network learns what to add to it
    """

    encode: Callable[[C], Sequence[float]]
    prior: int | None = None
    steps: int = 150
    width: int = 32
    nets: int = 4
    least: int = 24
    seed: int = 0
    _known: dict[C, Sequence[float]] = field(default_factory=dict)

    def __call__(self, tried: Sequence[tuple[C, float]], pool: Sequence[C]) -> Sequence[float]:
        x, wanted = self._features([c for c, _ in tried]), self._features(pool)
        scores = torch.tensor([v for _, v in tried], dtype=torch.float32)
        known = scores.isfinite() & x.isfinite().all(1)
        first = (lambda f: f[:, self.prior].clone()) if self.prior is not None else (lambda f: torch.zeros(len(f)))
        if int(known.sum()) < self.least:
            return first(wanted).tolist()
        x, scores = x[known], scores[known]
        mean, std = x.mean(0), x.std(0).clamp(min=1e-3)
        nets = [self._learn((x - mean) / std, scores, first(x), mix(self.seed, k)) for k in range(self.nets)]
        wanted_prior, wanted = first(wanted), ((wanted - mean) / std).clamp(-5, 5)
        with torch.no_grad():
            ranks = torch.stack([net(wanted)[:, 0] for net in nets]).mean(0) + wanted_prior
        return torch.where(ranks.isfinite(), ranks, math.inf).tolist()

    def _features(self, candidates: Sequence[C]) -> Tensor:
        """The encodings of candidates, (n, features); each candidate is encoded once."""
        for c in candidates:
            if c not in self._known:
                self._known[c] = self.encode(c)
        return torch.tensor([self._known[c] for c in candidates], dtype=torch.float32)

    def _learn(self, x: Tensor, scores: Tensor, prior: Tensor, seed: int) -> nn.Module:
        """One network that adds to the prior what puts the evaluated candidates in order."""
        draw = torch.Generator().manual_seed(seed)
        first, last = nn.Linear(x.shape[1], self.width), nn.Linear(self.width, 1)
        net = nn.Sequential(first, nn.SiLU(), last)
        with torch.no_grad():
            first.weight.copy_(torch.randn(self.width, x.shape[1], generator=draw) / x.shape[1] ** 0.5)
            for p in (first.bias, last.weight, last.bias):
                p.zero_()
        heights = scores.clamp(min=1e-12).log()
        optimiser = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=1e-2)
        with torch.enable_grad():
            for _ in range(self.steps):
                i, j = torch.randint(len(x), (2, 256), generator=draw)
                foretold = net(x)[:, 0] + prior
                gap = heights[i] - heights[j]
                loss = (gap.abs().clamp(max=1.0) - (foretold[i] - foretold[j]) * gap.sign()).clamp(min=0).mean()
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
                optimiser.step()
        return net
