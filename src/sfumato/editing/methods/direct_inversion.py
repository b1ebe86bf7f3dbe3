"""Direct inversion: the source branch stands on the stored trajectory, the target branch is left alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from sfumato.core import Context, Denoiser, InputError, Solver, Step, Times, Wrap, linear
from sfumato.editing.attention import Pair
from sfumato.editing.base import Method, Task, register
from sfumato.editing.blending import blend
from sfumato.editing.methods.basic import check_strength
from sfumato.editing.methods.prompt_to_prompt import controls, couple


@dataclass(frozen=True)
class Restored(Wrap):
    """After each inner step the source rows go back to the state that was stored for that time: x_src + scale o, o = x* - x_src.

    pair     which rows are the source's
    stored   x* by time, (n, *); a time that was not stored is an error
    scale    1 puts them on the trajectory, less pulls them towards it
    target   a multiple of the same offset added to the target rows (published as an ablation: it costs editability)
    mask     (n, 1, *): where it is 0 the target rows are the source's
    """

    inner: Solver
    pair: Pair
    stored: Mapping[float, Tensor] = field(repr=False)
    scale: float = 1.0
    target: float = 0.0
    mask: Tensor | None = None

    def step(self, st: Step, s: Times, denoiser: Denoiser, ctx: Context) -> Step:
        there = self.inner.step(st, s, denoiser, ctx)
        if s not in self.stored:
            raise InputError(f"no source state was stored for t = {s}: invert and edit with the same grid and steps")
        source, target = self.pair.split(there.x)
        offset = linear(1.0, self.stored[s], -1.0, source)  # type: ignore[index]
        source, target = linear(1.0, source, self.scale, offset), linear(1.0, target, self.target, offset)
        target = target if self.mask is None else blend(target, source, self.mask)
        return replace(there, x=self.pair.join(source, target))


@register("direct-inversion")
@dataclass(frozen=True)
class DirectInversion(Method):
    """DDIM inversion is stored, and while both branches run down the source branch is put back on it at every step.

    strength       the time up to which the image is inverted
    cross          share of the run in which the target's cross-attention is the source's, as in 'prompt-to-prompt'
    structure      share in which its self-attention is
    scale          of the source's offset; 1 as published
    target_offset  multiple of that offset added to the target branch; 0 as published

    With a mask the target is the source outside of it: there the image returns exactly. cross = structure = 0 needs no
    attention that can be controlled, and without a mask it is then 'ddim-inversion': the branches meet nowhere else.
    Source: Ju, Zeng, Bian, Liu, Xu, 2024, "Direct Inversion: Boosting Diffusion-based Editing with 3 Lines of Code" (PnP
    Inversion); the control: Hertz et al., 2022, "Prompt-to-Prompt Image Editing with Cross Attention Control".
    """

    strength: float = 1.0
    cross: float = 0.4
    structure: float = 0.6
    scale: float = 1.0
    target_offset: float = 0.0

    needs = frozenset({"prompt", "source"})
    accepts = frozenset({"mask"})

    def __post_init__(self) -> None:
        check_strength(self.strength)

    def __call__(self, task: Task) -> Tensor:
        return self.branches(task)[1]

    def branches(self, task: Task) -> tuple[Tensor, Tensor]:
        """(x0 of the source branch, x0 of the target branch)."""
        if task.solver.stochastic:
            raise InputError(
                f"{task.solver} draws noise and cannot invert: give a deterministic solver, or 'edit-friendly'"
            )
        stored = trail(task, self.strength)
        pair = Pair(len(task.x0))
        steered = Restored(task.solver, pair, stored, self.scale, self.target_offset, task.latent_mask)
        acting = controls(task, self.cross, self.structure, self.strength)
        return couple(task, stored[self.strength], acting, solver=steered, start=self.strength)


def trail(task: Task, strength: float = 1.0, cond: Mapping[str, Any] | None = None) -> dict[float, Tensor]:
    """The states of the task's images by time, on the way up to t = strength, without guidance under the source's conditions."""
    up = task.trajectory(
        task.x0, denoiser=task.denoiser, cond=task.source if cond is None else cond, start=0.0, stop=strength
    )
    return {st.t: task.solver.read(st) for st in up}  # type: ignore[misc]


__all__ = ["DirectInversion", "Restored", "trail"]
