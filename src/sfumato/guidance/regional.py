"""Regional prompts: several conditions, each where its mask is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from sfumato.core import Context, Denoiser, Guidance, InputError, Wrapper
from sfumato.guidance._beliefs import apart, beliefs, beside, combine, like
from sfumato.guidance._registry import register

MASK = "mask"


class Regional(Wrapper):
    """See :func:`regional`."""

    def __init__(self, inner: Denoiser, background: float = 0.2, batched: bool = True) -> None:
        super().__init__(inner)
        if not 0 <= background <= 1:
            raise InputError(f"background = {background}: its weight inside the regions, between 0 and 1")
        self.background, self.batched = background, batched

    def forward(self, x: Any, t: Any, ctx: Context) -> Any:
        own, given = apart(ctx.cond, "region")
        if not given:
            raise InputError("no regions: put sf.guidance.regions(n, (mask, conditions), ...) beside the conditions")
        masks = [_fitted(region[MASK], x) for region in given]
        total = sum(masks[1:], masks[0])
        share = (1.0 - self.background) / total.clamp(min=1.0)  # overlaps are shared
        weights = [mask * share for mask in masks]
        sets = {"background": own}
        for i, region in enumerate(given):
            sets[f"region.{i}"] = own | {k: like(v, own[k]) for k, v in region.items() if k != MASK and k in own}
        found = beliefs(self.inner, x, t, ctx, sets, batched=self.batched, name="regional")
        return combine(found, [1.0 - total * share, *weights])


def _fitted(mask: Tensor, x: Tensor) -> Tensor:
    """The mask at the resolution of the state: the share of each cell that is inside."""
    mask = mask.to(x)
    if x.ndim == 4 and mask.shape[-2:] != x.shape[-2:]:
        mask = interpolate(mask, size=x.shape[-2:], mode="area")
    try:
        torch.broadcast_shapes(mask.shape, x.shape)
    except RuntimeError:
        raise InputError(f"a mask {tuple(mask.shape)} does not fit states {tuple(x.shape)}") from None
    return mask


def box(left: float, top: float, right: float, bottom: float, size: tuple[int, int]) -> Tensor:
    """The mask (1, 1, height, width) of a rectangle in shares of the picture: each pixel's covered area."""
    if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
        raise InputError(
            f"a box is left, top, right, bottom with 0 <= left < right <= 1, 0 <= top < bottom <= 1, not {(left, top, right, bottom)}"
        )
    height, width = size

    def covered(low: float, high: float, n: int) -> Tensor:
        edge = torch.arange(n + 1, dtype=torch.float32).clamp(low * n, high * n)
        return edge[1:] - edge[:-1]

    return (covered(top, bottom, height)[:, None] * covered(left, right, width))[None, None]


def regions(n: int, *given: tuple[Tensor, Mapping[str, Any]]) -> dict[str, Any]:
    """Regions as conditions beside those of the n pictures, for :func:`regional`: (mask, conditions) each.

    mask        in [0, 1], of one row or n: (1 or n, 1, H, W) at the resolution of the pictures or of the state, or of any shape
                that broadcasts to states of other kinds
    conditions  tensors of one row or of n
    """
    sets = []
    for mask, conditions in given:
        if not (
            mask.is_floating_point() and mask.ndim > 1 and len(mask) in (1, n) and 0 <= mask.min() <= mask.max() <= 1
        ):
            raise InputError(
                f"a mask is a float tensor in [0, 1] of one row or {n}, not {mask.dtype} {tuple(mask.shape)}"
            )
        rows = {MASK: mask} | dict(conditions)
        sets.append({k: v.expand(n, *v.shape[1:]) if isinstance(v, Tensor) and v.ndim else v for k, v in rows.items()})
    return beside("region", sets)


@register("regional")
def regional(background: float = 0.2, *, batched: bool = True) -> Guidance:
    """Each prompt where its mask is: sum_r w_r belief_r in one call, with the prompt of the whole picture as background.

    With masks m_r and M = max(1, sum_r m_r), region r has the weight w_r = (1 - background) m_r / M, and the background what
    is left: all of it outside the masks, ``background`` inside, where it binds the regions into one picture.

    The regions are in the conditions of the run (:func:`regions`; a pipeline puts them there for ``generate(...,
    regions=[...])``); a condition that a region does not name is the picture's. Guidance goes inside,
    ``regional()(cfg(4.0)(denoiser))``, and guides every region. One full mask and background=0 is that prompt alone; where the
    law factorises over the masks, each part is exactly its own prompt's. Raises InputError without regions.
    Sources: Liu, Li, Du, Torralba, Tenenbaum, 2022, "Compositional Visual Generation with Composable Diffusion Models";
    Bar-Tal, Yariv, Lipman, Dekel, 2023, "MultiDiffusion: Fusing Diffusion Paths for Controlled Image Generation".
    """
    return lambda inner: Regional(inner, background, batched)


__all__ = ["Regional", "box", "regional", "regions"]
