"""A network that is told a latent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.core.errors import InputError
from sfumato.networks.base import as_network, register


@register("latent")
class LatentNetwork(nn.Module):
    """A network whose condition `vector` is a latent z: net(x, label, vector=m(z / rms(z))), m of linear layers and SiLU.

    forward(x, label, vector=z (B, size), **cond) -> what `net` gives. In `UNet` and `MLP` the vector becomes the scale
    and shift of every normalisation, so a latent changes the style of the whole output.

    net    a network with vector_channels = width, or {"name": ..., "config": ...} of one
    size   numbers of the latent
    width  of the hidden layers; depth of them

    Sources: Karras, Laine, Aila, 2019, "A Style-Based Generator Architecture for Generative Adversarial Networks"; Xiao,
    Kreis, Vahdat, 2022, "Tackling the Generative Learning Trilemma with Denoising Diffusion GANs".
    """

    def __init__(self, net: nn.Module | Mapping[str, Any], size: int, width: int = 128, depth: int = 3) -> None:
        super().__init__()
        if size < 1 or depth < 1:
            raise InputError(f"size = {size}, depth = {depth}: a latent has one number and one layer at least")
        self.net, self.size = as_network(net), size
        self.accepts: frozenset[str] = frozenset(getattr(self.net, "accepts", ()))
        if "vector" not in self.accepts:
            raise InputError(
                f"{type(self.net).__name__} reads no condition 'vector': build it with vector_channels={width}"
            )
        layers = [nn.Linear(size if i == 0 else width, width) for i in range(depth)]
        self.mapping = nn.Sequential(*[module for layer in layers for module in (layer, nn.SiLU())])

    def forward(self, x: Tensor, label: Tensor, *, vector: Tensor | None = None, **cond: Any) -> Tensor:
        if vector is None or vector.shape != (len(x), self.size):
            given = "none" if vector is None else tuple(vector.shape)
            raise InputError(f"the latent is {given}; it must be ({len(x)}, {self.size}), as denoisers.Latent draws it")
        z = vector * torch.rsqrt(vector.square().mean(1, keepdim=True) + 1e-8)
        return self.net(x, label, vector=self.mapping(z), **cond)  # type: ignore[no-any-return]


__all__ = ["LatentNetwork"]
