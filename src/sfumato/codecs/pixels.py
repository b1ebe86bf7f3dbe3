"""The process runs on pixels."""

from __future__ import annotations

from torch import Tensor

from sfumato.codecs.base import Codec, register, to_float
from sfumato.core.context import Context


@register("identity")
class Identity(Codec):
    """Pixels: uint8 <-> floats in [-1, 1]. `images(encode(u)) == u` for every uint8 u."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.channels = channels

    def encode(self, data: Tensor, ctx: Context | None = None) -> Tensor:
        return to_float(data)

    def decode(self, x: Tensor, ctx: Context | None = None) -> Tensor:
        return x

    def shape(self, height: int, width: int) -> tuple[int, ...]:
        return (self.channels, height, width)
