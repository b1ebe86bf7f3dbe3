"""One step of restoration, taught by a teacher that is asked at the noise levels where it knows of fine detail."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato import solvers
from sfumato.core import Context, Denoiser, Frozen, InputError, Loss, Objective, State
from sfumato.denoisers import features
from sfumato.objectives.distill._common import distance, moved, readable, streams
from sfumato.objectives.times import Times, Uniform

_LOW = 1e-3  # at t = 0 the state says x0 itself, and a belief read there has nothing of the network in it


class TimeAware(Objective):
    """One call y = student(x_1) that ends where the teacher's deterministic run of K steps from x_1 ends, x0', by

        |y - x0'|^2 + detail |T(y_t, t) - T(x0'_t, t)|^2 - adversarial C(h_t(y), t)

    T      the frozen teacher's x0 at y_t = alpha y + sigma eps, x0'_t with the same eps, t drawn from ``levels``: small
           times, at which the belief is about high frequencies. The gradient passes through T
    h_t    feature maps of the frozen teacher, ``paths``, at a state noised to t, drawn from ``noised``
    C      the critic, told t. It learns max(0, 1 - C(h_t(x0))) + max(0, 1 + C(h_t(y))), x0 the data, both with the same eps

    student      a Denoiser; begins as a copy of the teacher
    teacher      a Denoiser of an anchored process, or of any: conditions and the anchor are the batch's
    steps        K; or 0 where every batch has "states" (B, 2, *), x_1 and x0' in the solver's coordinates
    detail       weight of the second term; ``levels`` (0, 1/3) as published in words, numbers being unknown
    critic       maps, label -> (B,), see :class:`sfumato.networks.FeatureCritic`; None: no third term
    adversarial  weight of the third term

    A batch is {"x": data, "cond": conditions}, and "states" to save the teacher's run. Players 'student' and, with a
    critic, 'critic'. Without the last two terms it is the distillation of SinSR. Sample with one step of 'ddim'.
    Source: He et al., 2024, "One Step Diffusion-based Super-Resolution with Time-Aware Distillation".
    """

    def __init__(
        self,
        student: Denoiser,
        teacher: Denoiser,
        critic: nn.Module | None = None,
        *,
        paths: Sequence[str] = (),
        steps: int = 15,
        detail: float = 1.0,
        adversarial: float = 0.02,
        levels: Times | None = None,
        noised: Times | None = None,
    ) -> None:
        super().__init__()
        if detail < 0 or adversarial < 0 or steps < 0:
            raise InputError(f"steps = {steps}, detail = {detail}, adversarial = {adversarial}: not below 0")
        if (critic is None) != (not paths):
            raise InputError("a critic reads the teacher's feature maps: give critic= and paths= together, or neither")
        readable(student, [1.0])
        self.student, self.teacher, self.critic, self.paths = student, Frozen(teacher), critic, list(paths)
        self.steps, self.detail, self.adversarial = steps, detail, adversarial
        self.levels = Uniform(_LOW, 1 / 3) if levels is None else levels
        self.noised = Uniform(_LOW, 1.0) if noised is None else noised

    def players(self) -> Mapping[str, nn.Module]:
        return {"student": self.student, **({} if self.critic is None else {"critic": self.critic})}

    def turns(self, it: int) -> Sequence[Sequence[str]]:
        return [["student"]] if self.critic is None else [["critic"], ["student"]]

    def forward(self, batch: Mapping[str, Any], ctx: Context, player: str = "student") -> Loss:
        if "x" not in batch:
            raise InputError(f"TimeAware reads batch['x'], the data; the batch has {sorted(batch)}")
        ctx = ctx.fork(cond=batch.get("cond", {}))
        start, end = self._pair(batch, ctx, wanted=player == "student")
        with torch.set_grad_enabled(player == "student" and torch.is_grad_enabled()):
            made = self.student(start, 1.0, ctx.fork("student")).mean
        return self._judged(batch["x"], made, ctx) if player == "critic" else self._student(made, end, ctx)

    def _student(self, made: Tensor, end: Tensor, ctx: Context) -> Loss:
        """The loss of the student, the critic as it is."""
        total = distance(made, end).mean()
        terms = {"end": total.detach()}
        if self.detail:
            detail = self._detail(made, end, ctx)
            total, terms = total + self.detail * detail, {**terms, "detail": detail.detach()}
        if self.critic is not None and self.adversarial:
            t = self._times(self.noised, made, ctx)
            noise = ctx.draw(self.teacher.process.space, made)
            fool = -self.critic(self._maps(made, t, noise, ctx), t.to(made)).mean()
            total, terms = total + self.adversarial * fool, {**terms, "fool": fool.detach()}
        return Loss(total, terms)

    def _detail(self, made: Tensor, end: Tensor, ctx: Context) -> Tensor:
        """How far apart the teacher sees what is made and where its run ends, noised alike."""
        process, t = self.teacher.process, self._times(self.levels, made, ctx)
        noise = ctx.draw(process.space, made)
        said = [
            self.teacher(process.corrupt(y, t, ctx, noise=noise)[0], t, ctx.fork("teacher", look=True)).mean
            for y in (made, end)
        ]
        return distance(said[0], said[1].detach()).mean()

    def _judged(self, real: Tensor, made: Tensor, ctx: Context) -> Loss:
        """The hinge loss of the critic."""
        t, noise = self._times(self.noised, real, ctx), ctx.draw(self.teacher.process.space, real)
        with torch.no_grad():
            seen = [self._maps(x, t, noise, ctx) for x in (real, made)]
        critic: Any = self.critic
        right, wrong = (critic(maps, t.to(real)) for maps in seen)
        loss = F.relu(1 - right).mean() + F.relu(1 + wrong).mean()
        return Loss(loss, {"right": right.detach().mean(), "wrong": wrong.detach().mean()})

    def _maps(self, x: Tensor, t: Tensor, noise: State, ctx: Context) -> list[Tensor]:
        """What the teacher sees in x at the level t."""
        state = self.teacher.process.corrupt(x, t, ctx, noise=noise)[0]
        teacher: Any = self.teacher
        _, maps = features.features(teacher, state, t, ctx.fork("teacher", look=True), self.paths)
        return [features.as_maps(maps[path], x) for path in self.paths]

    @torch.no_grad()
    def _pair(self, batch: Mapping[str, Any], ctx: Context, wanted: bool) -> tuple[Tensor, Tensor]:
        """x_1 and the teacher's end; where the end is not wanted it may be x_1 again."""
        if "states" in batch:
            return batch["states"][:, 0], batch["states"][:, -1]
        if not self.steps:
            raise InputError(f"with steps = 0 a batch holds 'states' (B, 2, *); this one has {sorted(batch)}")
        x = batch["x"]
        start = self.teacher.process.prior(
            x.shape, Context(ctx.cond, ctx.rng, dtype=x.dtype, device=x.device, batch=len(x))
        )
        if not wanted:
            return start, start
        t = torch.ones(len(x), dtype=torch.float64, device=x.device)
        return start, moved(self.teacher, solvers.get("ddim"), start, t, 0 * t, self.steps, ctx)  # type: ignore[arg-type]

    def _times(self, levels: Times, x: Tensor, ctx: Context) -> Tensor:
        """One drawn time an item."""
        return levels(self.teacher.process, streams(ctx))[0].to(x.device)


__all__ = ["TimeAware"]
