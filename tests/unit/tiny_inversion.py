"""A tiny pipeline in either precision, for the tests of inversion."""

from __future__ import annotations

import torch

from sfumato import codecs, conditioners, networks, pipeline
from sfumato.denoisers import parametrized


def tiny(process, dtype=torch.float64):
    """Pixels 8 x 8, two classes, a U-Net whose output depends on all it reads."""
    torch.manual_seed(0)
    net = networks.UNet(3, width=8, multipliers=(1, 2), blocks=1, attention=(False, True), embeddings={"vendor": 2})
    for parameter in net.parameters():
        parameter.data = parameter.data + 0.05 * torch.randn_like(parameter)
    denoiser = parametrized(net.eval().to(dtype), process, "v", null={"vendor": 2})
    classes = conditioners.Classes({"vendor": ["noto", "twemoji"]})
    return pipeline.Pipeline(denoiser, Wide(dtype), classes, (8, 8), guidance=2.0)


class Wide(codecs.Identity):
    """Pixels in this precision."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def encode(self, data, ctx=None):
        return codecs.to_float(data, self.dtype)


def images(n=2, seed=1):
    return torch.randint(0, 256, (n, 3, 8, 8), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
