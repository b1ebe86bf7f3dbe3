"""A tiny pipeline for the tests of editing."""

from __future__ import annotations

import torch

from sfumato import codecs, conditioners, networks, pipeline
from sfumato.denoisers import parametrized

VENDORS = ["noto", "twemoji"]


def tiny(process):
    """Pixels 8 x 8, two classes, a U-Net whose output depends on all it reads."""
    torch.manual_seed(0)
    net = networks.UNet(3, width=8, multipliers=(1, 2), blocks=1, attention=(False, True), embeddings={"vendor": 2})
    for parameter in net.parameters():
        parameter.data = parameter.data + 0.05 * torch.randn_like(parameter)
    denoiser = parametrized(net.eval(), process, "v", null={"vendor": 2})
    classes = conditioners.Classes({"vendor": VENDORS})
    return pipeline.Pipeline(denoiser, codecs.Identity(), classes, (8, 8), guidance=2.0)
