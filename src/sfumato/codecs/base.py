"""What every codec shares: data <-> the space the process runs in, and the range of pixels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sfumato.core.context import Context
from sfumato.core.errors import InputError
from sfumato.core.registry import Registry
from sfumato.networks.base import configured

Made = TypeVar("Made", bound=type[nn.Module])
registry = Registry("codec", package="sfumato.codecs")


def register(name: str) -> Callable[[Made], Made]:
    """Class decorator: file the class under `name` (its `codec_name`) and make its instances keep their `config`."""

    def decorate(cls: Made) -> Made:
        cls.codec_name = name  # type: ignore[attr-defined]
        return registry.register(name)(configured(cls))

    return decorate


def names() -> list[str]:
    """The names that `build` knows."""
    return registry.names()


def build(name: str, config: Mapping[str, Any] | None = None) -> Codec:
    """The codec `name` made with the arguments `config`: `build(codec.codec_name, codec.config)` is built like `codec`.

    Raises UnknownName for a name that is not registered, InputError for arguments that it does not take.
    """
    return registry.get(name, **(config or {}))


def to_float(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 0..255 -> floats x / 127.5 - 1 in [-1, 1]; floats are in that range already and keep their dtype."""
    if images.dtype == torch.uint8:
        return images.to(dtype) / 127.5 - 1
    if images.is_floating_point():
        return images
    raise InputError(f"images must be uint8 (0..255) or floats in [-1, 1]; got {images.dtype}")


def to_uint8(images: Tensor) -> Tensor:
    """Floats in [-1, 1] -> uint8, rounded to the nearest level; what lies outside the range is shown as its end."""
    if not images.is_floating_point():
        raise InputError(f"images must be floats in [-1, 1]; got {images.dtype}")
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


class Codec(nn.Module):
    """Data <-> the space the process runs in. A codec owns its scale: its codes have a standard deviation of about 1.

    encode takes uint8 images or floats in [-1, 1]; decode gives floats, differentiable and not clipped; images gives
    uint8.
    """

    def encode(self, data: Tensor, ctx: Context | None = None) -> Tensor:
        """Data -> state; `ctx` gives the noise of a stochastic code, None (or no randomness in it) its mean."""
        raise NotImplementedError(f"{type(self).__name__} must say how it encodes")

    def decode(self, x: Tensor, ctx: Context | None = None) -> Tensor:
        """State -> floats."""
        raise NotImplementedError(f"{type(self).__name__} must say how it decodes")

    def images(self, x: Tensor, ctx: Context | None = None) -> Tensor:
        """State -> uint8 images."""
        return to_uint8(self.decode(x, ctx))

    def shape(self, height: int, width: int) -> tuple[int, ...]:
        """Shape of the state of one image of this size."""
        raise NotImplementedError(f"{type(self).__name__} must say the shape of its states")
