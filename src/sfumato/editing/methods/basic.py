"""The two edits that everything else is compared with: noise and denoise, and DDIM there and back."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sfumato.core import InputError
from sfumato.editing.base import Method, Task, register


def check_strength(strength: float) -> None:
    """InputError unless 0 < strength <= 1."""
    if not 0 < strength <= 1:
        raise InputError(f"strength = {strength}: above 0 (nothing happens) and at most 1 (from pure noise)")


@register("sdedit")
@dataclass(frozen=True)
class SDEdit(Method):
    """x_t = alpha x0 + sigma eps at t = strength, then the target's trajectory down to 0.

    With a mask the known part is put back, at the noise level of each step, by the same noise: what is outside it
    returns exactly. Source: Meng, He, Song, Song, Wu, Zhu, Ermon, 2022, "SDEdit: Guided Image Synthesis and Editing with
    Stochastic Differential Equations"; the mask: Avrahami, Lischinski, Fried, 2022, "Blended Diffusion".
    """

    strength: float = 0.6

    accepts = frozenset({"source", "mask"})

    def __post_init__(self) -> None:
        check_strength(self.strength)

    def __call__(self, task: Task) -> Tensor:
        ctx = task.context()
        process = task.process
        x, noise = process.corrupt(task.x0, self.strength, ctx)
        mask, solver = task.latent_mask, task.solver
        if mask is None:
            return solver.read(task.run(x, start=self.strength, ctx=ctx))  # type: ignore[return-value]
        from sfumato.editing.blending import Blended

        kept = Blended(solver, mask, task.x0, noise)
        return solver.read(task.run(x, solver=kept, start=self.strength, ctx=ctx))  # type: ignore[return-value]


@register("ddim-inversion")
@dataclass(frozen=True)
class DDIMInversion(Method):
    """The deterministic solver run up to t = strength under the source's conditions, then down under the target's.

    Exact to the solver's order only, and guidance (used on the way down) magnifies what is lost: 'edict', 'bdia',
    'direct-inversion' and 'edit-friendly' are the answers. Source: Song, Meng, Ermon, 2021, "Denoising Diffusion
    Implicit Models"; Dhariwal, Nichol, 2021.
    """

    strength: float = 1.0

    def __post_init__(self) -> None:
        check_strength(self.strength)

    def __call__(self, task: Task) -> Tensor:
        up = task.run(task.x0, denoiser=task.denoiser, cond=task.source, start=0.0, stop=self.strength)
        return task.solver.read(task.run(up.x, start=self.strength))  # type: ignore[return-value]
