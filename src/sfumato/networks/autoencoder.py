"""A light autoencoder with a Gaussian latent, and the discriminator it is trained against."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.core.errors import InputError
from sfumato.networks.base import register
from sfumato.networks.conditions import check_image
from sfumato.networks.layers import ImageAttention, ResidualBlock, group_norm, zero


class Moments(NamedTuple):
    """A diagonal Gaussian over latents: mean and logvar (B, latent, h, w)."""

    mean: Tensor
    logvar: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """mean + std * noise."""
        return torch.addcmul(self.mean, (0.5 * self.logvar).exp(), noise)

    def kl(self) -> Tensor:
        """KL(N(mean, var) || N(0, 1)) in nats, summed over the latent: (B,)."""
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1 - self.logvar).flatten(1).sum(1)


class Encoder(nn.Module):
    """Image -> 2 * latent channels at 1 / factor of the sides."""

    def __init__(
        self, channels: int, out: int, widths: Sequence[int], blocks: int, patch: int, attention: bool
    ) -> None:
        super().__init__()
        self.patch = patch
        self.input = nn.Conv2d(channels * patch**2, widths[0], 3, padding=1)
        levels: list[nn.Module] = []
        for i, width in enumerate(widths):
            shrink = [nn.Conv2d(widths[i - 1], width, 3, stride=2, padding=1)] if i else []
            levels.append(nn.Sequential(*shrink, *[ResidualBlock(width) for _ in range(blocks)]))
        self.levels = nn.ModuleList(levels)
        self.attention = ImageAttention(widths[-1], max(1, widths[-1] // 64)) if attention else nn.Identity()
        self.norm, self.output = group_norm(widths[-1]), nn.Conv2d(widths[-1], out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.input(F.pixel_unshuffle(x.contiguous(memory_format=torch.channels_last), self.patch))
        for level in self.levels:
            hidden = level(hidden)
        return self.output(F.silu(self.norm(self.attention(hidden))))


class Decoder(nn.Module):
    """Latent -> image."""

    def __init__(
        self, latent: int, channels: int, widths: Sequence[int], blocks: int, patch: int, attention: bool
    ) -> None:
        super().__init__()
        self.patch = patch
        self.input = nn.Conv2d(latent, widths[-1], 3, padding=1)
        self.attention = ImageAttention(widths[-1], max(1, widths[-1] // 64)) if attention else nn.Identity()
        levels: list[nn.Module] = []
        for i, width in reversed(list(enumerate(widths))):
            # the 1x1 convolution commutes with nearest-neighbour upsampling and costs a quarter before it
            grow = [nn.Conv2d(width, widths[i - 1], 1), nn.Upsample(scale_factor=2.0, mode="nearest")] if i else []
            levels.append(nn.Sequential(*[ResidualBlock(width) for _ in range(blocks)], *grow))
        self.levels = nn.ModuleList(levels)
        self.norm, self.output = group_norm(widths[0]), nn.Conv2d(widths[0], channels * patch**2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.attention(self.input(x.contiguous(memory_format=torch.channels_last)))
        for level in self.levels:
            hidden = level(hidden)
        return F.pixel_shuffle(self.output(F.silu(self.norm(hidden))), self.patch)


@register("autoencoder-kl")
class AutoencoderKL(nn.Module):
    """Convolutional autoencoder whose code is a diagonal Gaussian; sides shrink by `factor` = patch * 2^(levels - 1).

    encode(x (B, channels, H, W)) -> Moments (B, latent, H / factor, W / factor), logvar within [-30, 20]; decode(z) ->
    image; forward(x, label=None, noise=None) -> reconstruction from the mean, or from mean + std * noise. `label` is
    not used. The first `patch` of the factor moves pixels into channels, so that no convolution runs at full
    resolution.

    Sources: Kingma and Welling 2014; Rombach et al. 2022, High-resolution image synthesis with latent diffusion models.
    """

    def __init__(
        self,
        channels: int = 3,
        latent: int = 4,
        factor: int = 8,
        width: int = 64,
        multipliers: Sequence[int] | None = None,
        blocks: int = 1,
        decoder_blocks: int = 2,
        patch: int = 2,
        attention: bool = True,
    ) -> None:
        super().__init__()
        levels = (factor // patch).bit_length()
        if factor < patch or patch * 2 ** (levels - 1) != factor:
            raise InputError(f"factor {factor} must be patch {patch} times a power of two")
        multipliers = (1, 2, 3, *[4] * levels)[:levels] if multipliers is None else multipliers
        if len(multipliers) != levels:
            raise InputError(f"factor {factor} with patch {patch} has {levels} levels, not {len(multipliers)}")
        widths = [width * m for m in multipliers]
        self.channels, self.latent, self.factor = channels, latent, factor
        self.encoder = Encoder(channels, 2 * latent, widths, blocks, patch, attention)
        self.decoder = Decoder(latent, channels, widths, decoder_blocks, patch, attention)

    @property
    def last_layer(self) -> Tensor:
        """The weight of the decoder's last convolution, where gradients of rival losses are balanced."""
        return self.decoder.output.weight

    def encode(self, x: Tensor) -> Moments:
        """Image -> the Gaussian of its code. Raises InputError for sides that `factor` does not divide."""
        check_image(x, self.channels, self.factor)
        mean, logvar = self.encoder(x).chunk(2, 1)
        return Moments(mean, logvar.clamp(-30.0, 20.0))

    def decode(self, z: Tensor) -> Tensor:
        """Code (B, latent, h, w) -> image (B, channels, h factor, w factor)."""
        check_image(z, self.latent, 1)
        return self.decoder(z)

    def forward(self, x: Tensor, label: Tensor | None = None, *, noise: Tensor | None = None) -> Tensor:
        moments = self.encode(x)
        return self.decode(moments.mean if noise is None else moments.sample(noise))


@register("patch-discriminator")
class PatchDiscriminator(nn.Module):
    """Real-or-fake logits (B, 1, H / 2^depth, W / 2^depth), one a patch of the image (Isola et al. 2017, PatchGAN).

    forward(x, label=None) ; features(x) -> the feature map after every layer, for feature matching. Starts at logit 0.
    """

    def __init__(self, channels: int = 3, width: int = 32, depth: int = 3) -> None:
        super().__init__()
        self.channels, self.depth = channels, depth
        widths = [min(width * 2**i, width * 8) for i in range(depth)]
        layers = [nn.Conv2d(channels, width, 4, stride=2, padding=1)]
        layers += [nn.Conv2d(a, b, 4, stride=2, padding=1) for a, b in zip(widths, widths[1:], strict=False)]
        self.layers = nn.ModuleList(layers)
        self.norms = nn.ModuleList(group_norm(w) if i else nn.Identity() for i, w in enumerate(widths))
        self.output = zero(nn.Conv2d(widths[-1], 1, 3, padding=1))

    def features(self, x: Tensor) -> list[Tensor]:
        """The feature maps after each layer, coarser and coarser."""
        check_image(x, self.channels, 2**self.depth)
        maps = []
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = F.leaky_relu(norm(layer(x)), 0.2)
            maps.append(x)
        return maps

    def forward(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        return self.output(self.features(x)[-1])
