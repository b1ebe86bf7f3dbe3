"""A smaller network says what the full one says of the same noised data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from sfumato.core import Context, Denoiser, Frozen, InputError, Loss, Objective
from sfumato.objectives.denoising import drop
from sfumato.objectives.distill._common import streams
from sfumato.objectives.times import Times, Uniform


class Imitation(Objective):
    """min E |student(x_t, t) - teacher(x_t, t)|^2 + data E |student(x_t, t) - target|^2, in the native prediction of both.

    The teacher's answer is the mean of the target given x_t, as far as it has learnt it, so the first term has the same
    minimum as the second without the noise of the target: few updates bring a network that inherited its weights back.

    student  player 'student'; teacher, of the same process and prediction, is frozen
    data     weight of the denoising loss on the data themselves
    dropout  how often a condition is replaced by the null, for both
    private  conditions that the student alone reads (which expert serves an item)

    A batch is {"x": (B, *), "cond"}. Source: Hinton, Vinyals, Dean, 2015, "Distilling the Knowledge in a Neural Network"; for
    pruned diffusion models: Kim, Song, Castells, Choi, 2023, "BK-SDM".
    """

    def __init__(
        self,
        student: Denoiser,
        teacher: Denoiser,
        *,
        data: float = 0.0,
        dropout: float = 0.1,
        private: Sequence[str] = (),
        times: Times | None = None,
    ) -> None:
        super().__init__()
        if not data >= 0:
            raise InputError(f"data = {data}: a weight, not negative")
        self.student, self.teacher, self.data, self.dropout = student, Frozen(teacher), data, dropout
        self.private, self.times = frozenset(private), Uniform() if times is None else times

    def players(self) -> Mapping[str, nn.Module]:
        return {"student": self.student}

    def forward(self, batch: Mapping[str, Any], ctx: Context, player: str = "student") -> Loss:
        process, x0 = self.student.process, batch["x"]
        t, importance = self.times(process, streams(ctx))
        noise = ctx.draw(process.space, x0)
        x, _ = process.corrupt(x0, t, ctx, noise=noise)
        told = drop(batch.get("cond", {}), self.student.null, self.dropout, ctx)
        post = self.student(x, t, ctx.fork("student", cond=told))
        with torch.no_grad():
            public = {name: value for name, value in told.items() if name not in self.private}
            wanted = self.teacher(x, t, ctx.fork("teacher", cond=public))
        if wanted.kind != post.kind:
            raise InputError(f"the student predicts {post.kind!r} and the teacher {wanted.kind!r}: give both alike")
        imitation = ((post.native - wanted.native).square().flatten(1).mean(1) * importance).mean()
        terms = {"imitation": imitation.detach()}
        if not self.data:
            return Loss(imitation.float(), terms)
        error = (post.native - process.target(post.kind, x0, noise, t)).square().flatten(1).mean(1)
        denoising = (error * importance).mean()
        return Loss((imitation + self.data * denoising).float(), {**terms, "denoising": denoising.detach()})


__all__ = ["Imitation"]
