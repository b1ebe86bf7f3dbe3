"""Directions that many samples have in common: principal components, differences of class means, projections."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sfumato.core import InputError, Streams
from sfumato.editing.directions.base import Direction, Latents


def principal(latents: Latents, k: int = 3, joint: bool = False) -> list[Direction]:
    """The k principal components of h, scaled: scale 1 moves by one standard deviation along the component.

    joint  False: a decomposition a time, H_t - mean = U S V^T, v_t^(j) = s_j / sqrt(N - 1) times row j of V^T, with signs
           that agree from one time to the next, <u_t, u_(t+1)> >= 0 (falling t)
           True: one decomposition of all times side by side; order and signs agree by construction

    Vectors of one time (of all times together, if joint) are orthogonal. Source: Haas, Huberman-Spiegelglas, Mulayoff,
    Graßhof, Brandt, Michaeli, 2024, "Discovering Interpretable Directions in the Semantic Latent Space of Diffusion
    Models" (there scaled by s_j, which grows with the number of samples).
    """
    h = latents.h.flatten(2).double()
    times, n, size = h.shape
    if not 1 <= k < n:
        raise InputError(f"k = {k} components of {n} samples: at least 1 and fewer than there are samples")
    h = h - h.mean(1, keepdim=True)
    if joint:
        h = h.transpose(0, 1).reshape(1, n, -1)
    _, s, vh = torch.linalg.svd(h, full_matrices=False)
    vectors = vh[:, :k] * (s[:, :k, None] / math.sqrt(n - 1))
    if joint:
        vectors = vectors[0].reshape(k, times, size).transpose(0, 1)
    for i in range(1, times):
        agree = (vectors[i] * vectors[i - 1]).sum(-1, keepdim=True) < 0
        vectors[i] = torch.where(agree & (not joint), -vectors[i], vectors[i])
    shaped = vectors.to(latents.h.dtype).unflatten(2, latents.h.shape[2:])
    return [_direction(latents, shaped[:, j]) for j in range(k)]


def mean_difference(latents: Latents, labels: Tensor, strata: Tensor | None = None) -> Direction:
    """v_t = mean(h_t | label) - mean(h_t | not): labels bool (N,).

    strata  (N,) whole numbers of a confounder: the difference is taken within each stratum that has both labels and
            averaged over them, so what differs between strata cancels

    Raises InputError where no stratum has both. Source: as :func:`principal`.
    """
    labels = labels.to(torch.bool)
    groups = torch.zeros(len(labels), dtype=torch.long) if strata is None else strata
    if not len(labels) == len(groups) == latents.h.shape[1]:
        raise InputError(f"{len(labels)} labels, {len(groups)} strata for {latents.h.shape[1]} items: one each")
    found = []
    for group in groups.unique().tolist():
        inside = groups == group
        yes, no = inside & labels, inside & ~labels
        if bool(yes.any()) and bool(no.any()):
            found.append(latents.h[:, yes].mean(1) - latents.h[:, no].mean(1))
    if not found:
        raise InputError("no stratum has items with the label and items without it: there is no difference to take")
    return _direction(latents, torch.stack(found).mean(0))


def project_out(direction: Direction, others: Sequence[Direction]) -> Direction:
    """v - C (C^T C)^-1 C^T v at each time: what is left of v is orthogonal to every other direction.

    Linearly dependent others are one. Source: as :func:`principal`.
    """
    out = []
    for t, v in zip(direction.times, direction.vectors, strict=True):
        flat = v.flatten().double()
        confounders = torch.stack([other.at(t).flatten().double() for other in others], 1)
        if confounders.shape[0] != len(flat):
            raise InputError(f"directions of {confounders.shape[0]} and {len(flat)} numbers lie in different spaces")
        shadow = confounders @ torch.linalg.lstsq(confounders, flat, driver="gelsd").solution
        out.append((flat - shadow).to(v).view_as(v))
    return replace(direction, vectors=torch.stack(out))


def random_like(direction: Direction, seed: int) -> Direction:
    """One random direction, the same at all times, with the norms that ``direction`` has: the control of every claim."""
    noise = Streams.of(seed, 1).normal(direction.vectors[:1])
    lengths = direction.norms.view(-1, *[1] * (direction.vectors.ndim - 1))
    return replace(direction, vectors=noise / noise.norm() * lengths)


def _direction(latents: Latents, vectors: Any) -> Direction:
    """The vectors as a direction at the times and the place of the latents."""
    return Direction(vectors.contiguous(), latents.times, latents.path or None)


__all__ = ["mean_difference", "principal", "project_out", "random_like"]
