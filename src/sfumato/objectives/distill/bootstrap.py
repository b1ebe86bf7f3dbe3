"""A one-step student without data: it follows the teacher's trajectory in the signal, from noise downwards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.core import Context, Denoiser, Frozen, InputError, Loss, Objective, linear
from sfumato.objectives.distill._common import distance, labelled, readable, streams
from sfumato.objectives.times import unit


class Bootstrap(Objective):
    """min E |g(eps, s) - sg y'_s|^2 + boundary E |g(eps, 1) - f(eps, 1)|^2, with s = t - delta.

    y_t = (x_t - sigma_t eps) / alpha_t is the signal of the teacher's trajectory from eps, f its belief about x0. One DDIM
    step is exact in y: y_s = r y_t + (1 - r) f(x_t, t) with r = (alpha_t sigma_s) / (sigma_t alpha_s), and the target y'_s is
    that step from the student's own y_t = g(eps, t). Where signal = False the student is compared in x_t instead.

    student   player 'student', a :class:`sfumato.denoisers.Parametrized` network. It is asked as at time 1, with the label of
              time 1 - t: so g(eps, 0) is its ordinary belief at t = 1, and one DDIM step from 1 to 0 samples it
    teacher   a Denoiser, with its guidance around it
    shape     of one item; the batch needs conditions only (Trainer(data=None, batch=n) without any)
    delta     the step in t; smaller is less biased and slower
    boundary  weight of the second term, which says where the trajectory begins. A step shrinks an error of its start by r, so
              errors at time 1 fade on the way; without the term they are those of a network that was never told
    share     of the items, drawn, that the second term is of: it costs a call of teacher and student each

    The weight of times is uniform and 1 / delta^2 is left out. Source: Gu, Zhai, Zhang, Liu, Susskind, 2023, "BOOT:
    Data-free Distillation of Denoising Diffusion Models with Bootstrapping".
    """

    def __init__(
        self,
        student: Denoiser,
        teacher: Denoiser,
        shape: Sequence[int],
        *,
        delta: float = 0.04,
        boundary: float = 1.0,
        share: float = 0.25,
        signal: bool = True,
    ) -> None:
        super().__init__()
        if not 0 < share <= 1:
            raise InputError(f"share = {share}: above 0, at most 1; without the second term boundary = 0")
        if not 1e-3 <= delta < 1 or boundary < 0:
            raise InputError(f"delta = {delta}, boundary = {boundary}: delta in [0.001, 1), boundary not negative")
        readable(student, [1.0])
        self.student, self.teacher, self.shape = student, Frozen(teacher), tuple(shape)
        self.delta, self.boundary, self.share, self.signal = delta, boundary, share, signal

    def players(self) -> Mapping[str, nn.Module]:
        return {"student": self.student}

    def says(self, noise: Tensor, t: Tensor, ctx: Context) -> Tensor:
        """g(eps, t): the signal of the trajectory from ``noise`` (B, *) at times t (B,)."""
        process = self.student.process
        x = linear(process.coef(1.0).sigma, noise)
        return labelled(self.student, 1.0 - t)(x, torch.ones_like(t), ctx).mean

    def forward(self, batch: Mapping[str, Any], ctx: Context, player: str = "student") -> Loss:
        ctx = ctx.fork(cond=batch.get("cond", {}))
        process = self.student.process
        noise: Any = ctx.draw(process.space, torch.empty(ctx.batch, *self.shape, device=ctx.device))
        t = (self.delta + (1 - self.delta) * unit(streams(ctx), stratified=True)).to(noise.device)
        s = (t - self.delta).clamp(min=0.0)
        a, b = process.coef(t), process.coef(s)
        with torch.no_grad():
            y = self.says(noise, t, ctx.fork("target", look=True))
            belief = self.teacher(linear(a.alpha, y, a.sigma, noise), t, ctx.fork("teacher", look=True)).mean
            ratio = a.alpha * b.sigma / (a.sigma * b.alpha)
            aim = linear(ratio, y, 1 - ratio, belief)
        said = self.says(noise, s, ctx.fork("student"))
        each = distance(said, aim)
        error = each.mean() if self.signal else (each * b.alpha.to(each) ** 2).mean()
        if not self.boundary:
            return Loss(error, {"bootstrap": error.detach()})
        edge = self._edge(noise, ctx)
        return Loss(error + self.boundary * edge, {"bootstrap": error.detach(), "boundary": edge.detach()})

    def _edge(self, noise: Tensor, ctx: Context) -> Tensor:
        """E |g(eps, 1) - f(eps, 1)|^2 over the drawn share of the items; each counts alike, however many are drawn."""
        rows = torch.nonzero(unit(streams(ctx), stratified=True) < self.share).flatten().tolist()
        if not rows:
            return noise.new_zeros(())
        cond = {k: v[rows] if isinstance(v, Tensor) else [v[i] for i in rows] for k, v in ctx.cond.items()}
        ctx = replace(ctx.fork("edge", cond=cond, batch=len(rows)), rng=streams(ctx).select(rows))
        top = torch.ones(len(rows), dtype=torch.float64, device=noise.device)
        with torch.no_grad():
            start = linear(self.student.process.coef(1.0).sigma, noise[rows])
            first = self.teacher(start, top, ctx.fork("teacher", look=True)).mean
        return distance(self.says(noise[rows], top, ctx), first).sum() / (self.share * len(noise))
