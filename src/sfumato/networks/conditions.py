"""Conditions (labels, classes, scalars, pooled vectors, text tokens, images) and the checks of a network's input."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.core.errors import InputError
from sfumato.networks.layers import zero


def sinusoidal(label: Tensor, width: int, period: float = 10_000.0) -> Tensor:
    """[cos(label f_k), sin(label f_k)], f_k = period^(-2 k / width): (B,) -> (B, width) (Vaswani et al. 2017)."""
    half = width // 2
    frequency = torch.exp(torch.arange(half, device=label.device, dtype=label.dtype) * (-math.log(period) / half))
    angle = label[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], -1)


class LabelEmbedding(nn.Module):
    """A float a batch item -> (B, width): sinusoids of `scale * label`, then two linear layers.

    Computed in float32 at least: a bfloat16 product with 1000 has no digits left.
    """

    def __init__(self, width: int, scale: float = 1000.0, sinusoids: int = 128) -> None:
        super().__init__()
        self.scale, self.sinusoids = scale, sinusoids
        self.first, self.second = nn.Linear(sinusoids, width), nn.Linear(width, width)

    def forward(self, label: Tensor) -> Tensor:
        label = label if label.dtype == torch.float64 else label.float()
        wave = sinusoidal(label * self.scale, self.sinusoids)
        return self.second(F.silu(self.first(wave.to(self.first.weight.dtype))))


class Conditioning(nn.Module):
    """All that acts on the whole image as one vector (B, width): label, classes, further scalars, a pooled vector.

    embeddings  name -> number n of classes; values are (B,) int64 in 0..n, where n is the null class
    scalars     name -> scale of a further float a batch item (a target time, a guidance strength); starts without
                effect
    vector      channels of the condition `vector` (B, C), e.g. a pooled sentence embedding

    An absent condition is its null: class n, no scalar, the zero vector.
    """

    def __init__(
        self,
        width: int,
        scale: float = 1000.0,
        embeddings: Mapping[str, int] | None = None,
        scalars: Mapping[str, float] | None = None,
        vector: int | None = None,
    ) -> None:
        super().__init__()
        self.label = LabelEmbedding(width, scale)
        self.classes = nn.ModuleDict({name: nn.Embedding(n + 1, width) for name, n in (embeddings or {}).items()})
        self.scalars = nn.ModuleDict({name: LabelEmbedding(width, s) for name, s in (scalars or {}).items()})
        for scalar in self.scalars.values():
            zero(scalar.get_submodule("second"))
        self.vector = nn.Linear(vector, width, bias=False) if vector else None
        self.names = frozenset(self.classes) | frozenset(self.scalars) | ({"vector"} if vector else frozenset())

    def forward(self, label: Tensor, batch: int, cond: Mapping[str, Tensor | None]) -> Tensor:
        if label.shape != (batch,):
            raise InputError(f"label has shape {tuple(label.shape)}; it must be ({batch},), one number a batch item")
        hidden = self.label(label)
        for name, table in self.classes.items():
            index, null = cond.get(name), len(table.weight) - 1  # type: ignore[arg-type]
            if index is None:
                index = torch.full((batch,), null, device=hidden.device)
            elif index.shape != (batch,) or index.is_floating_point():
                raise InputError(
                    f"{name} is {index.dtype} {tuple(index.shape)}; it must be int64 ({batch},), 0..{null}"
                )
            hidden = hidden + table(index)
        for name, embed in self.scalars.items():
            if cond.get(name) is not None:
                hidden = hidden + embed(cond[name])
        vector = cond.get("vector")
        if vector is not None and self.vector is not None:
            hidden = hidden + self.vector(vector.to(hidden.dtype))
        return hidden


class Tokens(NamedTuple):
    """What cross-attention reads: values (B, L, C), mask (B, 1, 1, L) bool with True = attend, or None."""

    values: Tensor
    mask: Tensor | None


class TokenContext(nn.Module):
    """Text tokens (B, L, channels) -> Tokens of `width` channels with one learnt null token in front.

    The null token can always be attended, so a wholly masked text is legal and equals an absent one.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.project, self.norm = nn.Linear(channels, width), nn.LayerNorm(width)
        self.null = nn.Parameter(torch.randn(1, 1, width) * 0.5)

    def forward(self, text: Tensor | None, mask: Tensor | None, batch: int) -> Tokens:
        null = self.null.expand(batch, 1, -1)
        if text is None:
            if mask is not None:
                raise InputError("text_mask was given without text; give both or neither")
            return Tokens(null, None)
        if text.ndim != 3 or text.shape[0] != batch or text.shape[2] != self.project.in_features:
            raise InputError(f"text is {tuple(text.shape)}; it must be ({batch}, length, {self.project.in_features})")
        values = torch.cat([null, self.norm(self.project(text.to(null.dtype)))], 1)
        if mask is None:
            return Tokens(values, None)
        if mask.shape != text.shape[:2] or mask.dtype != torch.bool:
            given = f"{mask.dtype} {tuple(mask.shape)}"
            raise InputError(f"text_mask is {given}; it must be bool {tuple(text.shape[:2])}, True: a token counts")
        return Tokens(values, F.pad(mask, (1, 0), value=True)[:, None, None])


def check_conditions(given: Mapping[str, object], accepts: frozenset[str]) -> None:
    """Raise InputError for a condition that the network was not built for."""
    unknown = [name for name, value in given.items() if value is not None and name not in accepts]
    if unknown:
        allowed = ", ".join(sorted(accepts)) or "no condition"
        raise InputError(f"conditions {', '.join(unknown)} are unknown to this network; it takes {allowed}")


def check_image(x: Tensor, channels: int, multiple: int) -> None:
    """Raise InputError unless x is (B, channels, H, W) with sides that are multiples of `multiple`."""
    if x.ndim != 4 or x.shape[1] != channels or x.shape[2] % multiple or x.shape[3] % multiple:
        need = f"(batch, {channels}, height, width) with sides divisible by {multiple}"
        raise InputError(f"x is {tuple(x.shape)}; it must be {need}: pad or resize it")


def with_image(x: Tensor, image: Tensor | None, channels: int) -> Tensor:
    """x with the spatial condition (B, channels, H, W) concatenated; absent, it is the zero image."""
    if not channels:
        return x
    shape = (x.shape[0], channels, *x.shape[2:])
    image = x.new_zeros(shape) if image is None else image.to(x.dtype)
    if image.shape != shape:
        raise InputError(f"image is {tuple(image.shape)}; it must be {shape}")
    return torch.cat([x, image], 1)
