"""A network for vectors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.core.errors import InputError
from sfumato.networks.base import register
from sfumato.networks.conditions import Conditioning, check_conditions
from sfumato.networks.layers import zero


class ResidualLayer(nn.Module):
    """x + second(silu(first(norm(x)) (1 + scale) + shift)), scale and shift linear in the condition; x at the start."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.modulation = nn.LayerNorm(width), nn.Linear(width, 2 * width)
        self.first, self.second = nn.Linear(width, width), zero(nn.Linear(width, width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.modulation(condition).chunk(2, -1)
        return x + self.second(F.silu(torch.addcmul(shift, self.first(self.norm(x)), 1 + scale)))


@register("mlp")
class MLP(nn.Module):
    """Residual multilayer perceptron with a label and any number of vector conditions; output 0 at the start.

    forward(x (B, *, channels), label (B,), **cond) -> (B, *, out_channels), each of the middle positions treated
    alike. cond, each absent one being its null: `vector` (B, vector_channels); one (B,) int64 a name of `embeddings`;
    one (B,) float a name of `scalars`.

    octaves  sin and cos of 2^k x, k < octaves, are seen beside x: laws with details far below their extent (Tancik et
             al., 2020, "Fourier Features Let Networks Learn High Frequency Functions in Low Dimensional Domains")
    """

    def __init__(
        self,
        channels: int,
        out_channels: int | None = None,
        width: int = 128,
        depth: int = 3,
        vector_channels: int | None = None,
        embeddings: Mapping[str, int] | None = None,
        scalars: Mapping[str, float] | None = None,
        scale: float = 1000.0,
        octaves: int = 0,
    ) -> None:
        super().__init__()
        if octaves < 0:
            raise InputError(f"octaves = {octaves}: 0 or more")
        self.channels, self.octaves = channels, octaves
        self.conditioning = Conditioning(width, scale, embeddings, scalars, vector_channels)
        self.accepts = self.conditioning.names
        self.input = nn.Linear(channels * (1 + 2 * octaves), width)
        self.blocks = nn.ModuleList(ResidualLayer(width) for _ in range(depth))
        self.norm, self.output = nn.LayerNorm(width), zero(nn.Linear(width, out_channels or channels))

    def forward(self, x: Tensor, label: Tensor, **cond: Tensor | None) -> Tensor:
        check_conditions(cond, self.accepts)
        if x.ndim < 2 or x.shape[-1] != self.channels:
            raise InputError(f"x is {tuple(x.shape)}; it must be (batch, ..., {self.channels})")
        condition = F.silu(self.conditioning(label, x.shape[0], cond))
        condition = condition.reshape(x.shape[0], *[1] * (x.ndim - 2), -1)
        hidden = self.input(self._waves(x) if self.octaves else x)
        for block in self.blocks:
            hidden = block(hidden, condition)
        return self.output(F.silu(self.norm(hidden)))

    def _waves(self, x: Tensor) -> Tensor:
        angle = x[..., None] * 2.0 ** torch.arange(self.octaves, dtype=x.dtype, device=x.device)
        return torch.cat([x, angle.sin().flatten(-2), angle.cos().flatten(-2)], -1)
