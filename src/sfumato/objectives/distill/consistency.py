"""Consistency distillation and training, with guidance inside, over phases and along sub-paths."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sfumato import solvers
from sfumato.core import Context, Denoiser, Frozen, InputError, Loss, Objective, Posterior, Solver, linear
from sfumato.denoisers.boundaries import boundary as boundary_form
from sfumato.guidance import cfg
from sfumato.objectives.denoising import drop
from sfumato.objectives.distill._common import distance, falling, moved, one_of, readable, streams
from sfumato.objectives.times import unit

WEIGHTINGS, TARGET = {"uniform": 0, "sigma": 1, "variance": 2}, 0.95


class Consistency(Objective):
    """min E d(f(x_t, t), sg f'(x_s, s)): the student says the same at both ends of a sub-path t > s of a trajectory.

    f is the end of the trajectory, or of the phase, that x_t is in: alpha_e x0 + sigma_e eps at the end time e, or a
    boundary form of x and x0. Where s = e the target is x_s itself. x_t is data with noise.

    student    player 'student'
    times      t_0 > ... > t_N; n is uniform, t = t_n and s = t_{n + skip}
    teacher    a Denoiser whose ``substeps`` steps of ``solver`` lead from x_t to x_s; None trains without one: x_s is the
               same data with the same noise (consistency training)
    guidance   of the teacher: a scale, or (low, high) from which each item draws its own, which a student that reads a
               condition 'guidance' is told; None: the teacher as it is. Scales are those of :func:`sfumato.guidance.cfg`
    boundary   'x0' | 'lcm' | 'karras', see :mod:`sfumato.denoisers.boundaries`; the last two have one phase
    phases     how many pieces of equally many steps; each is learnt to its own end
    gamma      1: the sub-path's noisy end only. 'uniform': also the line x_g = (1 - g) (alpha_t / alpha_s) x_s + g x_t with
               g ~ U(0, 1), whose noise is sigma_g = (1 - g) (alpha_t / alpha_s) sigma_s + g sigma_t. Its network is asked
               where it knows such states: at the time u with sigma_u / alpha_u = sigma_g / alpha_t, of x_g alpha_u / alpha_t,
               which says the same x0 = (x_g - sigma_g eps) / alpha_t, and begins as the teacher on the whole line. The line
               is a chord of the trajectory, so the student also reads a condition 'gamma'
               (:func:`sfumato.networks.scalars.with_scalars`), which is 1 when sampling
    target     f' is an average of the student's weights with this decay; 0: the student itself, which drifts away from a teacher
               unless steps are small. None: 0.95 with a teacher, as published; 0 without (Song & Dhariwal, 2023, "Improved
               Techniques for Training Consistency Models")
    metric     'l2' | 'l1' | 'huber' with ``scale``
    weighting  of the times: 'uniform', 'sigma' (1 / sigma_t over its mean) or 'variance' (1 / sigma_t^2). A network of v moves
               its x0 by sigma_t only, so clean times, whose errors all noisier ones inherit, have little say in 'uniform';
               'sigma' of 'l1' and 'variance' of 'l2' are the distance of v

    A batch is {"x": data, "cond"}. gamma = 'uniform' at g = 1 is consistency distillation. Sources: Song, Dhariwal, Chen,
    Sutskever, 2023, "Consistency Models"; Luo et al., 2023, "Latent Consistency Models" and "LCM-LoRA"; Wang et al., 2024,
    "Phased Consistency Models"; Xu et al., 2024, "Accelerating Image Generation with Sub-path Linear Approximation Model".
    """

    def __init__(
        self,
        student: Denoiser,
        times: Sequence[float],
        teacher: Denoiser | None = None,
        *,
        skip: int = 1,
        substeps: int = 1,
        solver: str | Solver = "ddim",
        guidance: float | tuple[float, float] | None = None,
        boundary: str = "x0",
        phases: int = 1,
        gamma: float | str = 1.0,
        target: float | None = None,
        metric: str = "huber",
        scale: float = 1e-3,
        weighting: str = "uniform",
        dropout: float | Mapping[str, float] = 0.0,
    ) -> None:
        super().__init__()
        self._times = falling(times)
        steps = len(self._times) - 1
        if weighting not in WEIGHTINGS:
            raise InputError(f"weighting = {weighting!r}: use one of {', '.join(WEIGHTINGS)}")
        if not 1 <= skip <= steps or substeps < 1 or not 1 <= phases <= steps or steps % phases:
            raise InputError(
                f"skip = {skip}, substeps = {substeps}, phases = {phases} with {steps} steps: skip and substeps at least 1, "
                "phases a divisor of the steps"
            )
        if phases > 1 and boundary != "x0":
            raise InputError(f"boundary = {boundary!r} is for one phase: several are read at their ends ('x0')")
        boundary_form(boundary, student.process.coef(float(self._times[0])), float(self._times[0]))
        if gamma not in (1, "uniform") or (gamma != 1 and teacher is None):
            raise InputError(f"gamma = {gamma!r}: 1, or 'uniform' with a teacher")
        if teacher is None and guidance is not None:
            raise InputError("guidance is the teacher's: give a teacher, or guidance=None")
        target = (0.0 if teacher is None else TARGET) if target is None else target
        if not 0 <= target < 1:
            raise InputError(f"target = {target}: a decay in [0, 1)")
        if gamma != 1 and student.process.coef(float(self._times[0])).alpha < 1e-3:
            raise InputError(
                f"sub-paths need alpha > 0.001 at their noisy end: begin below t = {float(self._times[0]):g}"
            )
        readable(student, self._times[:-1].tolist())
        self.student, self.teacher = student, None if teacher is None else Frozen(teacher)
        self.average = _twin(student) if target else None
        self.solver: Solver = solvers.registry.make(solver) if isinstance(solver, str) else solver
        if self.solver.stochastic:
            raise InputError(f"{type(self.solver).__name__} draws noise: a sub-path needs a deterministic solver")
        self.skip, self.substeps, self.guidance, self.boundary, self.phases = skip, substeps, guidance, boundary, phases
        self.gamma, self.target, self.metric, self.scale, self.dropout = gamma, target, metric, scale, dropout
        self.weighting = weighting

    def players(self) -> Mapping[str, nn.Module]:
        return {"student": self.student}

    def after_step(self, it: int) -> None:
        if self.average is not None:
            for mean, p in zip(self.average.parameters(), self.student.parameters(), strict=True):
                if p.requires_grad:
                    mean.lerp_(p, 1 - self.target)

    def forward(self, batch: Mapping[str, Any], ctx: Context, player: str = "student") -> Loss:
        if "x" not in batch:
            raise InputError(f"Consistency reads batch['x'], the data; the batch has {sorted(batch)}")
        process, x0 = self.student.process, batch["x"]
        t, s, e = (v.to(x0.device) for v in self._path(ctx))
        cond = dict(drop(batch.get("cond", {}), self.student.null, self.dropout, ctx))
        noise: Any = ctx.draw(process.space, x0)
        scale = self._scale(ctx, len(x0))
        if isinstance(scale, Tensor) and "guidance" in (getattr(self.student, "reads", None) or ()):
            cond["guidance"] = scale.to(x0)
        with torch.no_grad():
            x, _ = process.corrupt(x0, t, ctx, noise=noise)
            y = self._lower(x, x0, noise, t, s, ctx.fork(cond=batch.get("cond", {})), scale)
            there = self.student if self.average is None else self.average
            aim = self._end(there, y, s, e, ctx.fork("target", cond=self._told(cond, 1.0, x0), look=True))
            last = (s == e).view(-1, *[1] * (x.ndim - 1))
            aim = torch.where(last, y if self.boundary == "x0" else y / process.coef(e).alpha.to(y).view_as(last), aim)
        share, asked = torch.ones_like(t), None
        if self.gamma == "uniform":
            share = unit(streams(ctx)).to(x0.device)
            x, asked = self._along(x, y, t, s, share)
        said = self._end(self.student, x, t, e, ctx.fork(cond=self._told(cond, share, x0)), asked)
        error = distance(said, aim, self.metric, self.scale)
        return Loss((error * self._weight(t).to(error)).mean(), {"error": error.detach().mean()})

    def _path(self, ctx: Context) -> tuple[Tensor, Tensor, Tensor]:
        """t, s and the end of the phase, (B,) each."""
        steps = len(self._times) - 1
        n = one_of(steps, ctx)
        length = steps // self.phases
        end = (n // length + 1) * length
        return self._times[n], self._times[(n + self.skip).minimum(end)], self._times[end]

    def _scale(self, ctx: Context, n: int) -> float | Tensor | None:
        """The guidance of each item."""
        if not isinstance(self.guidance, tuple):
            return self.guidance
        low, high = self.guidance
        return low + (high - low) * unit(streams(ctx))

    def _lower(
        self, x: Tensor, x0: Tensor, noise: Tensor, t: Tensor, s: Tensor, ctx: Context, scale: float | Tensor | None
    ) -> Tensor:
        """The cleaner end of the sub-path from x."""
        if self.teacher is None:
            return self.student.process.corrupt(x0, s, ctx, noise=noise)[0]  # type: ignore[no-any-return]
        teacher: Any = self.teacher if scale is None else cfg(scale)(self.teacher)  # type: ignore[arg-type]
        return moved(teacher, self.solver, x, t, s, self.substeps, ctx)

    def _line(self, x: Tensor, y: Tensor, t: Tensor, s: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
        """A state on the line between the ends of the sub-path, and its noise."""
        a, b = self.student.process.coef(t), self.student.process.coef(s)
        ratio = (1 - share) * a.alpha / b.alpha
        return linear(ratio, y, share, x), ratio * b.sigma + share * a.sigma

    def _along(self, x: Tensor, y: Tensor, t: Tensor, s: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
        """A state on that line as one of the process, alpha_u / alpha_t times as large, and its time u."""
        process = self.student.process
        line, sigma = self._line(x, y, t, s, share)
        alpha = process.coef(t).alpha
        u = [process.time(-math.log(n) if n else math.inf) for n in (sigma / alpha).tolist()]
        asked = torch.as_tensor(u, dtype=t.dtype, device=t.device).clamp(s, t)
        return linear(process.coef(asked).alpha / alpha, line), asked

    def _weight(self, t: Tensor) -> Tensor:
        """What an item at time t counts; 1 on average over the times."""
        power = WEIGHTINGS[self.weighting]
        sigma, every = (self.student.process.coef(v).sigma for v in (t, self._times[:-1]))
        return sigma**-power / (every**-power).mean().to(sigma.device)

    def _told(self, cond: Mapping[str, Any], share: float | Tensor, like: Tensor) -> Mapping[str, Any]:
        """The conditions, with gamma beside them where the student reads it."""
        if self.gamma == 1:
            return cond
        value = share.to(like) if isinstance(share, Tensor) else torch.full((len(like),), share).to(like)
        return {**cond, "gamma": value}

    def _end(
        self, denoiser: Denoiser, x: Tensor, t: Tensor, e: Tensor, ctx: Context, asked: Tensor | None = None
    ) -> Tensor:
        """f(x, t): what the denoiser, asked at this time, says of the end."""
        post: Posterior = denoiser(x, t if asked is None else asked, ctx)
        if self.boundary == "x0":
            c = self.student.process.coef(e)
            return post.at(c.alpha, c.sigma)
        coef = self.student.process.coef(t)
        a, b = boundary_form(self.boundary, coef, t)
        ratio = 1.0 if asked is None else coef.alpha / post.coef.alpha
        return linear(a * ratio, x, b, post.mean)  # type: ignore[no-any-return]


def _twin(student: Denoiser) -> Denoiser:
    """A copy that shares what is not trained: of a model with adapters, only those are there twice."""
    still = {id(p): p for p in student.parameters() if not p.requires_grad}
    return copy.deepcopy(student, still).requires_grad_(False)
