"""Soft value-based decoding: choose among several next states by how much reward their future promises."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from sfumato.core import Context, Denoiser, InputError, Solver, Step, Times, Wrap, tree_map
from sfumato.steering.follow import Said

Reward: TypeAlias = Callable[[Any, Mapping[str, Any]], Tensor]
Value: TypeAlias = Callable[[Any, Any, Denoiser, Context], Tensor]


@dataclass(frozen=True)
class SoftValueDecoding(Wrap):
    """See :func:`svdd`."""

    inner: Solver
    value: Value
    candidates: int = 8
    alpha: float = 0.0
    every: int = 1
    interval: tuple[float, float] | None = None
    group: int | None = None

    def __post_init__(self) -> None:
        if self.candidates < 1 or self.every < 1 or (self.group is not None and self.group < 1):
            raise InputError(f"candidates = {self.candidates}, every = {self.every}, group = {self.group}: at least 1")
        if not self.alpha >= 0:
            raise InputError(f"alpha = {self.alpha}: 0 takes the best candidate, larger stays closer to the model")
        if self.interval is not None and not 0 <= self.interval[0] < self.interval[1] <= 1:
            raise InputError(f"interval = {self.interval}: (low, high) with 0 <= low < high <= 1 in time t")
        if not self.inner.stochastic and self.candidates > 1:
            raise InputError(
                f"{self.inner} draws no noise, so all candidates are one: use 'ddpm' or another SDE solver"
            )

    @property
    def nfe(self) -> float:  # type: ignore[override]
        """Of a step that chooses: the inner solver's, and one a candidate where its value asks the denoiser."""
        look = getattr(self.value, "calls", 0) if self.candidates > 1 else 0
        return self.inner.nfe + self.candidates * look

    def step(self, st: Step, s: Times, denoiser: Denoiser, ctx: Context) -> Step:
        if self.candidates == 1 or not self._chooses(st.t, s, denoiser.process, ctx):
            return self.inner.step(st, s, denoiser, ctx)
        once = _Once(denoiser, st, ctx)
        steps = [self.inner.step(st, s, once, ctx) for _ in range(self.candidates)]  # each draws noise of its own
        values = _usable(self._values([step.x for step in steps], s, denoiser, ctx))
        index = values.argmax(1) if self.alpha == 0 else _draw((values / self.alpha).softmax(1), ctx)
        x = tree_map(lambda *xs: _rows(list(xs), index), *(step.x for step in steps))
        return replace(steps[0], x=x, carry=_chosen([step.carry for step in steps], index))

    def _chooses(self, t: Times, s: Times, process: Any, ctx: Context) -> bool:
        if ctx.run.step % self.every or (isinstance(s, float) and _settled(process, s)):
            return False
        if self.interval is None:
            return True
        if not isinstance(t, float):
            raise InputError("an interval of time needs one clock for the batch")
        return self.interval[0] <= t <= self.interval[1]

    def _values(self, states: Sequence[Any], s: Times, denoiser: Denoiser, ctx: Context) -> Tensor:
        """(B, M): the M rows of each item stand together, ``group`` of them a call."""
        out = []
        size = len(states) if self.group is None else self.group
        for low in range(0, len(states), size):
            part = states[low : low + size]
            n = len(part)
            x = tree_map(lambda *xs: torch.stack(xs, 1).flatten(0, 1), *part)
            clock = s.repeat_interleave(n) if isinstance(s, Tensor) else s
            cond = {k: _repeated(v, n, ctx.batch) for k, v in ctx.cond.items()}
            value = self.value(x, clock, denoiser, ctx.fork("value", cond=cond, look=True))
            if not isinstance(value, Tensor) or value.shape != (n * ctx.batch,):
                got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise InputError(f"a reward gives one number a row, a tensor ({n * ctx.batch},), not {got}")
            out.append(value.double().view(ctx.batch, n))
        return torch.cat(out, 1)


class _Once(Said):
    """The denoiser of one step: the call at its state is made once for all candidates."""

    def __init__(self, inner: Denoiser, st: Step, ctx: Context) -> None:
        super().__init__(inner, None, st.x, st.t)

    def forward(self, x: Any, t: Any, ctx: Context) -> Any:
        belief, at, time = self.known
        if belief is None and x is at and t is time:
            self.known = (self.inner(x, t, ctx), at, time)
        return super().forward(x, t, ctx)


@dataclass(frozen=True)
class PosteriorMean:
    """value(x_s) = reward(E[x0 | x_s], cond), one call a candidate. See :func:`svdd`."""

    reward: Reward
    codec: Any = None

    calls = 1

    def __call__(self, x: Any, s: Any, denoiser: Denoiser, ctx: Context) -> Tensor:
        x0 = denoiser(x, s, ctx).mean
        return self.reward(x0 if self.codec is None else self.codec.decode(x0), ctx.cond)


def _settled(process: Any, s: float) -> bool:
    """Whether a step to s is deterministic whatever the solver: a Gaussian law where no noise is left."""
    return hasattr(process, "coef") and process.coef(s).sigma == 0


def _usable(values: Tensor) -> Tensor:
    values = values.masked_fill(values.isnan(), -math.inf)
    if bool((values == -math.inf).all(1).any()):
        raise InputError("the reward is not a number (or minus infinity) for all candidates of an item")
    return values


def _draw(share: Tensor, ctx: Context) -> Tensor:
    """One index an item, by its own stream."""
    if ctx.rng is None:
        raise InputError("this context may not draw (seed=None): resampling with alpha > 0 does; alpha = 0 does not")
    u = ctx.rng.uniform(share[:, :1])
    return (share.cumsum(1) < u * share.sum(1, keepdim=True)).sum(1).clamp(max=share.shape[1] - 1)


def _rows(xs: list[Tensor], index: Tensor) -> Tensor:
    return torch.stack(xs, 1)[torch.arange(len(index), device=xs[0].device), index.to(xs[0].device)]


def _chosen(carries: Sequence[Any], index: Tensor) -> Any:
    """What a solver keeps, item by item from the candidate that was chosen."""
    one = carries[0]
    if isinstance(one, Mapping):
        return {k: _chosen([c[k] for c in carries], index) for k in one}
    if isinstance(one, (tuple, list)):
        return type(one)(_chosen(parts, index) for parts in zip(*carries, strict=True))
    if isinstance(one, Tensor) and one.ndim and len(one) == len(index):
        return one if all(c is one for c in carries) else _rows(list(carries), index)
    if any(c is not one and c != one for c in carries):
        raise InputError(f"candidates keep different {type(one).__name__}s, which cannot be mixed item by item")
    return one


def _repeated(v: Any, n: int, batch: int) -> Any:
    return v.repeat_interleave(n, 0) if isinstance(v, Tensor) and v.ndim and len(v) == batch else v


def svdd(
    reward: Reward | None = None,
    candidates: int = 8,
    alpha: float = 0.0,
    *,
    value: Value | None = None,
    every: int = 1,
    interval: tuple[float, float] | None = None,
    group: int | None = None,
    codec: Any = None,
) -> Callable[[Solver], Solver]:
    """Steer a stochastic solver to reward, which may be any black box: Solver -> Solver.

    The tilted law p(x0) exp(reward(x0) / alpha) has the reverse kernel p(x_s | x_t) exp(V(x_s) / alpha), where V is the soft
    value V(x_s) = alpha log E[exp(reward(x0) / alpha) | x_s]. So at each step M candidates are drawn for every item, from one
    call, and one of them is kept with probability softmax(V / alpha).

    reward      (x0, cond) -> (rows,), larger is better; needs no gradient. NaN counts as minus infinity
    candidates  M; 1 is the solver itself
    alpha       0 takes the best candidate; the larger, the closer to the model. In units of the reward
    value       (x_s, s, denoiser, ctx) -> (rows,) in the place of reward(E[x0 | x_s]), which costs M calls a step and lags
                behind V by what the spread of x0 would add: an exact or a learned value
    every       choose at every k-th step only; ``interval``: only while low <= t <= high
    group       candidates a look-ahead call (None: all), to bound the memory
    codec       decodes x0 for the reward

    Items never meet: item i has its own candidates from its own stream. Any process with a kernel will do, discrete ones too,
    with any solver that draws noise; steps that are deterministic (a Gaussian law to sigma = 0) choose nothing. Source:
    Li, Zhao, Wang, Scalia, Eraslan, Nair, Biancalani, Ji, Regev, Levine, Uehara, 2024, "Derivative-Free Guidance in Continuous
    and Discrete Diffusion Models with Soft Value-Based Decoding".
    """
    if (reward is None) == (value is None):
        raise InputError("give either reward= (its value is that of the posterior mean) or value=, not both or neither")
    look: Value | None = PosteriorMean(reward, codec) if reward is not None else value
    return lambda solver: SoftValueDecoding(solver, look, candidates, alpha, every, interval, group)  # type: ignore[arg-type]


__all__ = ["PosteriorMean", "Reward", "SoftValueDecoding", "Value", "svdd"]
