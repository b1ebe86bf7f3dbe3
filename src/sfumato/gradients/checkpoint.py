"""The exact gradient of a discrete run, each step computed again when it is differentiated."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sfumato.core import InputError, SfumatoError, Step
from sfumato.gradients._job import Gradients, Job, Pull
from sfumato.gradients._registry import register
from sfumato.gradients._trees import leaves, rebuilt, walk


@dataclass(frozen=True, eq=False)
class Kept:
    """A Step and what the wrappers remembered when it was reached."""

    st: Step
    memory: dict[str, Any]

    @property
    def tree(self) -> tuple[Any, Any, Any]:
        return self.st.x, self.st.carry, self.memory


@register("checkpoint")
@dataclass(frozen=True)
class Checkpoint:
    """Reverse-mode differentiation of the run itself, by any solver, with the graph of one step at a time.

    store  which states are kept meanwhile (a state is what a Step holds, small beside a network's activations):
           'all'      every one: a step is computed once more
           'sqrt'     about 2 sqrt(steps): twice more (Chen, Xu, Zhang, Guestrin, 2016, "Training Deep Nets with Sublinear
                      Memory Cost")
           'inverse'  none: a reversible solver takes its steps back, to round-off

    Noise is not drawn anew: draw k of step j is a pure function of (seed, j, k), so stochastic solvers are differentiated
    at the noise they had. Equal to method 'plain' to round-off. Raises InputError where a step computed again gives
    another state, and for 'inverse' with a solver that has none or with wrappers that remember.
    """

    store: str = "all"

    def __post_init__(self) -> None:
        if self.store not in ("all", "sqrt", "inverse"):
            raise InputError(f"store = {self.store!r}: use 'all', 'sqrt' or 'inverse'")

    def record(self, job: Job, start: Step) -> tuple[Step, Pull]:
        """Run, keep some states, and say how gradients come back."""
        if self.store == "inverse":
            job.solver.inverse()  # says so at once where there is none
        every = 1 if self.store == "all" else math.isqrt(job.steps - 1) + 1
        kept: list[Kept] = []
        for i, st in enumerate(job.forward(start)):
            if i == 0 or (self.store != "inverse" and i % every == 0):
                kept.append(_keep(st, job))
            last = st
        end, segments = _keep(last, job), [k for k in kept if k.st.index < last.index]
        if self.store == "inverse" and (leaves(end.memory) or leaves(kept[0].memory)):
            raise InputError("wrappers of this denoiser remember tensors, which no solver takes back: use store='all'")
        return last, lambda given: self._pull(job, segments, end, given)

    def _pull(self, job: Job, kept: Sequence[Kept], end: Kept, given: Sequence[Tensor | None]) -> Gradients:
        wanted: Gradients = [None] * len(job.wanted)
        adjoint, after = _pull_read(job, end, given), end
        states = _undone(job, kept[0], end) if self.store == "inverse" else _recomputed(job, kept)
        for state in states:
            adjoint = _pull_step(job, state, after, adjoint, wanted)
            after = state
        return [*adjoint, *wanted]


def _keep(st: Step, job: Job) -> Kept:
    return Kept(st, walk(lambda leaf: leaf, job.ctx.memory))


def _recomputed(job: Job, kept: Sequence[Kept]) -> Iterator[Kept]:
    """All states but the last, latest first, from the kept ones."""
    ends = [*(k.st.index for k in kept[1:]), None]
    for begin, end in zip(reversed(kept), reversed(ends), strict=True):
        ctx = job.context(_keep_memory(begin), begin.st.index, begin.st.t)
        segment = [begin]
        length = (len(job.seen) if end is None else end) - begin.st.index
        run = job.again(begin.st, ctx)
        next(run)
        while len(segment) < length:
            segment.append(Kept(next(run), walk(lambda leaf: leaf, ctx.memory)))
        yield from reversed(segment)


def _undone(job: Job, start: Kept, end: Kept) -> Iterator[Kept]:
    """All states but the last, latest first, from the last by the inverse solver; the first must come back."""
    run = job.undone(end.st, start.st.t)
    next(run)
    for index in range(end.st.index - 1, start.st.index - 1, -1):
        state = Kept(replace(next(run), index=index), {})
        if index == start.st.index:
            gap, size = _gap(state.st.x, start.st.x)
            if gap > 1e-2 * size:
                raise SfumatoError(
                    f"the inverse of {type(job.solver).__name__} came back {gap / size:.1%} away from the start: rounding "
                    "has grown along this run; use float64, fewer steps or store='all'"
                )
        yield state


def _keep_memory(state: Kept) -> dict[str, Any]:
    memory: dict[str, Any] = walk(lambda leaf: leaf, state.memory)
    return memory


def _pull_read(job: Job, end: Kept, given: Sequence[Tensor | None]) -> Gradients:
    """Gradients of the last Step's leaves from those of the state that is shown."""
    inputs = [v.detach().requires_grad_() for v in leaves(end.tree)]
    x, carry, _ = rebuilt(end.tree, inputs)
    with torch.enable_grad():
        shown = leaves(job.solver.read(replace(end.st, x=x, carry=carry)))
    return _grad(shown, given, inputs)


def _pull_step(job: Job, state: Kept, after: Kept, adjoint: Gradients, wanted: Gradients) -> Gradients:
    """Gradients of a state's leaves from those of the next one's; those of ``job.wanted`` are added up in ``wanted``."""
    inputs = [v.detach().requires_grad_() for v in leaves(state.tree)]
    x, carry, memory = rebuilt(state.tree, inputs)
    ctx = job.context(memory, state.st.index, state.st.t)
    run = job.again(replace(state.st, x=x, carry=carry), ctx, grad=True)
    next(run)
    st = next(run)
    outputs = leaves((st.x, st.carry, ctx.memory))
    _check_same(st, after.st, len(outputs) == len(adjoint))
    job.check(outputs, inputs)
    found = _grad(outputs, adjoint, [*inputs, *job.wanted])
    for i, g in enumerate(found[len(inputs) :]):
        before = wanted[i]
        wanted[i] = g if before is None else before if g is None else before + g
    return found[: len(inputs)]


def _check_same(st: Step, after: Step, alike: bool) -> None:
    gap, size = _gap(st.x, after.x)
    dtype = leaves(st.x)[0].dtype
    if not alike or gap > torch.finfo(dtype).eps ** 0.5 * size:
        raise InputError(
            f"step {after.index} gave another state when it was computed again: the denoiser or solver is random or keeps "
            "memory outside the Context (a training mode, a counter, weights changed in place); use method='plain'"
        )


def _gap(a: Any, b: Any) -> tuple[float, float]:
    """The largest difference of two states and the size of the second."""
    pairs = [(u.detach(), v.detach()) for u, v in zip(leaves(a), leaves(b), strict=True)]
    return max(float((u - v).abs().max()) for u, v in pairs), max(float(v.abs().max()) for _, v in pairs)


def _grad(outputs: Sequence[Tensor], given: Sequence[Tensor | None], inputs: Sequence[Tensor]) -> Gradients:
    """The product of the gradients of outputs with the Jacobian; None where nothing depends."""
    pairs = [(o, g) for o, g in zip(outputs, given, strict=True) if g is not None and o.requires_grad]
    if not pairs:
        return [None] * len(inputs)
    read, weights = zip(*pairs, strict=True)
    return list(torch.autograd.grad(read, inputs, weights, allow_unused=True))
