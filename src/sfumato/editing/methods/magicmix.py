"""Semantic mixing: the layout of one picture, the content of a prompt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sfumato import core, grids, solvers
from sfumato.core import (
    Context,
    Denoiser,
    Grid,
    Guidance,
    InputError,
    Posterior,
    Solver,
    Step,
    Times,
    Wrap,
    Wrapper,
    check_steps,
    linear,
)
from sfumato.editing.base import Method, Task, register
from sfumato.pipeline import Pipeline

UPDATES = ("mixed", "state")


@dataclass(frozen=True)
class Mixed(Wrap):
    """x_t <- nu x_t + (1 - nu) (alpha_t layout + sigma_t noise) before each step of the inner solver from low < t <= high.

    ``layout`` and ``noise`` are (B, *); the noise is one for all times, so that the mixed states share it and keep their
    variance as long as x itself descends from it.
    """

    inner: Solver
    layout: Tensor
    noise: Tensor
    nu: float
    low: float
    high: float

    def step(self, st: Step, s: Times, denoiser: Denoiser, ctx: Context) -> Step:
        if not self.low < st.t <= self.high:  # type: ignore[operator]
            return self.inner.step(st, s, denoiser, ctx)
        return self.inner.step(replace(st, x=self.mixture(st.x, st.t, denoiser.process)), s, denoiser, ctx)

    def mixture(self, x: Any, t: Times, process: Any) -> Any:
        """The mixed state at t."""
        c = process.coef(t)
        return linear(self.nu, x, (1 - self.nu) * c.alpha, self.layout, (1 - self.nu) * c.sigma, self.noise)


class MixedReading(Wrapper):
    """Asks the inner denoiser at the mixed state and applies its eps to the unmixed one."""

    def __init__(self, inner: Denoiser, mixing: Mixed) -> None:
        super().__init__(inner)
        self.mixing = mixing

    def forward(self, x: Any, t: Any, ctx: Context) -> Any:
        if not self.mixing.low < t <= self.mixing.high:
            return self.inner(x, t, ctx)
        post = self.inner(self.mixing.mixture(x, t, self.process), t, ctx)
        return Posterior(post.view("eps"), "eps", x, post.coef)


@register("magicmix")
@dataclass(frozen=True)
class MagicMix(Method):
    """The picture's layout, noised to t = k_max, is denoised under the prompt, and mixed in again down to t = k_min.

        x_t <- nu x_t + (1 - nu) (alpha_t x0 + sigma_t eps)   for k_min < t <= k_max, with one eps
        x_s  = solver(x_t; prompt),                            and below k_min nothing but the prompt.

    k_max, k_min  times; k_max large gives the content more room, k_min small keeps the layout longer
    nu            the content's share: 1 is SDEdit from k_max, 0 leaves the content only what happens below k_min
    update        'mixed': the step starts from the mixed state; 'state': the network reads the mixed state and its noise
                  moves the unmixed one, as in the community implementation (where alpha > 0)

    Without a picture :func:`mix` takes the layout from words. The correlation of the two noises, which keeps the variance, is
    that of deterministic solvers; stochastic ones are allowed and look smoother. What the picture shows (``source``) does not
    matter. Source: Liew, Yan, Zhou, Feng, 2022, "MagicMix: Semantic Mixing with Diffusion Models"; the re-weighting of single
    words in its appendix is a matter of attention and not here.
    """

    k_max: float = 0.6
    k_min: float = 0.3
    nu: float = 0.5
    update: str = "mixed"

    def __post_init__(self) -> None:
        if not 0 <= self.k_min < self.k_max <= 1:
            raise InputError(f"k_min = {self.k_min}, k_max = {self.k_max}: times with 0 <= k_min < k_max <= 1")
        if not 0 <= self.nu <= 1:
            raise InputError(f"nu = {self.nu}: the content's share, in [0, 1]")
        if self.update not in UPDATES:
            raise InputError(f"update = {self.update!r}: one of {', '.join(UPDATES)}")

    def __call__(self, task: Task) -> Tensor:
        ctx = task.context()
        x, noise = task.process.corrupt(task.x0, self.k_max, ctx)
        solver, denoiser = self.mixing(task.solver, task.guided, task.x0, noise)
        return task.solver.read(task.run(x, solver=solver, denoiser=denoiser, start=self.k_max, ctx=ctx))  # type: ignore[return-value]

    def mixing(self, solver: Solver, denoiser: Denoiser, layout: Tensor, noise: Tensor) -> tuple[Solver, Denoiser]:
        """The solver and the guided denoiser that mix this layout in."""
        mixing = Mixed(solver, layout, noise, self.nu, self.k_min, self.k_max)
        return (mixing, denoiser) if self.update == "mixed" else (solver, MixedReading(denoiser, mixing))


@torch.no_grad()
def mix(
    pipeline: Pipeline,
    layout: str,
    prompt: str,
    n: int = 1,
    *,
    method: MagicMix | None = None,
    cond: Mapping[str, Any] | None = None,
    steps: int = 50,
    solver: str | Solver = "ddim",
    grid: str | Grid | None = None,
    guidance: float | str | Guidance | None = None,
    seed: int = 0,
) -> Tensor:
    """n pictures with the layout of what one prompt draws and the content of another: uint8 (n, 3, H, W).

    The layout is what the model believes at t = k_max of a run under the prompt ``layout``; its noise is that belief's, so the
    mixing begins exactly where that run stands. nu = 1 is one run that changes its prompt at k_max. Picture i depends on (seed, i) only.
    Source: as 'magicmix', its text-text mode; whether the layout below k_max is this belief re-noised or the run's own
    states the publication does not say.
    """
    method = method or MagicMix()
    check_steps(steps)
    if method.k_max == 1:
        raise InputError("k_max = 1 leaves no step in which the words could make a layout: give a time below 1")
    chosen = solvers.registry.make(solver) if isinstance(solver, str) else solver
    times = (chosen.grid or pipeline.grid) if grid is None else grid
    visited = grids.registry.make(times) if isinstance(times, str) else times
    denoiser = pipeline.guided(guidance)
    device = next((p.device for p in pipeline.denoiser.parameters()), torch.device("cpu"))

    def context(text: str, part: int) -> Context:
        """That of a run under this text; the second run draws other noise than the first."""
        own = core.mix(seed, part) if part else seed
        return Context.of(n, own, cond=pipeline.conditions(n, [text] * n, **(cond or {})), device=device)

    above, below = (max(1, round(steps * share)) for share in (1 - method.k_max, method.k_max))
    shape = (n, *pipeline.codec.shape(*pipeline.size))
    run = core.trajectory(denoiser, chosen, visited, above, shape=shape, stop=method.k_max, ctx=context(layout, 0))
    for st in run:
        x: Any = chosen.read(st)
    belief: Any = denoiser(x, method.k_max, context(layout, 0))
    steered, mixed = method.mixing(chosen, denoiser, belief.mean, belief.view("eps"))
    *_, st = core.trajectory(mixed, steered, visited, below, x=x, start=method.k_max, ctx=context(prompt, 1))
    return pipeline.codec.images(chosen.read(st))  # type: ignore[arg-type]


__all__ = ["MagicMix", "Mixed", "MixedReading", "mix"]
