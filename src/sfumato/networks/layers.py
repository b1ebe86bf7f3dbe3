"""Parts that several networks are made of: normalisation, attention, residual blocks."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.core.errors import InputError
from sfumato.networks.products import Linear

if TYPE_CHECKING:
    from sfumato.networks.conditions import Tokens

Module = TypeVar("Module", bound=nn.Module)


def zero(module: Module) -> Module:
    """The module with all its parameters set to 0: a residual branch that ends in it starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm with at most 32 groups of at least 4 channels (Wu and He 2018)."""
    groups = math.gcd(channels, 32)
    while groups > 1 and channels // groups < 4:
        groups //= 2
    return nn.GroupNorm(groups, channels, eps=1e-5)


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary position embedding of x (B, heads, N, d) by [cos, cos] and [-sin, sin] (N, d) (Su et al. 2021)."""
    first, second = x.chunk(2, -1)
    return torch.addcmul(x * rotary[0], torch.cat([second, first], -1), rotary[1])


class KeysValues(nn.Module):
    """The keys and values (B, heads, L, d) that queries are about to read, as they are: a place to keep or replace them."""

    def forward(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return keys, values


class Attention(nn.Module):
    """softmax(q k^T / sqrt(d) + mask) v over tokens (B, N, width); q and k are layer-normalised (Dehghani et al. 2023).

    context  channels of the tokens that give keys and values; None is self-attention
    explicit computes the same with the probabilities (B, heads, N, L) passed through the submodule `probabilities`,
    where they can
             be read or replaced. An attribute of the instance, or an argument of one call, so that threads can share
             the network. The fused kernels have no forward-mode and no second derivatives: be explicit for those, or
             use torch.nn.attention.sdpa_kernel(SDPBackend.MATH).

    Keys (normalised, rotated) and values pass through the submodule `keys_values`. `rotary` is (N, d) or (B, 1, N, d);
    `key_rotary` is that of the keys where they stand elsewhere than the queries.
    """

    def __init__(self, width: int, heads: int, context: int | None = None) -> None:
        super().__init__()
        if width % heads:
            raise InputError(f"{heads} heads do not divide {width} channels")
        self.heads, self.explicit = heads, False
        self.query, self.key = Linear(width, width), Linear(context or width, width)
        self.value, self.out = Linear(context or width, width), Linear(width, width)
        self.query_norm = nn.LayerNorm(width // heads, eps=1e-6, bias=False)
        self.key_norm = nn.LayerNorm(width // heads, eps=1e-6, bias=False)
        self.keys_values, self.probabilities = KeysValues(), nn.Identity()

    def forward(
        self,
        x: Tensor,
        context: Tokens | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
        explicit: bool | None = None,
        key_rotary: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        source, mask = (x, None) if context is None else context
        q = self.query_norm(self.query(x).unflatten(-1, (self.heads, -1))).transpose(1, 2)
        k = self.key_norm(self.key(source).unflatten(-1, (self.heads, -1))).transpose(1, 2)
        v = self.value(source).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary if key_rotary is None else key_rotary)
        k, v = self.keys_values(k, v)
        if self.explicit if explicit is None else explicit:
            scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
            scores = scores if mask is None else scores.masked_fill(~mask, -math.inf)
            mixed = self.probabilities(scores.softmax(-1)) @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(mixed.transpose(1, 2).flatten(2))


class ImageAttention(nn.Module):
    """Self-attention, then cross-attention if there is a context, on maps (B, C, H, W): residual branches, 0 at the
    start.
    """

    def __init__(self, channels: int, heads: int, context: int | None = None) -> None:
        super().__init__()
        self.norm, self.attention = group_norm(channels), Attention(channels, heads)
        zero(self.attention.out)
        self.cross_norm = nn.LayerNorm(channels) if context else None
        self.cross = Attention(channels, heads, context) if context else None
        if self.cross is not None:
            zero(self.cross.out)

    def forward(self, x: Tensor, context: Tokens | None = None) -> Tensor:
        height, width = x.shape[-2:]
        tokens = x.permute(0, 2, 3, 1).flatten(1, 2)
        tokens = tokens + self.attention(self.norm(x).permute(0, 2, 3, 1).flatten(1, 2))
        if self.cross is not None and self.cross_norm is not None and context is not None:
            tokens = tokens + self.cross(self.cross_norm(tokens), context)
        return tokens.unflatten(1, (height, width)).permute(0, 3, 1, 2)


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))) (1 + scale) + shift)), the last convolution 0 at the start.

    scale and shift are linear in the condition (B, embedding): adaptive group normalisation (Dhariwal and Nichol
    2021); embedding None: there is no condition.
    """

    def __init__(
        self, channels: int, out: int | None = None, embedding: int | None = None, dropout: float = 0.0
    ) -> None:
        super().__init__()
        out = out or channels
        self.first_norm, self.first = group_norm(channels), nn.Conv2d(channels, out, 3, padding=1)
        self.modulation = nn.Linear(embedding, 2 * out) if embedding else None
        self.second_norm, self.dropout = group_norm(out), nn.Dropout(dropout)
        self.second = zero(nn.Conv2d(out, out, 3, padding=1))
        self.shortcut = nn.Conv2d(channels, out, 1) if channels != out else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        hidden = self.second_norm(self.first(F.silu(self.first_norm(x))))
        if self.modulation is not None and embedding is not None:
            scale, shift = self.modulation(embedding)[:, :, None, None].chunk(2, 1)
            hidden = torch.addcmul(shift, hidden, 1 + scale)
        return self.shortcut(x) + self.second(self.dropout(F.silu(hidden)))
