"""A U-Net written recursively: at every resolution, everything deeper is one submodule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.core.errors import InputError
from sfumato.networks.base import register
from sfumato.networks.conditions import Conditioning, TokenContext, Tokens, check_conditions, check_image, with_image
from sfumato.networks.layers import ImageAttention, ResidualBlock, group_norm, zero


class Stage(nn.Module):
    """A residual block, followed by attention where the level has it."""

    def __init__(self, width: int, embedding: int, heads: int | None, context: int | None, dropout: float) -> None:
        super().__init__()
        self.residual = ResidualBlock(width, embedding=embedding, dropout=dropout)
        self.attention = ImageAttention(width, heads, context) if heads else None

    def forward(self, x: Tensor, embedding: Tensor, context: Tokens | None) -> Tensor:
        x = self.residual(x, embedding)
        return x if self.attention is None else self.attention(x, context)


class Down(nn.Module):
    """Stages on the way down; returns the output of each."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)

    def forward(self, x: Tensor, embedding: Tensor, context: Tokens | None) -> list[Tensor]:
        outputs = [x]
        for stage in self.stages:
            outputs.append(stage(outputs[-1], embedding, context))
        return outputs[1:]


class Up(nn.Module):
    """Stages on the way up, each after a 1x1 convolution of the running map and a map of the way down, last first."""

    def __init__(self, width: int, stages: Sequence[Stage]) -> None:
        super().__init__()
        self.merges = nn.ModuleList(nn.Conv2d(2 * width, width, 1) for _ in stages)
        self.stages = nn.ModuleList(stages)

    def forward(self, x: Tensor, skips: list[Tensor], embedding: Tensor, context: Tokens | None) -> Tensor:
        for merge, stage, skip in zip(self.merges, self.stages, reversed(skips), strict=True):
            x = stage(merge(torch.cat([x, skip], 1)), embedding, context)
        return x


class Bottleneck(nn.Module):
    """The deepest part (h-space): residual block, attention, residual block."""

    def __init__(self, width: int, embedding: int, heads: int | None, context: int | None, dropout: float) -> None:
        super().__init__()
        self.first = Stage(width, embedding, heads, context, dropout)
        self.second = ResidualBlock(width, embedding=embedding, dropout=dropout)

    def forward(self, x: Tensor, embedding: Tensor, context: Tokens | None) -> Tensor:
        return self.second(self.first(x, embedding, context), embedding)


class Level(nn.Module):
    """One resolution: down, deep (all lower levels, or the bottleneck), up.

    `shrink` and `grow` belong to the lower level: replacing the output of `deep` skips all that is below this
    resolution.
    """

    def __init__(self, down: Down, deep: nn.Module, up: Up, outer: int | None, width: int) -> None:
        super().__init__()
        self.shrink = nn.Conv2d(outer, width, 3, stride=2, padding=1) if outer else None
        self.down, self.deep, self.up = down, deep, up
        self.grow = nn.Conv2d(width, outer, 1) if outer else None

    def forward(self, x: Tensor, embedding: Tensor, context: Tokens | None) -> Tensor:
        x = x if self.shrink is None else self.shrink(x)
        skips = self.down(x, embedding, context)
        x = self.up(self.deep(skips[-1], embedding, context), skips, embedding, context)
        # the 1x1 convolution commutes with nearest-neighbour upsampling and costs a quarter before it
        return x if self.grow is None else F.interpolate(self.grow(x), scale_factor=2.0, mode="nearest")


@register("unet")
class UNet(nn.Module):
    """Convolutional U-Net with adaptive group normalisation, attention and any conditions; output 0 at the start.

    forward(x (B, channels, H, W), label (B,), **cond) -> (B, out_channels, H, W); H and W divisible by patch *
    2^(levels - 1). label is any float; it enters as sinusoids of `label * scale` (1000 suits t in [0, 1], 1 suits
    integer timesteps). cond, each absent one being its null: `text` (B, L, context_channels) with `text_mask` (B, L)
    bool; `vector` (B, vector_channels); `image` (B, extra_channels, H, W), concatenated to x; one (B,) int64 for each
    name of `embeddings` (its n is the null class); one (B,) float for each name of `scalars`.

    blocks and attention are given once or once a level; patch moves patch x patch pixels into channels at the input
    and back at the output. Taps: `level`, `level.deep`, `level.deep.deep`, ... and `bottleneck_path`.

    head "conditioned": the condition also scales and shifts the last normalisation, and a multiple of each input
    channel, linear in the condition, is added to the output, so that the layers between need not carry the noise
    through (what the preconditioning of Karras et al. 2022 does by formula, learnt). It trains markedly faster.

    Sources: Ronneberger et al. 2015, U-Net; Ho et al. 2020; Dhariwal and Nichol 2021; Rombach et al. 2022
    (cross-attention).
    """

    def __init__(
        self,
        channels: int,
        out_channels: int | None = None,
        width: int = 64,
        multipliers: Sequence[int] = (1, 2, 4),
        blocks: int | Sequence[int] = 2,
        attention: bool | Sequence[bool] = (False, True, True),
        heads: int = 4,
        context_channels: int | None = None,
        vector_channels: int | None = None,
        embeddings: Mapping[str, int] | None = None,
        scalars: Mapping[str, float] | None = None,
        extra_channels: int = 0,
        patch: int = 1,
        dropout: float = 0.0,
        scale: float = 1000.0,
        embedding_width: int | None = None,
        head: str = "plain",
    ) -> None:
        super().__init__()
        if head not in ("plain", "conditioned"):
            raise InputError(f"head {head!r} is unknown; choose 'plain' or 'conditioned'")
        self.levels = levels = len(multipliers)
        widths = [width * m for m in multipliers]
        counts = [blocks] * levels if isinstance(blocks, int) else list(blocks)
        attends = [attention] * levels if isinstance(attention, bool) else list(attention)
        if not len(counts) == len(attends) == levels:
            raise InputError(f"{levels} multipliers, {len(counts)} blocks, {len(attends)} attention: give one a level")
        if context_channels and not any(attends):
            raise InputError("context_channels without attention: text would be ignored; set attention at some level")
        self.channels, self.extra_channels, self.patch = channels, extra_channels, patch
        embedding, context = embedding_width or 2 * width, 2 * width if context_channels else None
        self.conditioning = Conditioning(embedding, scale, embeddings, scalars, vector_channels)
        self.context = TokenContext(context_channels, context) if context_channels and context else None
        text = frozenset({"text", "text_mask"}) if context else frozenset()
        self.accepts = self.conditioning.names | text | ({"image"} if extra_channels else frozenset())

        def stage(i: int) -> Stage:
            return Stage(widths[i], embedding, heads if attends[i] else None, context, dropout)

        deep: nn.Module = Bottleneck(widths[-1], embedding, heads if attends[-1] else None, context, dropout)
        for i in reversed(range(levels)):
            down, up = Down([stage(i) for _ in range(counts[i])]), Up(widths[i], [stage(i) for _ in range(counts[i])])
            deep = Level(down, deep, up, widths[i - 1] if i else None, widths[i])
        self.input = nn.Conv2d((channels + extra_channels) * patch**2, width * multipliers[0], 3, padding=1)
        self.level = deep
        out = (out_channels or channels) * patch**2
        self.norm = group_norm(widths[0])
        self.output = zero(nn.Conv2d(widths[0], out, 3, padding=1))
        conditioned, same = head == "conditioned", out == channels * patch**2
        self.modulation = zero(nn.Linear(embedding, 2 * widths[0])) if conditioned else None
        self.carry = zero(nn.Linear(embedding, out)) if conditioned and same else None

    @property
    def bottleneck_path(self) -> str:
        """Path of the bottleneck (h-space) submodule."""
        return ".".join(["level"] + ["deep"] * self.levels)

    def forward(
        self,
        x: Tensor,
        label: Tensor,
        *,
        text: Tensor | None = None,
        text_mask: Tensor | None = None,
        image: Tensor | None = None,
        **cond: Tensor | None,
    ) -> Tensor:
        given = {"text": text, "text_mask": text_mask, "image": image, **cond}
        check_conditions(given, self.accepts)
        check_image(x, self.channels, self.patch * 2 ** (self.levels - 1))
        embedding = F.silu(self.conditioning(label, x.shape[0], cond))
        context = None if self.context is None else self.context(text, text_mask, x.shape[0])
        x = with_image(x, image, self.extra_channels).contiguous(memory_format=torch.channels_last)
        x = F.pixel_unshuffle(x, self.patch)
        hidden = self.norm(self.level(self.input(x), embedding, context))
        if self.modulation is not None:
            scale, shift = self.modulation(embedding)[:, :, None, None].chunk(2, 1)
            hidden = torch.addcmul(shift, hidden, 1 + scale)
        out = self.output(F.silu(hidden))
        if self.carry is not None:
            out = torch.addcmul(out, self.carry(embedding)[:, :, None, None], x[:, : out.shape[1]])
        return F.pixel_shuffle(out, self.patch)
