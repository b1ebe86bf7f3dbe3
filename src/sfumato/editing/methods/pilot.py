"""PILOT: inpainting by descending on the state itself, so that what fills the hole and what surrounds it agree."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from sfumato.core import Context, Denoiser, InputError, Solver, State, Step, Times, Wrap, linear
from sfumato.editing.attention import At, Control, Watch, controlled, watched
from sfumato.editing.base import Method, Task, register
from sfumato.editing.blending import Blended
from sfumato.editing.regions import fitted
from sfumato.editing.words import as_image, columns, words

Cost: TypeAlias = Callable[[Tensor, float, Context], Tensor]
"""(x_t, t, ctx) -> (B,), differentiable in x_t."""

AREA = 1499  # known cells that the published weight of the attention loss was chosen for


@dataclass(frozen=True)
class Confine(Control):
    """Cross-attention to all but the first token is multiplied by a mask (n, 1, H, W): words are heard in the hole only.

    The first token, which begins a text or is the null token, stays as it is; rows are not normalised again.
    """

    kind: str | None = "cross"
    mask: Tensor | None = field(default=None, compare=False)

    def __call__(self, at: At, own: Tensor, source: Tensor) -> Tensor:
        if self.mask is None:
            raise InputError("Confine needs mask=, (n, 1, H, W) with 1 where words may be heard")
        inside = queries(self.mask, own).repeat(len(own) // len(self.mask), 1)[:, None, :, None]
        return torch.cat([own[..., :1], own[..., 1:] * inside], -1)


def queries(hole: Tensor, maps: Tensor) -> Tensor:
    """A mask (n, 1, H, W) at the queries of maps (R, heads, N, L), (n, N) in {0, 1}: 1 in cells wholly inside."""
    size = (hole.shape[-2], hole.shape[-1])
    like = as_image(maps[: len(hole), 0, :, 0], size)
    return (fitted(hole, like) > 0.999).flatten(1).to(maps)


def centralization(maps: list[Tensor], hole: Tensor, tokens: Tensor) -> Tensor:
    """How much more the words (n, L) bool are attended outside the hole (n, 1, H, W) than inside it, (n,).

    The mean over layers of sum_{heads, p outside, words} A / (|outside| heads) - the same inside; a layer in which no cell,
    or every cell, lies inside counts 0. Source: Pan et al., 2024, "Coherent and Multi-modality Image Inpainting via Latent Space Optimization".
    """
    values = []
    for p in maps:
        p = p[: len(hole)]
        inside = queries(hole, p)
        heard = (p * columns(tokens.to(p), p, 0.0)).sum(-1).mean(1)
        within, without = inside.sum(1), (1 - inside).sum(1)
        difference = (heard * (1 - inside)).sum(1) / without.clamp(min=1) - (heard * inside).sum(1) / within.clamp(
            min=1
        )
        values.append(difference * (within > 0) * (without > 0))
    return torch.stack(values).mean(0)


@dataclass(frozen=True)
class Descend(Wrap):
    """While t > stop, before every ``interval``-th step: ``inner_steps`` steps of heavy-ball descent of a cost on the state.

    m <- momentum m - rate(t) grad cost(x_t), x_t <- x_t + m, with m = 0 at first. After ``stop`` the solver ``after`` steps.
    """

    inner: Solver
    after: Solver
    cost: Cost
    rate: Callable[[float], float]
    interval: int = 10
    repeats: int = 10
    stop: float = 0.2
    momentum: float = 0.7

    def step(self, st: Step, s: Times, denoiser: Denoiser, ctx: Context) -> Step:
        if not isinstance(st.t, float) or not isinstance(st.x, Tensor):
            raise InputError("descent on the state needs one tensor and one clock for the batch")
        if st.t <= self.stop:
            return self.after.step(st, s, denoiser, ctx)
        if ctx.run.step % self.interval == 0:
            st = replace(st, x=self.descend(st.x, st.t, ctx))
        return self.inner.step(st, s, denoiser, ctx)

    def descend(self, x: Tensor, t: float, ctx: Context) -> Tensor:
        """The state after the descent, item by item."""
        rate, pace = self.rate(t), torch.zeros_like(x)
        for _ in range(self.repeats):
            with torch.enable_grad():
                at = x.detach().requires_grad_()
                (slope,) = torch.autograd.grad(self.cost(at, t, ctx.fork("descent")).sum(), at)
            pace = linear(self.momentum, pace, -rate, slope)
            x = x + pace
        return x


@register("pilot")
@dataclass(frozen=True)
class Pilot(Method):
    """Draw the target in the mask: at first the state is descended on, at last what is known is put back after each step.

    The cost of a state is ||B (x0 - E[x0 | x_t, cond])||^2 / 4, B the known cells and the belief without guidance, plus
    semantic(t) (cells in B / 1499) :func:`centralization` of the prompt's words. All runs hear words in the hole only.

    gamma      the share of time, from 1 down, in which the state is optimised; after it the known part is blended in
               (:class:`~sfumato.editing.blending.Blended`). 0 is blended diffusion
    interval   steps between two descents; inner: steps of each; momentum of them
    rate       lr 1.002^(1000 (1 - t)); first: the rate before the first step
    semantic   c of c(t): a tenth of it below t = 0.3, from there linear up to c at t = 1; 0 leaves the loss out
    confine    words are heard in the hole only

    The background term sums over cells, so its slope at a cell does not depend on how many there are. Conditions of any kind
    (control, image_prompt, vendor) act through the network, as in the paper. A prompt without words has no attention loss.
    Source: Pan et al., 2024, "Coherent and Multi-modality Image Inpainting via Latent Space
    Optimization" (PILOT).
    """

    gamma: float = 0.8
    interval: int = 10
    inner: int = 10
    rate: float = 0.03
    first: float = 0.007
    momentum: float = 0.7
    semantic: float = 130.0
    confine: bool = True

    needs = frozenset({"mask"})
    accepts = frozenset({"prompt", "source"})

    def __post_init__(self) -> None:
        if not (0 <= self.gamma <= 1 and 0 <= self.momentum < 1 and self.rate >= 0 and self.first >= 0):
            raise InputError(
                f"gamma = {self.gamma}, momentum = {self.momentum}, rate = {self.rate}, first = {self.first}: gamma in "
                "[0, 1], momentum in [0, 1), rates of at least 0"
            )
        if self.interval < 1 or self.inner < 1 or self.semantic < 0:
            raise InputError(
                f"interval = {self.interval}, inner = {self.inner}, semantic = {self.semantic}: from 1, 1, 0"
            )

    def __call__(self, task: Task) -> Tensor:
        hole, ctx = _hole(task), task.context()
        noise: Any = ctx.draw(task.process.space, task.x0)
        tokens = words(task.target).to(task.x0.device) if "text" in task.target else None
        heard = tokens is not None and bool(tokens.any())
        plain: Denoiser = task.denoiser
        if heard and self.confine:
            plain = controlled(plain, Confine(mask=hole))
        blended = Blended(task.solver, hole, task.x0, noise)
        cost = self.cost(task, hole, tokens if heard and self.semantic else None)
        solver = Descend(
            task.solver, blended, cost, self.speed, self.interval, self.inner, 1 - self.gamma, self.momentum
        )
        begun = linear(task.process.coef(1.0).sigma, noise)
        return solver.read(task.run(begun, denoiser=task.guidance(plain), solver=solver, ctx=ctx))  # type: ignore[return-value]

    def speed(self, t: float) -> float:
        """The rate of descent at t."""
        return self.first if t == 1 else self.rate * 1.002 ** (1000 * (1 - t))

    def weight(self, t: float) -> float:
        """c(t) of the attention loss."""
        return self.semantic * (0.1 if t < 0.3 else 0.1 + 0.9 * (t - 0.3) / 0.7)

    def cost(self, task: Task, hole: Tensor, tokens: Tensor | None) -> Cost:
        """The cost of a state, (B,)."""
        known = 1 - hole
        area = known.sum((1, 2, 3)) / AREA
        controls: list[Control] = [] if tokens is None else [Watch()]  # seen before words are confined
        if self.confine and "text" in task.target:
            controls.append(Confine(mask=hole))
        denoiser = controlled(task.denoiser, *controls) if controls else task.denoiser

        def cost(x: Tensor, t: float, ctx: Context) -> Tensor:
            belief: State = denoiser(x, t, ctx).mean
            total = (known * (task.x0 - belief)).square().flatten(1).sum(1) / 4  # type: ignore[operator]
            if tokens is None:
                return total
            maps = [p for _, p in watched(ctx)]
            if not maps:
                raise InputError("no cross-attention was seen in this network: set semantic=0 and confine=False")
            return total + self.weight(t) * area * centralization(maps, hole, tokens)

        return cost


def _hole(task: Task) -> Tensor:
    """1 in every cell of the state that the mask touches, (B, 1, H, W)."""
    if task.latent_mask is None:
        raise InputError("pilot needs a mask")
    return (task.latent_mask > 0).to(task.x0)


__all__ = ["Confine", "Descend", "Pilot", "centralization", "queries"]
