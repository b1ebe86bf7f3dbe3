"""Digits led to their degraded versions: the exact belief about them, and a small network taught to restore them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.core import Context, Streams, linear, mix
from sfumato.denoisers import parametrized
from sfumato.denoisers.mixtures import Mixture
from sfumato.evaluation.metrics import frechet_distance
from sfumato.evaluation.metrics.images import psnr_each
from sfumato.networks import MLP
from sfumato.objectives import Denoising
from sfumato.processes import MeanReverting
from sfumato.recipes._digits import Bed, law
from sfumato.recipes._small import digits, learn, pictures

LAW, FIRST, NOISE = MeanReverting(std=100 / 255), 0.01, 0.1  # pixels are in [-1, 1]: 50 grey levels, twice


def degraded(task: str, x: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """(A, y, mu): y = A x + 0.1 N(0, I) misses the middle four columns or averages 2 x 2, and mu is y as a picture."""
    shown = torch.ones(8, 8, dtype=torch.bool)
    shown[:, 2:6] = False
    eye = torch.eye(64, dtype=torch.float64)
    a = eye[shown.flatten()] if task == "inpainting" else F.avg_pool2d(eye.reshape(64, 1, 8, 8), 2).flatten(1).T
    y = x.double() @ a.T
    y = y + NOISE * Streams.of(mix(seed, 7), len(y)).normal(y)
    if task == "inpainting":
        return a, y, torch.full_like(x.double(), -1.0).masked_scatter(shown.flatten().expand(len(x), 64), y)
    return a, y, F.interpolate(y.reshape(-1, 1, 4, 4), scale_factor=2).flatten(1)


def restoring(task: str, seed: int, n: int = 256) -> tuple[Bed, Tensor, Mixture]:
    """The exact belief about n digits given their degraded versions, started at mu + noise."""
    x = law().sample(n, seed=mix(seed, 1) % 2**32)
    a, y, mu = degraded(task, x, seed)
    known = law().given(a, y, NOISE)
    start = mu + LAW.coef(1.0).sigma * Streams.of(mix(seed, 2), n).normal(mu)
    return Bed(known.denoiser(LAW), start, {"anchor": mu}, fine=200, stop=FIRST), x, known


def euler(bed: Bed, steps: int) -> float:
    """The median error of the published baseline: Euler's method on dx/dt = theta (mu - x) - theta std^2 score, uniform t."""
    ctx, x = Context.of(len(bed.x), None, cond=bed.cond), bed.x
    times = torch.linspace(1.0, FIRST, steps + 1, dtype=torch.float64).tolist()
    for t, s in zip(times, times[1:], strict=False):
        flow = bed.denoiser(linear(1.0, x, -1.0, LAW.anchor(t, bed.cond)), t, ctx).view("flow")
        x = linear(1.0, x, s - t, flow, s - t, LAW.anchor(t, bed.cond, derivative=True))
    return float((x - bed.end).square().mean(1).sqrt().median())


def trained(seed: int) -> tuple[Bed, Tensor]:
    """A small network that restores the hidden columns, taught here on two thirds of the digits; a bed of the others."""
    x, _, unseen = digits()
    mu = degraded("inpainting", x, seed)[2].float()
    torch.manual_seed(mix(seed, 3) % 2**32)
    denoiser = parametrized(MLP(64, width=192, vector_channels=64), LAW, "v")
    fields = {"x": x[~unseen], "vector": mu[~unseen], "anchor": mu[~unseen]}
    taught = learn(Denoising(denoiser, dropout=0.0), fields, seed, steps=1000, cond=("vector", "anchor"))
    mu = mu[unseen]
    start = mu + LAW.coef(1.0).sigma * Streams.of(mix(seed, 4), len(mu)).normal(mu)
    return Bed(taught, start, {"vector": mu, "anchor": mu}, fine=100, stop=FIRST, batch=1000), x[unseen]


def judged(ends: Tensor, truth: Tensor, features: Any) -> tuple[float, float]:
    """(mean PSNR in decibels, Fréchet distance to the unseen digits)."""
    ends = ends.clamp(-1, 1).reshape(-1, 1, 8, 8)
    return float(psnr_each(ends, truth.reshape(-1, 1, 8, 8), data_range=2.0).mean()), frechet_distance(
        features(pictures(ends)), features(pictures(truth))
    ).value
