"""One sampling run that can be run again, wholly or step by step, and the autograd node that stands for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sfumato.core import Context, Denoiser, Grid, InputError, Run, Solver, Step, Times, Wrap, trajectory
from sfumato.gradients._trees import leaves, rebuilt

Gradients: TypeAlias = "list[Tensor | None]"


class Pull(Protocol):
    """Gradients of the final state's leaves -> those of (start leaves, condition leaves, parameters)."""

    def __call__(self, given: Sequence[Tensor | None]) -> Gradients: ...


class Method(Protocol):
    """How gradients come back: runs the job without a graph and says how to pull gradients through it."""

    def record(self, job: Job, start: Step) -> tuple[Step, Pull]: ...


@dataclass(frozen=True)
class Recorded(Wrap):
    """The inner solver; every time it visits is kept."""

    inner: Solver
    seen: list[Times]

    def times(self, process: Any, grid: Sequence[float], x: Any, ctx: Context) -> Iterator[Times]:
        for s in self.inner.times(process, grid, x, ctx):
            self.seen.append(s)
            yield s


@dataclass(frozen=True)
class Replayed(Wrap):
    """The inner solver at the times of an earlier run, also where it chose them itself."""

    inner: Solver
    seen: tuple[Times, ...]

    def times(self, process: Any, grid: Sequence[float], x: Any, ctx: Context) -> Iterator[Times]:
        return iter(self.seen)


@dataclass(eq=False)
class Job:
    """All that a run depends on.

    conditions  ctx.cond with leaves of their own where gradients are wanted, so that those of one condition that was
                made from another are not counted twice
    seen        the times after the first
    """

    denoiser: Denoiser
    solver: Solver
    grid: Grid
    steps: int
    span: tuple[float, float]
    ctx: Context
    parameters: list[Tensor]
    conditions: Any = None
    seen: list[Times] = field(default_factory=list)

    def __post_init__(self) -> None:
        copies = [v.detach().requires_grad_(v.requires_grad) for v in leaves(self.ctx.cond)]
        self.conditions = rebuilt(self.ctx.cond, copies)
        self.listed = {id(p) for p in (*self.parameters, *self.denoiser.parameters())}

    @property
    def wanted(self) -> list[Tensor]:
        """The conditions and parameters that gradients are asked of."""
        return [*(v for v in leaves(self.conditions) if v.requires_grad), *self.parameters]

    def forward(self, start: Step) -> Iterator[Step]:
        """The run itself, in the caller's context."""
        return self._trajectory(Recorded(self.solver, self.seen), start, self.ctx)

    def again(self, st: Step, ctx: Context, grad: bool = False) -> Iterator[Step]:
        """The same run from one of its steps on."""
        return self._trajectory(Replayed(self.solver, tuple(self.seen)), st, ctx, grad)

    def undone(self, last: Step, first: Times) -> Iterator[Step]:
        """The run taken back step by step with the solver's exact inverse."""
        times = (*reversed(self.seen[:-1]), first)
        ctx = self.context({}, last.index, last.t)
        start, stop = self.span
        return trajectory(
            self.denoiser, Replayed(self.solver.inverse(), times), self.grid, self.steps,
            x=last.restart(), start=stop, stop=start, ctx=ctx,
        )  # fmt: skip

    def context(self, memory: dict[str, Any], index: int, t: Times) -> Context:
        """Surroundings equal to those of an earlier step, and apart from the caller's."""
        run = Run(step=index, total=self.ctx.run.total, t=t, s=t, shared=self.ctx.run.shared)
        rng = None if self.ctx.rng is None else self.ctx.rng.select(slice(None))
        return replace(self.ctx, cond=self.conditions, rng=rng, memory=memory, run=run)

    def check(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
        """Raise InputError where a tensor that requires gradients takes part and would not get its own."""
        known = self.listed | {id(v) for v in (*inputs, *self.wanted)}
        queue = [v.grad_fn for v in outputs if v.grad_fn is not None]
        met = set(queue)
        while queue:
            node = queue.pop()
            leaf = getattr(node, "variable", None)
            if leaf is not None and id(leaf) not in known:
                raise InputError(
                    f"a tensor {tuple(leaf.shape)} that requires gradients enters the denoiser, but it is neither a "
                    "condition nor one of its parameters: pass parameters=[...] with it"
                )
            fresh = {n for n, _ in node.next_functions if n is not None} - met
            met |= fresh
            queue.extend(fresh)

    def _trajectory(self, solver: Solver, st: Step, ctx: Context, grad: bool = False) -> Iterator[Step]:
        start, stop = self.span
        return trajectory(
            self.denoiser, solver, self.grid, self.steps, x=st, start=start, stop=stop, ctx=ctx, grad=grad
        )


class Through(torch.autograd.Function):
    """A whole run as one node of the graph."""

    @staticmethod
    def forward(ctx: Any, method: Method, job: Job, start: Step, box: list[Any], *tensors: Tensor) -> Any:
        inside = rebuilt((start.x, start.carry, job.ctx.memory), (v.detach() for v in tensors))
        job.ctx.memory.update(inside[2])
        last, ctx.pull = method.record(job, replace(start, x=inside[0], carry=inside[1]))
        ctx.save_for_backward(*tensors)
        box.append((last, job.solver.read(last)))
        return tuple(v.clone() for v in leaves(box[0][1]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *given: Tensor | None) -> Any:
        ctx.saved_tensors  # noqa: B018  (refuses tensors that were changed since, as autograd does)
        return (None, None, None, None, *ctx.pull(given))


def differentiable(method: Method, job: Job, start: Step) -> tuple[Any, Times]:
    """The state at the end of a run, and its time; gradients come back as ``method`` says."""
    box: list[Any] = []
    state = leaves((start.x, start.carry, job.ctx.memory))
    wanted = [v for v in leaves(job.ctx.cond) if v.requires_grad]
    outputs = Through.apply(method, job, start, box, *state, *wanted, *job.parameters)
    last, shown = box[0]
    return rebuilt(shown, outputs), last.t


def check_pure(denoiser: nn.Module) -> None:
    """Raise InputError where the same call would give another answer."""
    for name, module in denoiser.named_modules():
        if not module.training:
            continue
        dropout = isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0
        if dropout or isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise InputError(
                f"{name} ({type(module).__name__}) is in training mode, so a step cannot be run again with the same "
                "result: call denoiser.eval(), or use method='plain'"
            )
