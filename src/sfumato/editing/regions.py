"""Where things are and where they go: masks, moves of a picture, and how alike two regions are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.core import InputError


@dataclass(frozen=True)
class Move:
    """Brings every point p of a picture to centre + scale (p - centre) + shift.

    shift, centre  (B, 2) or (2,), x and y in shares of the picture (0 left and top, 1 right and bottom); scale a number
    """

    shift: Tensor
    centre: Tensor
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not self.scale > 0:
            raise InputError(f"scale = {self.scale}: above 0")

    def __call__(self, x: Tensor, mode: str = "bilinear") -> Tensor:
        """The picture (B, C, H, W) after the move, 0 where it shows what was outside; exact for whole cells.

        mode  'bilinear', or 'nearest', which keeps the variance of noise
        """
        n = len(x)
        shift, centre = (v.to(x).expand(n, 2) * 2 for v in (self.shift, self.centre))
        theta = x.new_zeros(n, 2, 3)
        theta[:, 0, 0] = theta[:, 1, 1] = 1 / self.scale
        # a target point q shows centre + (q - centre - shift) / scale; grid_sample's axes go from -1 to 1
        theta[:, :, 2] = (centre - 1) - (centre - 1 + shift) / self.scale
        grid = _rounded(F.affine_grid(theta, list(x.shape), align_corners=False), x)
        return F.grid_sample(x, grid, mode=mode, align_corners=False)


def _rounded(grid: Tensor, x: Tensor) -> Tensor:
    """Sampling places within a thousandth of a cell's centre are that centre, so that whole cells move without blur."""
    size = grid.new_tensor([x.shape[-1], x.shape[-2]])
    place = (grid + 1) * size / 2 - 0.5
    near = place.round()
    place = torch.where((place - near).abs() < 1e-3, near, place)
    return (place + 0.5) * 2 / size - 1


def centre_of(mask: Tensor) -> Tensor:
    """The centre of mass of masks (B, 1, H, W), (B, 2), x and y in shares of the picture."""
    height, width = mask.shape[-2:]
    rows = (torch.arange(height, device=mask.device) + 0.5).to(mask) / height
    columns = (torch.arange(width, device=mask.device) + 0.5).to(mask) / width
    total = mask.sum((1, 2, 3)).clamp(min=1e-12)
    return torch.stack([(mask * columns).sum((1, 2, 3)) / total, (mask * rows[:, None]).sum((1, 2, 3)) / total], 1)


def disc(centre: tuple[float, float], radius: float, size: tuple[int, int]) -> Tensor:
    """(1, 1, H, W): 1 within ``radius`` pixels of (x, y) in pixels."""
    height, width = size
    rows, columns = torch.arange(height) + 0.5, torch.arange(width) + 0.5
    inside = (rows[:, None] - centre[1] - 0.5) ** 2 + (columns - centre[0] - 0.5) ** 2 <= radius**2
    return inside.float()[None, None]


def fitted(mask: Tensor, like: Tensor) -> Tensor:
    """The mask (B, 1, H, W) at the size of ``like``: the share of each cell that is inside."""
    return F.interpolate(mask, size=like.shape[-2:], mode="area").to(like)


def mean_in(values: Tensor, mask: Tensor) -> Tensor:
    """The mean of values (B, C, H, W) over a mask (B, 1, H, W), (B, C); 0 where the mask is empty."""
    return (values * mask).sum((2, 3)) / mask.sum((2, 3)).clamp(min=1e-6)


def alike(one: Tensor, other: Tensor, dim: int = 1) -> Tensor:
    """(1 + cosine) / 2 along the channels, which stay as an axis of 1: 1 for the same direction, 0 for the opposite."""
    return (1 + F.cosine_similarity(one, other, dim=dim, eps=1e-6).unsqueeze(dim)) / 2


def unlike(similarity: Tensor, mask: Tensor) -> Tensor:
    """1 / (1 + 4 s) of similarities (B,), from 1 (opposite) down to 1/5 (equal); 0 where the mask (B, 1, H, W) is empty."""
    return (mask.sum((1, 2, 3)) > 0) / (1 + 4 * similarity)


__all__ = ["Move", "alike", "centre_of", "disc", "fitted", "mean_in", "unlike"]
