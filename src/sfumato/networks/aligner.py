"""A small network that reads the features of another: what a noisy picture will look like, from how it is seen."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.core.errors import InputError
from sfumato.networks.base import configured
from sfumato.networks.conditions import sinusoidal
from sfumato.networks.layers import group_norm

PERIOD = 10.0  # of the slowest sinusoid of 1000 t, as published: most of the others turn many times over the process
NORMS = ("group", "batch")


class AlignerLayer(nn.Module):
    """norm(relu(conv(x))) + linear(silu(condition))."""

    def __init__(self, channels: int, out: int, kernel: int, condition: int, norm: str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out, kernel, padding=kernel // 2)
        self.norm = nn.BatchNorm2d(out) if norm == "batch" else group_norm(out)
        self.condition = nn.Linear(condition, out)
        nn.init.xavier_normal_(self.conv.weight)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return self.norm(F.relu(self.conv(x))) + self.condition(F.silu(condition))[:, :, None, None]


@configured
class ConditionAligner(nn.Module):
    """Features of several layers and the time -> a spatial condition (edges, mask, stroke) of the clean picture.

    forward(features, label (B,)) -> (B, out_channels, factor h, factor w). Features are maps (B, C_i, h_i, w_i) or square
    tokens (B, N, C_i), brought to h x w = ``size`` and put side by side: 1 x 1 convolutions halve the channels twice,
    3 x 3 ones of ``widths`` follow, and what is finer than the features is unfolded from channels.

    channels  (C_1, C_2, ...)
    narrow    channels after the two 1 x 1 convolutions; default: a half and a quarter of all that come in
    norm      'group', or 'batch' as published: then items of a training batch see each other
    scale     of the label: 1000 suits t in [0, 1]

    Source: Liu, Li, Zhang, Luo, Liu, 2024, "LaCon: Late-Constraint Diffusion for Steerable Guided Image Synthesis" (widths 512,
    256, 128, 64; 7,040 channels of Stable Diffusion).
    """

    def __init__(
        self,
        channels: Sequence[int],
        out_channels: int = 1,
        size: Sequence[int] = (64, 64),
        factor: int = 1,
        widths: Sequence[int] = (512, 256, 128, 64),
        norm: str = "group",
        scale: float = 1000.0,
        narrow: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if norm not in NORMS:
            raise InputError(f"norm = {norm!r}: one of {', '.join(NORMS)}")
        total = sum(channels)
        self.channels, self.size, self.factor, self.scale = tuple(channels), tuple(size), factor, scale
        first, second = narrow or (max(1, total // 2), max(1, total // 4))
        steps = [(total, first, 1), (first, second, 1)]
        for width in widths:
            steps.append((steps[-1][1], width, 3))
        self.layers = nn.ModuleList(AlignerLayer(a, b, kernel, 256, norm) for a, b, kernel in steps)
        self.output = nn.Conv2d(steps[-1][1], out_channels * factor**2, 1)

    def forward(self, features: Sequence[Tensor], label: Tensor) -> Tensor:
        maps = [square(h) for h in features]
        given = tuple(m.shape[1] for m in maps)
        if given != self.channels:
            raise InputError(f"features of {given} channels for an aligner of {self.channels}: tap the same layers")
        condition = sinusoidal(label.to(self.output.weight.dtype) * self.scale, 256, PERIOD)
        size = list(self.size)
        x = torch.cat([F.interpolate(m, size=size, mode="bilinear", antialias=False) for m in maps], 1)
        for layer in self.layers:
            x = layer(x, condition)
        return F.pixel_shuffle(self.output(x), self.factor)


def square(h: Tensor) -> Tensor:
    """A map (B, C, h, w) as it is, tokens (B, N, C) of a square picture as a map."""
    if h.ndim == 4:
        return h
    side = math.isqrt(h.shape[1]) if h.ndim == 3 else 0
    if h.ndim != 3 or side * side != h.shape[1]:
        raise InputError(
            f"features of shape {tuple(h.shape)}: maps (B, C, h, w), or tokens (B, N, C) of a square picture"
        )
    return h.transpose(1, 2).unflatten(2, (side, side))


__all__ = ["ConditionAligner", "square"]
