"""Samples that can be differentiated."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sfumato import grids, solvers
from sfumato.core import Context, Denoiser, Grid, InputError, Solver, Step, first, linear, trajectory
from sfumato.core import sample as plain_sample
from sfumato.gradients._job import Job, Method, check_pure, differentiable
from sfumato.gradients._registry import register, registry


@register("plain")
@dataclass(frozen=True)
class Plain:
    """Ordinary backpropagation: every activation of every step is kept. Gradients reach whatever takes part."""


def sample(
    denoiser: Denoiser,
    *,
    method: str | Method | Plain = "checkpoint",
    solver: str | Solver = "dpm-solver++",
    grid: str | Grid = "arctan",
    steps: int = 20,
    shape: Any = None,
    x: Any = None,
    cond: Mapping[str, Any] | None = None,
    parameters: Iterable[Tensor] | None = None,
    seed: int | Sequence[int] = 0,
    start: float = 1.0,
    stop: float = 0.0,
    ctx: Context | None = None,
    dtype: torch.dtype | None = None,
    device: Any = None,
) -> Any:
    """Sample x (B, *) as :func:`sfumato.sample` does, to be differentiated: ``loss(x).backward()``.

    Gradients reach the start ``x``, all tensors in ``cond`` and the parameters.

    method      how they come back, a name, a spec such as "checkpoint(store='sqrt')", or an object:
                'checkpoint'  the exact gradient of this very run, each step computed again; memory of one step
                'adjoint'     that of the probability flow, by an equation solved backwards; memory of one call
                'plain'       ordinary backpropagation; memory of all steps
    parameters  leaf tensors that the denoiser reads; None: all of its own that require gradients; () for none, which
                saves their share of the work. 'plain' needs no list
    others      as in :func:`sfumato.core.trajectory`; start < stop differentiates an inversion

    The network is called again in the backward pass: taps see those calls too. ``ctx.run.nfe`` counts the forward ones.
    Gradients of gradients need 'plain'. Raises InputError for a network in training mode with dropout, for parameters
    that are not leaves, for a tensor that requires gradients and is nowhere listed, and what the method refuses.
    """
    chosen = registry.make(method) if isinstance(method, str) else method
    solver = solvers.registry.make(solver) if isinstance(solver, str) else solver
    grid = grids.registry.make(grid) if isinstance(grid, str) else grid
    if ctx is None:
        ctx = _context(denoiser, shape, x, cond, seed, dtype, device)
    elif cond is not None:
        raise InputError("ctx has conditions of its own: give cond= or ctx=, not both")
    options = {"shape": shape, "x": x, "start": start, "stop": stop, "ctx": ctx, "grad": torch.is_grad_enabled()}
    if isinstance(chosen, Plain):
        return plain_sample(denoiser, solver, grid, steps, **options)
    check_pure(denoiser)
    begun = next(trajectory(denoiser, solver, grid, steps, **options))
    times = grid(denoiser.process, steps, max(start, stop), min(start, stop))
    job = Job(denoiser, solver, lambda *_: times, steps, (start, stop), ctx, _leaves(denoiser, parameters))
    last, t = differentiable(chosen, job, begun)
    return linear(1.0, last, 1.0, denoiser.process.anchor(t, ctx.cond))


def _context(
    denoiser: Denoiser,
    shape: Any,
    x: Any,
    cond: Mapping[str, Any] | None,
    seed: int | Sequence[int],
    dtype: torch.dtype | None,
    device: Any,
) -> Context:
    """The context that trajectory would make."""
    like, rows = first(x.x if isinstance(x, Step) else x), first(shape)
    if isinstance(like, Tensor) and like.ndim:
        return Context.of(len(like), seed, cond=dict(cond or {}), dtype=like.dtype, device=like.device)
    if x is not None or not (isinstance(rows, Sequence) and rows and isinstance(rows[0], int) and rows[0] > 0):
        raise InputError("give either shape=(B, *) (start from noise) or x=, a state (B, *) or a Step")
    if device is None:
        device = next((p.device for p in denoiser.parameters()), torch.device("cpu"))
    return Context.of(rows[0], seed, cond=dict(cond or {}), dtype=dtype or torch.float32, device=device)


def _leaves(denoiser: Denoiser, parameters: Iterable[Tensor] | None) -> list[Tensor]:
    if parameters is None:
        return [p for p in denoiser.parameters() if p.requires_grad]
    given = list(parameters)
    wrong = [p for p in given if not (isinstance(p, Tensor) and p.is_leaf and p.requires_grad)]
    if wrong:
        what = f"a tensor {tuple(wrong[0].shape)}" if isinstance(wrong[0], Tensor) else f"a {type(wrong[0]).__name__}"
        raise InputError(f"parameters are leaf tensors with requires_grad=True; {what} among them is not")
    return list({id(p): p for p in given}.values())
