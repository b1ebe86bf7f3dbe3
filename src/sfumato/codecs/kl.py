"""The process runs on the code of an autoencoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.codecs.base import Codec, register, to_float
from sfumato.core.context import Context
from sfumato.core.errors import InputError
from sfumato.networks.base import as_network


@register("kl")
class KL(Codec):
    """encode: (z - mean) / std with z ~ N(m(data), v(data)) of a Gaussian autoencoder; decode: its decoder of mean +
    std x.

    autoencoder  `encode(images) -> Moments`, `decode(z)`, `latent`, `factor`; or {"name": ..., "config": {...}} of one
    mean, std (latent, 1, 1) are buffers, 0 and 1 until `fit_scale` measured them; they are saved with the weights.

    The sides of an image must be multiples of `autoencoder.factor`: InputError otherwise. Rombach et al. 2022.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, autoencoder: nn.Module | Mapping[str, Any]) -> None:
        super().__init__()
        self.autoencoder: Any = as_network(autoencoder)
        channels: int = self.autoencoder.latent  # type: ignore[assignment]
        self.register_buffer("mean", torch.zeros(channels, 1, 1))
        self.register_buffer("std", torch.ones(channels, 1, 1))

    def encode(self, data: Tensor, ctx: Context | None = None) -> Tensor:
        moments = self.autoencoder.encode(to_float(data, self.std.dtype))
        rng = None if ctx is None else ctx.rng
        z = moments.mean if rng is None else moments.sample(rng.normal(moments.mean))
        return (z - self.mean) / self.std

    def decode(self, x: Tensor, ctx: Context | None = None) -> Tensor:
        return self.autoencoder.decode(torch.addcmul(self.mean, x, self.std))

    def shape(self, height: int, width: int) -> tuple[int, ...]:
        factor = self.autoencoder.factor
        if height % factor or width % factor:
            raise InputError(f"{height} x {width}: the sides must be multiples of {factor}; pad or resize")
        return (self.autoencoder.latent, height // factor, width // factor)

    @torch.no_grad()
    def fit_scale(self, images: Tensor, batch: int = 64) -> KL:
        """Set mean and std so that each channel of the codes of these images (N, C, H, W) has mean 0 and std 1.

        Raises InputError (a ValueError) for a channel whose std is below 1e-6: an unused channel, or equal images.
        """
        if not len(images):
            raise InputError("no images were given; give at least one")
        parts = [self.autoencoder.encode(to_float(part, self.std.dtype)).mean for part in images.split(batch)]
        z = torch.cat(parts).double()
        mean, std = z.mean((0, 2, 3)), z.std((0, 2, 3), correction=0)
        if not bool((std >= 1e-6).all()):
            channels = [i for i, s in enumerate(std.tolist()) if not s >= 1e-6]
            reason = "they carry nothing; give varied images, or train longer"
            raise InputError(f"the std of code channels {channels} is below 1e-6: {reason}")
        self.mean.copy_(mean.reshape(-1, 1, 1))
        self.std.copy_(std.reshape(-1, 1, 1))
        return self
