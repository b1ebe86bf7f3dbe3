"""diffusers autoencoders as codecs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sfumato.codecs import Codec, to_float
from sfumato.core import Context, InputError

KNOWN = ("AutoencoderKL", "AutoencoderTiny", "AutoencoderDC", "VQModel")


class Autoencoder(Codec):
    """encode: (z - shift) scale; decode: the decoder of x / scale + shift. Scale, shift and per-channel statistics are
    the configuration's own (``scaling_factor``, ``shift_factor``, ``latents_mean``, ``latents_std``).

    KL codes are drawn where the context has randomness, else their mean; VQ codes are quantised by ``decode``.
    ``check`` is run on decoded pictures before they are shown (a safety checker). A half-precision model that asks for
    it (``force_upcast``) is run in float32, as diffusers does.
    """

    mean: Any
    std: Any

    def __init__(self, model: Any, check: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        name = type(model).__name__
        if not any(c.__name__ in KNOWN for c in type(model).__mro__):
            raise InputError(f"a {name} cannot be carried as a codec; {', '.join(KNOWN)} can")
        config = model.config
        upcast = model.dtype == torch.float16 and config.get("force_upcast", False)
        self.model: Any = copy.deepcopy(model).float() if upcast else model
        self.check = check
        self.latent = config.get("latent_channels")
        self.factor = _factor(model)
        self.scale = float(config.get("scaling_factor", 1.0))
        self.shift = float(config.get("shift_factor") or 0.0)
        mean, std = config.get("latents_mean"), config.get("latents_std")
        both = mean is not None and std is not None
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1) if both else None, persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1) if both else None, persistent=False)

    def encode(self, data: Tensor, ctx: Context | None = None) -> Tensor:
        rng, code = None if ctx is None else ctx.rng, self.model.encode(to_float(data).to(self.model.dtype))
        if hasattr(code, "latent_dist"):
            moments = code.latent_dist
            z = moments.mean if rng is None else moments.mean + moments.std * rng.normal(moments.mean)
        else:
            z = code.latents if hasattr(code, "latents") else code.latent
        z = z if self.mean is None else (z - self.mean) / self.std
        return ((z - self.shift) * self.scale if self.shift else z * self.scale).to(torch.float32)

    def decode(self, x: Tensor, ctx: Context | None = None) -> Tensor:
        if self.mean is None:
            z = x / self.scale + self.shift if self.shift else x / self.scale
        else:
            z = x * self.std / self.scale + self.mean
        out: Tensor = self.model.decode(z.to(self.model.dtype), return_dict=False)[0]
        return out.to(x.dtype)

    def images(self, x: Tensor, ctx: Context | None = None) -> Tensor:
        shown = (self.decode(x, ctx).float() / 2 + 0.5).clamp(0, 1)
        return ((shown if self.check is None else self.check(shown)) * 255).round().to(torch.uint8)

    def shape(self, height: int, width: int) -> tuple[int, ...]:
        if height % self.factor or width % self.factor:
            raise InputError(f"{height} x {width}: the sides must be multiples of {self.factor}; pad or resize")
        return (self.latent, height // self.factor, width // self.factor)


def _factor(model: Any) -> int:
    ratio = getattr(model, "spatial_compression_ratio", None)
    if ratio is not None:
        return int(ratio)
    blocks = model.config.get("block_out_channels") or model.config.encoder_block_out_channels
    return int(2 ** (len(blocks) - 1))
