"""A network that is told a latent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.core.errors import InputError
from sfumato.networks.base import as_network, build, register
from sfumato.networks.layers import zero


@register("latent")
class LatentNetwork(nn.Module):
    """net(x, label, vector = vector + p(m(z / rms(z)))): a network that is also told a latent z, without effect at the start.

    forward(x, label, latent=z (B, size), **cond) -> what `net` gives. In `UNet`, `DiT` and `MLP` the vector scales and shifts
    every normalisation, so a latent changes the whole output. `draws` says that z is standard normal noise, fresh at each
    call: a denoiser of this network draws it.

    net    a network with vector_channels, or {"name": ..., "config": ...} of one
    size   numbers of the latent
    width  of the hidden layers of m, linear ones and SiLU; depth of them. p is linear and begins at 0

    Sources: Karras, Laine, Aila, 2019, "A Style-Based Generator Architecture for Generative Adversarial Networks"; Xiao,
    Kreis, Vahdat, 2022, "Tackling the Generative Learning Trilemma with Denoising Diffusion GANs".
    """

    def __init__(self, net: nn.Module | Mapping[str, Any], size: int, width: int = 128, depth: int = 3) -> None:
        super().__init__()
        if size < 1 or depth < 1:
            raise InputError(f"size = {size}, depth = {depth}: a latent has one number and one layer at least")
        self.net, self.size = as_network(net), size
        inner: frozenset[str] = frozenset(getattr(self.net, "accepts", ()))
        if "vector" not in inner or "latent" in inner:
            raise InputError(
                f"{type(self.net).__name__} reads {sorted(inner) or 'no condition'}; a latent comes in by 'vector': build it with "
                f"vector_channels={width}"
            )
        config: Any = self.net.config
        self.accepts, self.draws = inner | {"latent"}, {"latent": (size,)}
        layers = [nn.Linear(size if i == 0 else width, width) for i in range(depth)]
        self.mapping = nn.Sequential(*[module for layer in layers for module in (layer, nn.SiLU())])
        self.project = zero(nn.Linear(width, config["vector_channels"], bias=False))

    @property
    def bottleneck_path(self) -> str:
        """Path of the bottleneck (h-space) submodule of ``net``. AttributeError where that has none."""
        return f"net.{self.net.bottleneck_path}"

    def forward(
        self, x: Tensor, label: Tensor, *, latent: Tensor | None = None, vector: Tensor | None = None, **cond: Any
    ) -> Tensor:
        if latent is None or latent.shape != (len(x), self.size):
            given = "none" if latent is None else tuple(latent.shape)
            raise InputError(f"the latent is {given}; it must be ({len(x)}, {self.size}), as a denoiser draws it")
        z = latent * torch.rsqrt(latent.square().mean(1, keepdim=True) + 1e-8)
        told = self.project(self.mapping(z))
        return self.net(x, label, vector=told if vector is None else told + vector, **cond)  # type: ignore[no-any-return]


def with_latent(net: Any, size: int, width: int = 128, depth: int = 3) -> LatentNetwork:
    """A copy that is also told a latent; it gives what ``net`` gives until it is trained.

    Raises InputError for a network without a ``vector_channels`` argument (`UNet`, `DiT` and `MLP` have one).
    """
    config = dict(getattr(net, "config", {}))
    if "vector_channels" not in config:
        raise InputError(
            f"{type(net).__name__} takes no vector, by which a latent comes in: use a network of the library, 'unet' or 'dit'"
        )
    wider = build(net.network_name, {**config, "vector_channels": config["vector_channels"] or width})
    wider.load_state_dict({**wider.state_dict(), **net.state_dict()})
    weight = next(net.parameters())
    return LatentNetwork(wider, size, width, depth).to(weight.device, weight.dtype).train(net.training)


__all__ = ["LatentNetwork", "with_latent"]
