"""Encoders: images and sentence embeddings to one space; their feature maps serve perceptual losses and metrics."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.core.errors import InputError
from sfumato.networks.base import as_network, register
from sfumato.networks.conditions import LabelEmbedding, Tokens, check_image
from sfumato.networks.dit import SwiGLU, absolute_positions
from sfumato.networks.layers import Attention, ResidualBlock, group_norm
from sfumato.networks.products import Linear


class FeatureExtractor(Protocol):
    """Any module that turns an image batch into a list of feature maps (B, C, h, w)."""

    def features(self, x: Tensor) -> list[Tensor]: ...


def perceptual_distance(extractor: FeatureExtractor, a: Tensor, b: Tensor) -> Tensor:
    """Sum over feature maps of the mean over positions of |a / |a| - b / |b||^2, channels as the vector: (B,).

    Zhang et al. 2018, The unreasonable effectiveness of deep features as a perceptual metric, without its learnt
    channel weights.
    """
    pairs = zip(extractor.features(a), extractor.features(b), strict=True)
    distances = [(F.normalize(p, dim=1) - F.normalize(q, dim=1)).square().sum(1).flatten(1).mean(1) for p, q in pairs]
    return torch.stack(distances).sum(0)


class Head(nn.Module):
    """(B, width) -> (B, embedding), of length 1 if `normalise`."""

    def __init__(self, width: int, embedding: int, normalise: bool) -> None:
        super().__init__()
        self.norm, self.project, self.normalise = nn.LayerNorm(width), nn.Linear(width, embedding), normalise

    def forward(self, x: Tensor) -> Tensor:
        x = self.project(self.norm(x))
        return F.normalize(x, dim=-1) if self.normalise else x


@register("conv-encoder")
class ConvEncoder(nn.Module):
    """Residual convolutional encoder: forward(x (B, channels, H, W), label=None) -> (B, embedding).

    Any H, W divisible by patch * 2^(levels - 1).

    labelled   it is told how noisy x is: `label` (B,) is required then (guidance by a classifier of noisy images)
    normalise  embeddings of length 1; False gives raw outputs, e.g. the logits of `embedding` classes
    features(x, label=None) -> the maps after each level, fine to coarse.
    """

    def __init__(
        self,
        channels: int = 3,
        width: int = 32,
        multipliers: Sequence[int] = (1, 2, 4),
        blocks: int = 1,
        embedding: int = 128,
        patch: int = 1,
        labelled: bool = False,
        normalise: bool = True,
        dropout: float = 0.0,
        scale: float = 1000.0,
    ) -> None:
        super().__init__()
        widths = [width * m for m in multipliers]
        self.channels, self.patch, self.multiple = channels, patch, patch * 2 ** (len(widths) - 1)
        condition = 2 * width if labelled else None
        self.label = LabelEmbedding(condition, scale) if condition else None
        self.input = nn.Conv2d(channels * patch**2, widths[0], 3, padding=1)
        self.shrinks = nn.ModuleList(nn.Conv2d(a, b, 3, 2, 1) for a, b in zip(widths, widths[1:], strict=False))
        self.levels = nn.ModuleList(
            nn.ModuleList(ResidualBlock(w, embedding=condition, dropout=dropout) for _ in range(blocks)) for w in widths
        )
        self.norm, self.head = group_norm(widths[-1]), Head(widths[-1], embedding, normalise)

    def features(self, x: Tensor, label: Tensor | None = None) -> list[Tensor]:
        """The feature maps after each level, fine to coarse."""
        check_image(x, self.channels, self.multiple)
        condition = _label(self.label, label)
        x = self.input(F.pixel_unshuffle(x.contiguous(memory_format=torch.channels_last), self.patch))
        maps = []
        for i, level in enumerate(self.levels):
            x = self.shrinks[i - 1](x) if i else x
            for block in level:  # type: ignore[attr-defined]
                x = block(x, condition)
            maps.append(x)
        return maps

    def forward(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        return self.head(F.silu(self.norm(self.features(x, label)[-1])).mean((2, 3)))


def _label(embed: LabelEmbedding | None, label: Tensor | None) -> Tensor | None:
    if (embed is None) != (label is None):
        need = "labelled=True needs a label" if label is None else "labelled=False takes no label"
        raise InputError(f"an encoder built with {need}")
    return None if embed is None or label is None else F.silu(embed(label))


class EncoderBlock(nn.Module):
    """x + attention(norm(x)); x + mlp(norm(x))."""

    def __init__(self, width: int, heads: int, ratio: float) -> None:
        super().__init__()
        self.attention_norm, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.mlp_norm, self.mlp = nn.LayerNorm(width), SwiGLU(width, ratio)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        hidden = self.attention_norm(x)
        x = x + self.attention(hidden, Tokens(hidden, mask))
        return x + self.mlp(self.mlp_norm(x))


@register("vit-encoder")
class ViTEncoder(nn.Module):
    """Vision transformer encoder with averaged tokens; forward, features, labelled and normalise as in `ConvEncoder`.

    Any H, W that patch divides; `size` is the training size. Dosovitskiy et al. 2021, An image is worth 16x16 words.
    """

    def __init__(
        self,
        channels: int = 3,
        size: int = 32,
        patch: int = 4,
        width: int = 192,
        depth: int = 6,
        heads: int = 3,
        mlp_ratio: float = 4.0,
        embedding: int = 128,
        labelled: bool = False,
        normalise: bool = True,
        scale: float = 1000.0,
    ) -> None:
        super().__init__()
        self.channels, self.patch, self.size = channels, patch, size
        self.label = LabelEmbedding(width, scale) if labelled else None
        self.input = Linear(channels * patch**2, width)
        self.blocks = nn.ModuleList(EncoderBlock(width, heads, mlp_ratio) for _ in range(depth))
        self.head = Head(width, embedding, normalise)

    def features(self, x: Tensor, label: Tensor | None = None) -> list[Tensor]:
        """The token maps (B, width, h, w) after each block."""
        check_image(x, self.channels, self.patch)
        x, condition = F.pixel_unshuffle(x, self.patch), _label(self.label, label)
        height, width = x.shape[2:]
        tokens = self.input(x.flatten(2).transpose(1, 2))
        tokens = tokens + absolute_positions(height, width, tokens.shape[-1], self.size // self.patch, tokens)
        tokens = tokens if condition is None else tokens + condition[:, None]
        maps = []
        for block in self.blocks:
            tokens = block(tokens)
            maps.append(tokens.transpose(1, 2).unflatten(2, (height, width)))
        return maps

    def forward(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        return self.head(self.features(x, label)[-1].mean((2, 3)))


@register("text-tower")
class TextTower(nn.Module):
    """Frozen sentence features -> (B, embedding): a perceptron on the pooled vector, transformer blocks on the tokens.

    forward(vector (B, vector_channels), text=None (B, L, context_channels), text_mask=None (B, L) bool). With
    context_channels None only the vector is read; otherwise text is required, and a wholly masked one leaves the
    vector alone.
    """

    def __init__(
        self,
        vector_channels: int = 384,
        context_channels: int | None = None,
        width: int = 192,
        depth: int = 2,
        heads: int = 3,
        embedding: int = 128,
        normalise: bool = True,
    ) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(vector_channels, width), nn.Linear(width, width)
        self.input = Linear(context_channels, width) if context_channels else None
        self.blocks = nn.ModuleList(EncoderBlock(width, heads, 4.0) for _ in range(depth if context_channels else 0))
        self.head = Head(width, embedding, normalise)

    def forward(self, vector: Tensor, text: Tensor | None = None, text_mask: Tensor | None = None) -> Tensor:
        hidden = self.second(F.silu(self.first(vector.to(self.first.weight.dtype))))
        if (self.input is None) != (text is None):
            need = "was built with context_channels and needs text" if text is None else "reads no text: leave it out"
            raise InputError(f"this text tower {need}")
        if self.input is not None and text is not None:
            # the pooled vector is a token of its own: it can always be attended
            tokens = torch.cat([hidden[:, None], self.input(text.to(hidden.dtype))], 1)
            valid = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
            valid = valid if text_mask is None else F.pad(text_mask, (1, 0), value=True)
            for block in self.blocks:
                tokens = block(tokens, valid[:, None, None])
            weight = valid[..., None].to(tokens.dtype)
            hidden = (tokens * weight).sum(1) / weight.sum(1)
        return self.head(hidden)


@register("dual-encoder")
class DualEncoder(nn.Module):
    """An image encoder and a text tower with one embedding space and a learnt temperature (Radford et al. 2021, CLIP).

    image, text  networks, or {"name": ..., "config": {...}} of them
    classes      name -> number of classes of a linear head on the image embedding, read by `classify(embedding)`
    forward(x, label=None, *, vector, text=None, text_mask=None) -> logits (B images, B texts) = exp(log_scale)
    cos(image, text).
    """

    def __init__(
        self,
        image: nn.Module | Mapping[str, Any],
        text: nn.Module | Mapping[str, Any],
        classes: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__()
        self.image, self.text = as_network(image), as_network(text)
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))
        width: int = self.image.config["embedding"]  # type: ignore[index, assignment]
        self.heads = nn.ModuleDict({name: nn.Linear(width, n) for name, n in (classes or {}).items()})

    def classify(self, embedding: Tensor) -> dict[str, Tensor]:
        """Logits (B, n) of each class head from image embeddings of length 1 (B, embedding)."""
        scaled = embedding * embedding.shape[-1] ** 0.5
        return {name: head(scaled) for name, head in self.heads.items()}

    def features(self, x: Tensor, label: Tensor | None = None) -> list[Tensor]:
        """The feature maps of the image encoder."""
        return self.image.features(x, label)  # type: ignore[operator]

    def forward(
        self,
        x: Tensor,
        label: Tensor | None = None,
        *,
        vector: Tensor,
        text: Tensor | None = None,
        text_mask: Tensor | None = None,
    ) -> Tensor:
        return self.log_scale.exp() * self.image(x, label) @ self.text(vector, text, text_mask).T
