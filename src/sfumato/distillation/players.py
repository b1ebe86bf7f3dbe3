"""Objectives that need pictures, and a critic or features of their own beside the student."""

from __future__ import annotations

import copy
from typing import Any

import torch

from sfumato import grids
from sfumato.core import Context, InputError, Objective
from sfumato.denoisers import features
from sfumato.distillation.activations import places, seen
from sfumato.distillation.job import Job, answering, rewrapped
from sfumato.networks import FeatureCritic, PairCritic, build, with_latent
from sfumato.objectives.distill import DenoisingGAN, SamplerMMD, TimeAware
from sfumato.processes import Affine

KNOWN = 512  # pictures by which features are standardised


def moments(job: Job) -> Objective:
    """mmd-ddm: the student's own few steps, until the moments of their features are those of the pictures."""
    pictures = job.pictures
    data = pictures.batch(
        [i * len(pictures) // KNOWN for i in range(KNOWN)] if len(pictures) > KNOWN else range(len(pictures))
    )
    eyes = seen(job.pipeline, job.settings.features, data["x"], dict(job.raw))
    return SamplerMMD(job.student, eyes, solver="ddim", grid=grids.fixed(job.times), steps=job.settings.steps)


def adversarial(job: Job) -> Objective:
    """ddgan: a generator that is told a latent beside the teacher's weights, against a critic of pairs that begins with them too."""
    teacher: Any = job.pipeline.denoiser
    if hasattr(teacher.net, "model"):
        raise InputError(
            "ddgan gives the network a latent that is drawn anew in every step, and a pipeline of diffusers has no place where it is "
            "drawn: distil a model of this library, or use another method"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.settings.seed)
        start = answering(job.student)
        generator = rewrapped(start, with_latent(start.net, job.settings.latent)).requires_grad_()
        critic = PairCritic(pair_network(teacher.net, job.shape[0]))
    return DenoisingGAN(generator, critic, job.times, r1=job.settings.r1)


def pair_network(net: Any, channels: int) -> Any:
    """A network of one output that sees pairs of states, with the weights of ``net`` wherever they fit."""
    config = {**net.config, "channels": 2 * channels, "out_channels": 1}
    made = build(net.network_name, config)
    own = made.state_dict()
    fits = {k: v for k, v in net.state_dict().items() if k in own and own[k].shape == v.shape}
    made.load_state_dict({**own, **fits})
    weight = next(net.parameters())
    return made.to(weight.device, weight.dtype).requires_grad_().train()


def restoring(job: Job) -> Objective:
    """tad-sr: one call of a restoration model ends where its teacher's run does, with the same fine detail, like real pictures."""
    s, process = job.settings, job.pipeline.process
    if not isinstance(process, Affine):
        raise InputError(
            f"tad-sr is for restoration: its teacher's process leads to the degraded picture, as ResidualShift does; "
            f"{type(process).__name__} leads to noise alone. For this model use 'segments', 'boot' or another method"
        )
    student = answering(job.student)
    if not s.adversarial:
        return TimeAware(student, job.teacher, steps=0, detail=s.detail)
    paths = places(job.pipeline.denoiser)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(s.seed)
        critic = FeatureCritic(widths(job, paths))
    return TimeAware(student, job.teacher, critic, paths=paths, steps=0, detail=s.detail, adversarial=s.adversarial)


@torch.no_grad()
def widths(job: Job, paths: list[str]) -> list[int]:
    """Channels of the teacher's feature maps, seen on one picture."""
    one = job.pictures.batch([0])
    teacher: Any = copy.copy(job.pipeline.denoiser)
    _, maps = features.features(teacher, one["x"], 0.5, Context.of(1, None, cond=one["cond"]), paths)
    return [features.as_maps(maps[path], one["x"]).shape[1] for path in paths]


__all__ = ["adversarial", "moments", "pair_network", "restoring", "widths"]
