"""FlowChef as an edit: draw the target while what is to stay is pulled back to the image, without inversion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sfumato.core import InputError
from sfumato.editing.base import Method, Task, register
from sfumato.editing.methods.basic import check_strength
from sfumato.guidance import flowchef, negative
from sfumato.steering import follow


@register("flowchef")
@dataclass(frozen=True)
class FlowChef(Method):
    """x_t <- x_t - step gradient of |M (x0(x_t) - image)|^2 / 2 at every call, the velocity held, M = 1 - mask.

    step        of the descent: 1 with 'sgd' puts the image back outside the mask at every step, so it returns exactly
    iterations  gradient steps a call; optimizer 'sgd', or 'adam' with ``step`` as its rate (published for latents: 4 and 0.6)
    until       steer while t >= until: 0 all the way; without a mask this is what lets the image change
    strength    the time to start from; 1 is pure noise
    negative    guide away from the source where it is given (and the guidance has a scale)

    No inversion and no backward pass; any solver. Source: Patel, Wen, Metaxas, Yang, 2024, "Steering Rectified Flow Models in
    the Vector Field for Controlled Image Generation".
    """

    step: float = 1.0
    iterations: int = 1
    optimizer: str = "sgd"
    until: float = 0.0
    strength: float = 1.0
    negative: bool = True

    accepts = frozenset({"source", "mask"})

    def __post_init__(self) -> None:
        check_strength(self.strength)
        if not 0 <= self.until < 1:
            raise InputError(f"until = {self.until}: a time in [0, 1), below which nothing is steered")

    def __call__(self, task: Task) -> Tensor:
        if task.mask is None and self.until == 0:
            raise InputError("without mask= and with until=0 all of the image is held: give one of them")
        mask = task.latent_mask
        held: Any = 1.0 if mask is None else 1.0 - mask

        def cost(x0: Tensor, cond: Any) -> Tensor:
            return (held * (x0 - task.x0)).square().flatten(1).sum(1) / 2

        steered = flowchef(
            cost, self.step, iterations=self.iterations, optimizer=self.optimizer, interval=(self.until, 1.0)
        )
        away = self.negative and "source" in task.given and task.scale not in (None, 1.0)
        ctx = task.context(dict(task.target) | (negative(task.source) if away else {}))
        x, _ = task.process.corrupt(task.x0, self.strength, ctx)
        solver = follow(task.solver)
        return solver.read(task.run(x, denoiser=steered(task.guided), solver=solver, start=self.strength, ctx=ctx))  # type: ignore[return-value]


__all__ = ["FlowChef"]
