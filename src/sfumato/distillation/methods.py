"""The methods of distillation by slug: which objective, what it learns from, how the student samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sfumato import grids
from sfumato.core import InputError, Objective
from sfumato.distillation import players
from sfumato.distillation.job import Job, answering, rewrapped
from sfumato.networks.scalars import with_scalars
from sfumato.objectives.distill import AnnealingReflow, Bootstrap, Consistency, DistributionMatching, Segments

LCM_RANGE = 2.0  # lcm draws its guidance from the pipeline's scale up and down by this factor


def _noisiest(process: Any) -> float:
    """The latest of 1000 times at which alpha is at least 0.01, so that states of a sub-path can be scaled to each other."""
    return next(k / 1000 for k in range(1000, 0, -1) if process.coef(k / 1000).alpha >= 0.01)


@dataclass(frozen=True)
class Method:
    """How a slug becomes an objective.

    make     the objective of a job; ``player`` of it is the student
    reads    what it learns from, see :meth:`Job.reading`
    solver   the student's
    rank     of its adapters; 0: all weights. ``whole`` methods change the network and have none
    once     its students sample in one call
    guided   the pipeline's guidance is put into the student; without, it learns what pictures are like
    """

    make: Callable[[Job], Objective]
    reads: str
    solver: str = "ddim"
    rank: int = 0
    player: str = "student"
    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.99)
    once: bool = False
    whole: bool = False
    guided: bool = True


def _segments(job: Job) -> Objective:
    """The teacher's stored moves between the student's times."""
    return Segments(job.student, job.times, read="native")


def _rectified(job: Job) -> Objective:
    """The same first-order move from every state within a segment."""
    return Segments(job.student, job.times, inside=1.0, metric="huber")


def _reflow(job: Job) -> Objective:
    """Flow matching on the teacher's pairs."""
    if job.pipeline.denoiser.predicts != "flow":
        raise InputError("reflow is for models that predict 'flow': 'rectified-diffusion' is the same for any other")
    return Segments(job.student, [1.0, 0.0], inside=1.0, read="native")


def _slimflow(job: Job) -> Objective:
    """The first part; the second, for one step, begins with what it made."""
    return AnnealingReflow(job.small(), warmup=max(1, job.settings.iterations // 2))


def _dense(job: Job) -> list[float]:
    """The times of consistency: four times as many as the teacher's."""
    times: list[float] = grids.get("arc")(
        job.pipeline.process, 4 * job.settings.teacher_calls, job.times[0], 0.0
    ).tolist()
    return times


def _consistency(job: Job) -> Objective:
    """Sub-paths of two of those, in two steps of the guided teacher."""
    return Consistency(job.student, _dense(job), job.teacher, skip=2, substeps=2)


def _training(job: Job) -> Objective:
    """The same sub-paths between data with the same noise."""
    return Consistency(job.student, _dense(job), skip=2)


def _lcm(job: Job) -> Objective:
    """Latent consistency on 50 times, the scale of guidance drawn from a range."""
    times = grids.get("uniform")(job.pipeline.process, 50, job.times[0], 0.0).tolist()
    span = (max(job.scale / LCM_RANGE, 1.0), job.scale * LCM_RANGE) if job.scale != 1 else None
    return Consistency(job.student, times, job.pipeline.denoiser, guidance=span, boundary="lcm")


def _slam(job: Job) -> Objective:
    """Sub-paths of a tenth of the time, along which a student told gamma says the same."""
    student = rewrapped(job.student, with_scalars(job.student.net, {"gamma": 1.0}))
    high = _noisiest(job.pipeline.process)
    times = grids.get("uniform")(job.pipeline.process, 50, high, 0.0).tolist()
    return Consistency(student, times, job.teacher, skip=5, substeps=2, gamma="uniform")


def _matching(job: Job) -> Objective:
    """A critic that begins as the teacher; pairs beside it where the student has one step."""
    times, critic = [*job.times[:-1], 0.0], job.copied().train()
    return DistributionMatching(
        job.student, job.teacher, critic, times, pairs=1.0 if len(times) == 2 else 0.0, shape=job.shape
    )


def _boot(job: Job) -> Objective:
    """The teacher's trajectory from noise, in the signal."""
    return Bootstrap(answering(job.student), job.teacher, job.shape)


METHODS: dict[str, Method] = {
    "segments": Method(_segments, "states"),
    "progressive": Method(_segments, "x"),
    "rectified-diffusion": Method(_rectified, "states"),
    "reflow": Method(_reflow, "pairs"),
    "slimflow": Method(_slimflow, "pairs", lr=1e-3, whole=True),
    "consistency": Method(_consistency, "x", "consistency"),
    "consistency-training": Method(_training, "x", "consistency"),
    "lcm-lora": Method(_lcm, "x", "lcm", rank=8),
    "slam": Method(_slam, "x", "consistency", whole=True),
    "distribution-matching": Method(_matching, "pairs"),
    "boot": Method(_boot, "conditions", once=True),
    "mmd-ddm": Method(players.moments, "data", player="denoiser", lr=2e-5, guided=False),
    "ddgan": Method(
        players.adversarial, "data", "ddpm", player="generator", lr=1.5e-4, betas=(0.5, 0.9), whole=True, guided=False
    ),
    "tad-sr": Method(players.restoring, "restored", once=True),
}
