"""A small one-step flow: reflow that anneals from random to matched pairs, and distillation by the flow itself."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.core import Context, Denoiser, Frozen, InputError, Loss, Objective, linear
from sfumato.objectives.distill._common import distance, readable, streams
from sfumato.objectives.distill.segments import Segments
from sfumato.objectives.times import unit

SCHEDULES = ("linear", "exponential", "cosine", "constant")


def annealed(schedule: str, it: int, warmup: int, level: float = 0.0) -> float:
    """beta in iteration ``it``: 'linear' 1 - min(1, it / warmup), 'exponential' exp(-it / warmup), 'cosine', 'constant' level."""
    share = it / warmup
    match schedule:
        case "linear":
            return 1 - min(1.0, share)
        case "exponential":
            return math.exp(-share)
        case "cosine":
            return 0.5 * (1 + math.cos(math.pi * min(1.0, share)))
        case "constant":
            return level
    raise InputError(f"schedule = {schedule!r}: use one of {', '.join(SCHEDULES)}")


class AnnealingReflow(Segments):
    """Reflow on pairs whose noise becomes matched: noise' = sqrt(1 - beta^2) noise + beta xi, beta from 1 to 0 in ``warmup``.

    beta = 1 is flow matching from scratch (random pairs), beta = 0 is reflow, so a network of any size can begin. The student
    learns the native prediction of the pair (noise', sample) at uniform t.

    student   player 'student'
    schedule  'linear' | 'exponential' | 'cosine', or 'constant' with beta = ``level``
    warmup    iterations of the schedule

    A batch is {"states": (B, 2, *) start and sample, "cond"}. Source: Zhu, Liu, Liu, 2024, "SlimFlow: Training Smaller
    One-Step Diffusion Models with Rectified Flow".
    """

    def __init__(
        self, student: Denoiser, *, schedule: str = "linear", warmup: int = 1000, level: float = 0.0, **options: Any
    ) -> None:
        super().__init__(student, [1.0, 0.0], inside=1.0, read="native", **options)
        annealed(schedule, 0, warmup, level)
        if warmup < 1 or not 0 <= level <= 1:
            raise InputError(f"warmup = {warmup}, level = {level}: at least one iteration, and a share in [0, 1]")
        self.schedule, self.warmup, self.level = schedule, warmup, level

    def _ends(
        self, batch: Mapping[str, Any], segment: Tensor, start: Tensor, end: Tensor, ctx: Context
    ) -> tuple[Tensor, Tensor]:
        """The pair, its noise mixed with fresh noise as the schedule says."""
        x, y = super()._ends(batch, segment, start, end, ctx)
        process = self.student.process
        scale, fresh = process.coef(1.0).sigma, ctx.draw(process.space, x)
        spread = float(x.double().std()) / scale
        if len(x) * x[0].numel() >= 4096 and not 0.8 < spread < 1.25:
            raise InputError(f"the starts of these pairs have a std of {spread:.3g} times sigma(1): give matched noise")
        beta = annealed(self.schedule, ctx.run.step, self.warmup, self.level)
        return linear(math.sqrt(1 - beta**2), x, beta * scale, fresh), y


class FlowGuided(Objective):
    """min E d(x - v(x, 1), sample) + guided E d(x' - v(x', 1), two moves of the flow from x'), for flows of one step.

    The second term needs no pairs: from fresh noise x', the teacher (the small flow itself, from which the student began)
    moves to a drawn u and from there to 0.

    student    player 'student'; its x0 at t = 1 is the sample
    teacher    the student's own flow before, not the large one it learnt from
    between    (low, high) from which the time u of the middle is drawn
    first      who makes the first move: 'teacher', or 'student' (without gradients)
    guided     weight of the second term; 0: plain distillation of pairs
    metric     'l2' | 'l1' | 'huber', or features (B, *) -> (B, d) whose squared distance counts

    A batch is {"states": (B, 2, *), "cond"}. Source: Zhu, Liu, Liu, 2024, "SlimFlow".
    """

    def __init__(
        self,
        student: Denoiser,
        teacher: Denoiser,
        *,
        between: Sequence[float] = (0.2, 0.8),
        first: str = "teacher",
        guided: float = 1.0,
        metric: str | nn.Module = "l2",
        scale: float = 1e-3,
    ) -> None:
        super().__init__()
        low, high = between
        if not 0 < low < high < 1 or first not in ("teacher", "student") or guided < 0:
            raise InputError(
                f"between = {tuple(between)}, first = {first!r}, guided = {guided}: 0 < low < high < 1, 'teacher' or 'student', "
                "not negative"
            )
        readable(student, [1.0])
        self.student, self.teacher = student, Frozen(teacher)
        self.between, self.first, self.guided, self.scale = (low, high), first, guided, scale
        self.metric = Frozen(metric) if isinstance(metric, nn.Module) else metric

    def players(self) -> Mapping[str, nn.Module]:
        return {"student": self.student}

    def forward(self, batch: Mapping[str, Any], ctx: Context, player: str = "student") -> Loss:
        ctx, process = ctx.fork(cond=batch.get("cond", {})), self.student.process
        states = batch.get("states")
        if states is None or states.shape[1] != 2:
            raise InputError(
                f"FlowGuided reads batch['states'] (B, 2, *), noise and sample; the batch has {sorted(batch)}"
            )
        x, sample = states[:, 0], states[:, 1]
        one = torch.ones(len(x), dtype=torch.float64, device=x.device)
        pairs = self._distance(self.student(x, one, ctx.fork("pair")).mean, sample)
        if not self.guided:
            return Loss(pairs, {"pairs": pairs.detach()})
        fresh = linear(process.coef(1.0).sigma, ctx.draw(process.space, x))
        post = self.student(fresh, one, ctx.fork("fresh"))
        with torch.no_grad():
            low, high = self.between
            u = (low + (high - low) * unit(streams(ctx), stratified=True)).to(x.device)
            c = process.coef(u)
            mover = post if self.first == "student" else self.teacher(fresh, one, ctx.fork("teacher", look=True))
            aim = self.teacher(mover.at(c.alpha, c.sigma), u, ctx.fork("teacher", look=True)).mean
        guided = self._distance(post.mean, aim)
        return Loss(pairs + self.guided * guided, {"pairs": pairs.detach(), "guided": guided.detach()})

    def _distance(self, a: Tensor, b: Tensor) -> Tensor:
        """A scalar in pixels or in features."""
        if isinstance(self.metric, str):
            return distance(a, b, self.metric, self.scale).mean()
        with torch.no_grad():
            aim = self.metric(b)
        return (self.metric(a) - aim).square().flatten(1).mean()
