"""A diffusion transformer for images and latents of any size."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.core.errors import InputError
from sfumato.networks.base import register
from sfumato.networks.conditions import (
    Conditioning,
    TokenContext,
    Tokens,
    check_conditions,
    check_image,
    sinusoidal,
    with_image,
)
from sfumato.networks.layers import Attention, zero
from sfumato.networks.products import Linear

Rotary: TypeAlias = tuple[Tensor, Tensor]


def rotary_positions(height: int, width: int, head: int, like: Tensor) -> Rotary:
    """[cos, cos] and [-sin, sin] (height * width, head): half of the pairs turn with the row, half with the column."""
    rows, columns = (torch.arange(side, device=like.device) for side in (height, width))
    return rotary_at(rows, columns, head, like)


def rotary_at(rows: Tensor, columns: Tensor, head: int, like: Tensor) -> Rotary:
    """`rotary_positions` of a grid whose rows and columns stand anywhere: (R,), (C,) -> (R * C, head) each."""
    frequency = torch.exp(torch.arange(head // 4, device=like.device) * (-math.log(100.0) / (head // 4)))
    across = (len(rows), len(columns), -1)
    angle = torch.cat(
        [(rows[:, None] * frequency)[:, None].expand(across), (columns[:, None] * frequency)[None].expand(across)], -1
    ).flatten(0, 1)
    cos, sin = angle.cos().to(like.dtype), angle.sin().to(like.dtype)
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def absolute_positions(height: int, width: int, channels: int, size: int, like: Tensor) -> Tensor:
    """Sinusoids (height * width, channels) of row and column on a grid of side `size`: any H, W covers the same
    range.
    """
    rows = sinusoidal((torch.arange(height, device=like.device) + 0.5) * (size / height), channels // 2, 1000.0)
    columns = sinusoidal((torch.arange(width, device=like.device) + 0.5) * (size / width), channels // 2, 1000.0)
    grid = [rows[:, None].expand(-1, width, -1), columns[None].expand(height, -1, -1)]
    return torch.cat(grid, -1).flatten(0, 1).to(like.dtype)


class SwiGLU(nn.Module):
    """out(silu(gate(x)) * up(x)) (Shazeer 2020); the hidden width is 2/3 ratio width, the cost of a plain MLP of that
    ratio.
    """

    def __init__(self, width: int, ratio: float) -> None:
        super().__init__()
        hidden = max(8, round(width * ratio * 2 / 3 / 8) * 8)
        self.gate, self.up, self.out = Linear(width, hidden), Linear(width, hidden), Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.silu(self.gate(x)) * self.up(x))


class Modulation(nn.Module):
    """The condition (B, width) -> shift, scale, gate (B, 1, width) of attention and of the MLP; all 0 at the start.

    shared  only a table of this block is added to one projection that all blocks share (adaLN-single, Chen et al.
            2023, PixArt-alpha)
    """

    def __init__(self, width: int, shared: bool) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(6 * width)) if shared else None
        self.project = None if shared else zero(nn.Linear(width, 6 * width))

    def forward(self, condition: Tensor) -> tuple[Tensor, ...]:
        values = condition if self.project is None else self.project(condition)
        values = values if self.table is None else values + self.table
        return values[:, None].chunk(6, -1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Layer normalisation without parameters, then x (1 + scale) + shift."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale)


class Block(nn.Module):
    """x + gate attention(x); x + cross(x, text); x + gate mlp(x): the identity at the start (adaLN-zero)."""

    def __init__(self, width: int, heads: int, ratio: float, context: int | None, shared: bool) -> None:
        super().__init__()
        self.modulation = Modulation(width, shared)
        self.attention, self.mlp = Attention(width, heads), SwiGLU(width, ratio)
        self.cross_norm = nn.LayerNorm(width) if context else None
        self.cross = Attention(width, heads, context) if context else None
        if self.cross is not None:
            zero(self.cross.out)

    def forward(
        self,
        x: Tensor,
        condition: Tensor,
        context: Tokens | None,
        rotary: Rotary,
        source: Tensor | None = None,
        source_rotary: Rotary | None = None,
    ) -> Tensor:
        """source: tokens (B, L, width) that give keys and values in the place of x, modulated like it; their positions."""
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.modulation(condition)
        other = (
            {}
            if source is None
            else {"context": Tokens(modulate(source, shift, scale), None), "key_rotary": source_rotary}
        )
        x = torch.addcmul(x, gate, self.attention(modulate(x, shift, scale), rotary=rotary, **other))
        if self.cross is not None and self.cross_norm is not None:
            x = x + self.cross(self.cross_norm(x), context)
        return torch.addcmul(x, mlp_gate, self.mlp(modulate(x, mlp_shift, mlp_scale)))


class Final(nn.Module):
    """Modulated normalisation and the linear map to a patch; 0 at the start."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.modulation, self.project = zero(nn.Linear(width, 2 * width)), zero(nn.Linear(width, out))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.modulation(condition)[:, None].chunk(2, -1)
        return self.project(modulate(x, shift, scale))


def flat(index: Tensor, n: int) -> Tensor:
    """Indices (B, K) into n rows of each item as indices into the B n rows of all."""
    return (index + torch.arange(len(index), device=index.device)[:, None] * n).flatten()


def pick(values: Tensor, index: Tensor) -> Tensor:
    """Rows `index` (B, K) of values (B, N, C): (B, K, C)."""
    rows, n, width = values.shape
    return values.reshape(rows * n, width).index_select(0, flat(index, n)).view(rows, -1, width)


class Embedded(NamedTuple):
    """A DiT's input as its blocks read it: tokens (B, N, width) and what goes with them.

    grid       rows and columns of the whole image in patches
    condition  (B, width), read by the last layer; `shared` by the blocks
    context    text tokens, or None
    rotary     positions of the tokens: (N, head) each, or (B, 1, N, head) where every item has its own
    """

    tokens: Tensor
    grid: tuple[int, int]
    condition: Tensor
    shared: Tensor
    context: Tokens | None
    rotary: Rotary

    def only(self, index: Tensor) -> Embedded:
        """The tokens `index` (B, K) of each item, where they stand."""
        rotary = self.rotary[0][index][:, None], self.rotary[1][index][:, None]
        return self._replace(tokens=pick(self.tokens, index), rotary=rotary)

    def rows(self, index: Tensor) -> Embedded:
        """Some items of the batch; for tokens that stand where all items' do."""
        context = self.context
        if context is not None:
            context = Tokens(context.values[index], None if context.mask is None else context.mask[index])
        one, many = self.condition[index], self.shared[index]
        return self._replace(tokens=self.tokens[index], condition=one, shared=many, context=context)


@register("dit")
class DiT(nn.Module):
    """Transformer over patches with adaLN-zero, cross-attention to text and positions of any H, W; output 0 at the
    start.

    forward(x (B, channels, H, W), label (B,), **cond) -> (B, out_channels, H, W); H and W divisible by patch. The
    conditions are those of `UNet`. Positions are rotary in attention, and sinusoids on a grid of `size` pixels (the
    training size) added to the input.

    modulation "block": a projection of the condition in each block; "shared": one for all, and a table a block (far
    fewer parameters). Taps: `blocks.N`, `blocks.N.attention`, `blocks.N.cross`, `blocks.N.mlp`, each attention's
    `query`, `key`, `value`, `keys_values`.

    active (B, K) int64, a condition like the others: the tokens (row by row, H W / patch^2 of them) that are computed
    and attended to; the output elsewhere is 0. forward is `embed`, the blocks, `final` and `image`.

    Sources: Peebles and Xie 2023, Scalable diffusion models with transformers; Chen et al. 2023, PixArt-alpha; Shazeer
    2020 (SwiGLU); Dehghani et al. 2023 (normalised queries and keys); Su et al. 2021 (rotary positions).
    """

    def __init__(
        self,
        channels: int,
        out_channels: int | None = None,
        size: int = 32,
        patch: int = 2,
        width: int = 256,
        depth: int = 8,
        heads: int = 4,
        mlp_ratio: float = 4.0,
        modulation: str = "block",
        context_channels: int | None = None,
        vector_channels: int | None = None,
        embeddings: Mapping[str, int] | None = None,
        scalars: Mapping[str, float] | None = None,
        extra_channels: int = 0,
        scale: float = 1000.0,
        context_width: int | None = None,
    ) -> None:
        super().__init__()
        if modulation not in ("block", "shared"):
            raise InputError(f"modulation {modulation!r} is unknown; choose 'block' or 'shared'")
        if width % (4 * heads):
            raise InputError(f"width {width} must be divisible by 4 * heads = {4 * heads} for 2-D rotary positions")
        self.channels, self.extra_channels, self.patch, self.size = channels, extra_channels, patch, size
        context = (context_width or width) if context_channels else None
        self.conditioning = Conditioning(width, scale, embeddings, scalars, vector_channels)
        self.context = TokenContext(context_channels, context) if context_channels and context else None
        text = frozenset({"text", "text_mask"}) if context else frozenset()
        self.accepts = self.conditioning.names | text | {"active"} | ({"image"} if extra_channels else frozenset())
        self.input = nn.Linear((channels + extra_channels) * patch**2, width)
        shared = modulation == "shared"
        self.modulation = zero(nn.Linear(width, 6 * width)) if shared else nn.Identity()
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio, context, shared) for _ in range(depth))
        self.final = Final(width, (out_channels or channels) * patch**2)
        self.head = width // heads

    def forward(self, x: Tensor, label: Tensor, *, active: Tensor | None = None, **cond: Tensor | None) -> Tensor:
        whole = self.embed(x, label, **cond)
        e = whole if active is None else whole.only(self._checked(active, whole))
        tokens = e.tokens
        for block in self.blocks:
            tokens = block(tokens, e.shared, e.context, e.rotary)
        tokens = self.final(tokens, e.condition)
        if active is not None:
            blank = tokens.new_zeros(*whole.tokens.shape[:2], tokens.shape[2])
            tokens = blank.scatter(1, active[:, :, None].expand_as(tokens), tokens)
        return self.image(tokens, e.grid)

    def embed(
        self,
        x: Tensor,
        label: Tensor,
        *,
        text: Tensor | None = None,
        text_mask: Tensor | None = None,
        image: Tensor | None = None,
        **cond: Tensor | None,
    ) -> Embedded:
        """What the blocks read of x (B, channels, H, W), label (B,) and the conditions."""
        check_conditions({"text": text, "text_mask": text_mask, "image": image, **cond}, self.accepts)
        check_image(x, self.channels, self.patch)
        condition = F.silu(self.conditioning(label, x.shape[0], cond))
        context = None if self.context is None else self.context(text, text_mask, x.shape[0])
        x = F.pixel_unshuffle(with_image(x, image, self.extra_channels), self.patch)
        height, width = x.shape[2:]
        tokens = self.input(x.flatten(2).transpose(1, 2))
        tokens = tokens + absolute_positions(height, width, tokens.shape[-1], self.size // self.patch, tokens)
        rotary, shared = rotary_positions(height, width, self.head, tokens), self.modulation(condition)
        return Embedded(tokens, (height, width), condition, shared, context, rotary)

    def image(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens (B, N, out_channels patch^2) as the picture (B, out_channels, H, W)."""
        return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, grid), self.patch)

    def _checked(self, active: Tensor, whole: Embedded) -> Tensor:
        rows, n, _ = whole.tokens.shape
        if active.dtype != torch.int64 or active.ndim != 2 or len(active) != rows or not 1 <= active.shape[1] <= n:
            given = f"{active.dtype} {tuple(active.shape)}"
            raise InputError(f"active is {given}; it must be int64 ({rows}, K), K of the tokens 0..{n - 1}")
        return active
