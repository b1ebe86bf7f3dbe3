"""Editing by a shift of the network's deepest features."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sfumato.core import InputError
from sfumato.denoisers.features import bottleneck, features
from sfumato.editing.base import Method, Task, register
from sfumato.editing.directions import Direction, jacobian_directions
from sfumato.editing.methods.basic import check_strength


@register("h-space")
@dataclass(frozen=True)
class HSpace(Method):
    """Invert to t = strength, then sample down again with h_t + scale v_t in the place of the bottleneck h_t.

    direction   a :class:`sfumato.editing.directions.Direction` (principal, mean_difference, ...). None finds one in the
                image itself: the singular vector number ``component`` of the Jacobian d x0 / d h at the time ``at``, inside
                the mask if there is one, as long as h is there
    scale       multiples of the direction; 0 is the plain inversion and back
    interval    (low, high): shift only while low <= t <= high
    asymmetric  shift only the predicted x0, not the direction to x_t: two calls a step

    Without guidance both ways, since the direction is the edit. Source: Haas, Huberman-Spiegelglas, Mulayoff, Graßhof,
    Brandt, Michaeli, 2024, "Discovering Interpretable Directions in the Semantic Latent Space of Diffusion Models".
    """

    direction: Direction | None = None
    scale: float = 0.5
    strength: float = 1.0
    component: int = 0
    at: float = 0.6
    interval: tuple[float, float] | None = None
    asymmetric: bool = False

    needs = frozenset()
    accepts = frozenset({"source", "mask"})

    def __post_init__(self) -> None:
        check_strength(self.strength)
        if self.component < 0 or not 0 < self.at <= 1:
            raise InputError(f"component = {self.component} and at = {self.at}: 0, 1, ... and a time in (0, 1]")

    def __call__(self, task: Task) -> Tensor:
        if self.direction is not None and task.mask is not None:
            raise InputError("a mask restricts the search of a direction, and one is given: leave out mask= or direction=")
        plain = {"denoiser": task.denoiser, "cond": task.source}
        up = task.run(task.x0, start=0.0, stop=self.strength, **plain)
        direction = self._own(task) if self.direction is None else self.direction
        shifted = direction.shift(self.scale, self.interval, self.asymmetric)(task.denoiser)
        plain["denoiser"] = task.denoiser if self.scale == 0 else shifted
        return task.solver.read(task.run(up.x, start=self.strength, **plain))  # type: ignore[return-value]

    def _own(self, task: Task) -> Direction:
        """The singular vector of each image, as long as its own h."""
        path = bottleneck(task.denoiser)
        x = task.run(task.x0, denoiser=task.denoiser, cond=task.source, start=0.0, stop=self.at).x
        found = jacobian_directions(
            task.denoiser, x, self.at, self.component + 1, cond=task.source, path=path, mask=task.latent_mask, seed=task.seed
        )
        h = features(task.denoiser, x, self.at, task.context(task.source), [path])[1][path]
        v = found.right[:, self.component]
        length = h.flatten(1).norm(dim=1).view(-1, *[1] * (v.ndim - 1))
        return Direction((v * length)[None], (self.at,), path)
