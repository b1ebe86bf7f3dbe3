"""Polish a few-step student on its own samples: its whole run against the teacher's end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.core import Context, Denoiser, Frozen, InputError, Loss, Objective
from sfumato.objectives.distill._common import distance, falling, readable


class Unrolled(Objective):
    """min d(sample of the student, sample of the teacher) from the same noise: the student's DDIM on ``times``, differentiated.

    A student of single segments has never seen the states that its own steps lead to; here it does.

    student   player 'student'
    times     t_0 > ... > t_K, the student's steps; the last is where samples are compared
    last      how many of the last steps gradients go through; the earlier ones are run without
    metric    'l2' | 'l1' | 'huber' with ``scale``
    looks     a further distance (x, y) -> (B,) of the samples, with the weight ``seen``

    A batch is {"states": (B, 2, *) start and sample of the teacher, "cond"}. Costs K calls forwards and ``last`` backwards.
    """

    def __init__(
        self,
        student: Denoiser,
        times: Sequence[float],
        *,
        last: int | None = None,
        metric: str = "l2",
        scale: float = 1e-3,
        looks: nn.Module | None = None,
        seen: float = 1.0,
    ) -> None:
        super().__init__()
        self._times: list[float] = falling(times).tolist()
        steps = len(self._times) - 1
        if last is not None and not 1 <= last <= steps:
            raise InputError(f"last = {last}: from 1 to the {steps} steps")
        readable(student, self._times[:-1])
        self.student, self.last, self.metric, self.scale = student, steps if last is None else last, metric, scale
        self.looks, self.seen = None if looks is None else Frozen(looks), seen

    def players(self) -> Mapping[str, nn.Module]:
        return {"student": self.student}

    def sampled(self, x: Tensor, ctx: Context) -> Tensor:
        """The student's sample from the start x."""
        steps = len(self._times) - 1
        for k in range(steps):
            c = self.student.process.coef(self._times[k + 1])
            with torch.set_grad_enabled(torch.is_grad_enabled() and k >= steps - self.last):
                x = self.student(x, self._times[k], ctx.fork("unrolled", look=k < steps - 1)).at(c.alpha, c.sigma)
        return x

    def forward(self, batch: Mapping[str, Any], ctx: Context, player: str = "student") -> Loss:
        states = batch.get("states")
        if states is None or states.shape[1] != 2:
            raise InputError(
                f"Unrolled reads batch['states'] (B, 2, *), start and sample; the batch has {sorted(batch)}"
            )
        made = self.sampled(states[:, 0], ctx.fork(cond=batch.get("cond", {})))
        error = distance(made, states[:, 1], self.metric, self.scale).mean()
        if self.looks is None:
            return Loss(error, {"error": error.detach()})
        looks = self.looks(made, states[:, 1]).mean()
        return Loss(error + self.seen * looks, {"error": error.detach(), "looks": looks.detach()})
