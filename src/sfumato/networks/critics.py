"""Critics of adversarial objectives: of pairs of neighbouring states, and on the features of a frozen network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.core.errors import InputError
from sfumato.networks.base import as_network, register
from sfumato.networks.conditions import LabelEmbedding
from sfumato.networks.layers import group_norm, zero


@register("pair-critic")
class PairCritic(nn.Module):
    """Is the cleaner state of a pair a real predecessor of the noisier one? Logits (B,), large for real.

    forward(low (B, C, *), high (B, C, *), label (B,), **cond): `net` sees both along the channels, and the mean of its
    output is the logit. The conditions are those of `net`, named in `accepts`.

    net  a network of 2 C channels, or {"name": ..., "config": ...} of one

    Source: Xiao, Kreis, Vahdat, 2022, "Tackling the Generative Learning Trilemma with Denoising Diffusion GANs".
    """

    def __init__(self, net: nn.Module | Mapping[str, Any]) -> None:
        super().__init__()
        self.net = as_network(net)
        self.accepts: frozenset[str] = frozenset(getattr(self.net, "accepts", ()))

    def forward(self, low: Tensor, high: Tensor, label: Tensor, **cond: Any) -> Tensor:
        if low.shape != high.shape:
            raise InputError(f"the states of a pair are {tuple(low.shape)} and {tuple(high.shape)}: they must be alike")
        return self.net(torch.cat([low, high], 1), label, **cond).flatten(1).mean(1)  # type: ignore[no-any-return]


class Head(nn.Module):
    """Logits of one feature map: 1x1 convolution, normalisation scaled and shifted by the time, 3x3 convolution; 0 at the start."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(channels, width, 1), group_norm(width)
        self.modulation, self.output = nn.Linear(width, 2 * width), zero(nn.Conv2d(width, 1, 3, padding=1))

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.modulation(embedding)[:, :, None, None].chunk(2, 1)
        hidden = torch.addcmul(shift, self.norm(self.first(h)), 1 + scale)
        return self.output(F.leaky_relu(hidden, 0.2))


@register("feature-critic")
class FeatureCritic(nn.Module):
    """One logit an item from feature maps of another network, told the noise level: a small head a map, their mean.

    forward(maps: one (B, C_k, H_k, W_k) a head, label (B,)) -> (B,), 0 at the start. Without a label (``aware=False``)
    the same at every level.

    channels  C_k of each map

    Source: He et al., 2024, "One Step Diffusion-based Super-Resolution with Time-Aware Distillation".
    """

    def __init__(self, channels: Sequence[int], width: int = 32, scale: float = 1000.0, aware: bool = True) -> None:
        super().__init__()
        if not channels:
            raise InputError("a critic of features needs one map at least: channels = [...]")
        self.heads = nn.ModuleList(Head(c, width) for c in channels)
        self.time, self.aware = LabelEmbedding(width, scale), aware

    def forward(self, maps: Sequence[Tensor], label: Tensor) -> Tensor:
        if len(maps) != len(self.heads):
            raise InputError(f"{len(maps)} feature maps for {len(self.heads)} heads")
        embedding = F.silu(self.time(label if self.aware else torch.zeros_like(label)))
        each = [head(h, embedding).flatten(1).mean(1) for head, h in zip(self.heads, maps, strict=True)]
        return torch.stack(each).mean(0)


__all__ = ["FeatureCritic", "PairCritic"]
