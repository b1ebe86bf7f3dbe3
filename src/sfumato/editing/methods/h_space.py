"""Editing by a shift of the network's deepest features."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sfumato.core import InputError
from sfumato.denoisers.features import bottleneck, features
from sfumato.editing.base import Method, Task, register
from sfumato.editing.directions import Direction, jacobian_directions
from sfumato.editing.methods.basic import check_strength
from sfumato.editing.methods.recorded import drawing
from sfumato.editing.recorded import NoiseMaps, record


@register("h-space")
@dataclass(frozen=True)
class HSpace(Method):
    """Record the noise that draws the image, and draw again with it and h_t + scale v_t in the place of the features h_t.

    direction   a :class:`sfumato.editing.directions.Direction` (principal, mean_difference, ...), or the one that is given
                to the edit, which `sfumato directions` may have learned. None finds one in the image itself: the singular
                vector number ``component`` of the Jacobian d x0 / d h at the recorded state nearest to the time ``at``, as
                long as h is there, inside the mask if there is one
    scale       multiples of the direction; at 0 the image returns
    path        the submodule whose output is h, where the direction does not say it; default: the bottleneck
    strength    of the run: below 1 the noisiest part is skipped; eta: share of DDPM's noise
    interval    (low, high): shift only while low <= t <= high
    asymmetric  shift only the predicted x0, not the direction to x_t: two calls a step

    Without guidance, since the direction is the edit. Sources: Haas, Huberman-Spiegelglas, Mulayoff, Graßhof, Brandt,
    Michaeli, 2024, "Discovering Interpretable Directions in the Semantic Latent Space of Diffusion Models"; the noise:
    Huberman-Spiegelglas, Kulikov, Michaeli, 2024, "An Edit Friendly DDPM Noise Space".
    """

    direction: Direction | None = None
    scale: float = 0.5
    path: str | None = None
    component: int = 0
    at: float = 0.6
    strength: float = 1.0
    eta: float = 1.0
    interval: tuple[float, float] | None = None
    asymmetric: bool = False

    needs = frozenset()
    accepts = frozenset({"source", "mask", "direction"})

    def __post_init__(self) -> None:
        check_strength(self.strength)
        if self.component < 0 or not 0 < self.at <= 1:
            raise InputError(f"component = {self.component} and at = {self.at}: 0, 1, ... and a time in (0, 1]")

    def __call__(self, task: Task) -> Tensor:
        direction = self.direction or task.direction
        if direction is not None and not isinstance(direction, Direction):
            raise InputError("h-space follows a Direction; this one was learned for boundary-diffusion")
        if direction is not None and task.mask is not None:
            raise InputError(
                "a mask restricts the search of a direction, and one is given: leave out mask= or direction="
            )
        ctx, steps = task.context(task.source), max(1, round(task.steps * self.strength))
        solver = drawing(task.solver, self.eta)
        maps = record(task.denoiser, task.x0, solver=solver, grid=task.grid, steps=steps, start=self.strength, ctx=ctx)
        direction = self._own(task, maps) if direction is None else direction
        shift = direction.shift(self.scale, self.interval, self.asymmetric)
        again = task.context(task.source)
        x = maps.decode(shift(task.denoiser) if self.scale else task.denoiser, ctx=again)
        task.nfe[0] += ctx.run.nfe + again.run.nfe
        return x

    def _own(self, task: Task, maps: NoiseMaps) -> Direction:
        """The singular vector of each image, as long as its own h."""
        path = bottleneck(task.denoiser) if self.path is None else self.path
        near = min(range(len(maps.noise)), key=lambda i: abs(maps.times[i] - self.at))
        x, t = maps.states[near], maps.times[near]
        found = jacobian_directions(
            task.denoiser, x, t, self.component + 1, cond=task.source, path=path, mask=task.latent_mask, seed=task.seed
        )
        h = features(task.denoiser, x, t, task.context(task.source), [path])[1][path]
        v = found.right[:, self.component]
        lengths = torch.linalg.vector_norm(h, dim=tuple(range(1, h.ndim)), keepdim=True)
        return Direction((v * lengths)[None], (t,), path)
