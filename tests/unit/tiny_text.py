"""A small text-reading U-Net for tests of editing, all of whose parameters matter."""

from __future__ import annotations

import torch

from sfumato import networks


def lively(net: torch.nn.Module, std: float = 0.1, seed: int = 1) -> torch.nn.Module:
    """Parameters that are zero at the start drawn too, or what they lead to would not matter; in float64."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        if not parameter.any():
            parameter.data.normal_(0, std, generator=generator)
    return net.double().eval()


def text_unet(std: float = 0.1, seed: int = 1) -> torch.nn.Module:
    """Two channels, two resolutions, cross-attention to words of eight numbers."""
    torch.manual_seed(0)
    config = {
        "channels": 2, "width": 16, "multipliers": [1, 2], "blocks": 1, "attention": [False, True], "heads": 2, "context_channels": 8,
    }  # fmt: skip
    return lively(networks.build("unet", config), std, seed)
