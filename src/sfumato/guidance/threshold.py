"""Thresholding: a belief about pixels brought back into the range that pixels have."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sfumato.core import Denoiser, Guidance, InputError, Posterior, Wrapper
from sfumato.guidance._registry import register

MODES = ("static", "dynamic")


class Thresholded(Wrapper):
    """See :func:`threshold`. ``pixels`` says that it makes no sense on latents: a pipeline can ask for it."""

    pixels = True

    def __init__(self, inner: Denoiser, mode: str = "dynamic", ratio: float = 0.995, bound: float = 1.0) -> None:
        super().__init__(inner)
        if mode not in MODES:
            raise InputError(f"mode = {mode!r}: one of {', '.join(MODES)}")
        if not (0 < ratio <= 1 and 0 < bound < math.inf):
            raise InputError(f"ratio = {ratio} and bound = {bound}: 0 < ratio <= 1 and a positive bound")
        self.mode, self.ratio, self.bound = mode, ratio, bound

    def forward(self, x: Any, t: Any, ctx: Any) -> Posterior:
        post = self.inner(x, t, ctx)
        if not isinstance(post, Posterior):
            raise InputError(f"a {type(post).__name__} belief has no range of pixels to be clipped to")
        sigma = post.coef.sigma
        if not isinstance(sigma, Tensor) and sigma == 0:  # the state is the data: nothing is believed
            return post
        x0 = post.mean
        if self.mode == "static":
            return post.but(x0=x0.clamp(-self.bound, self.bound))
        size = quantile(x0.flatten(1).abs(), self.ratio).clamp(min=self.bound)
        size = size.view(-1, *[1] * (x0.ndim - 1))
        return post.but(x0=torch.maximum(torch.minimum(x0, size), -size) * (self.bound / size))


def quantile(values: Tensor, ratio: float) -> Tensor:
    """The quantile of each row (B, n), linear between order statistics: of any size and dtype, unlike torch.quantile."""
    ordered = values.sort(1).values
    place = ratio * (values.shape[1] - 1)
    low = math.floor(place)
    high = min(low + 1, values.shape[1] - 1)
    return torch.lerp(ordered[:, low], ordered[:, high], place - low)


@register("threshold")
def threshold(mode: str = "dynamic", *, ratio: float = 0.995, bound: float = 1.0, codec: Any = None) -> Guidance:
    """Keep x0 inside [-bound, bound], item by item; the state stays and eps follows, so every solver has it.

    static   x0 <- clamp(x0, -bound, bound)
    dynamic  s = max(quantile_ratio(|x0|), bound), x0 <- clamp(x0, -s, s) bound / s: a belief that large guidance drove out
             of range keeps its contrasts instead of saturating

    Put it outermost, ``threshold()(cfg(8.0)(denoiser))``: what is thresholded is the guided belief. It is for data with a
    range, and destroys latents: give the pipeline's ``codec`` and any but 'identity' raises InputError. At sigma = 0 the
    belief stays. Source: Saharia et al., 2022, "Photorealistic Text-to-Image Diffusion Models with Deep Language
    Understanding" (dynamic thresholding); Lu et al., 2022, "DPM-Solver++" (both, inside a solver).
    """
    name = getattr(codec, "codec_name", None)
    if codec is not None and name != "identity":
        raise InputError(
            f"the process runs on codes of a {name or type(codec).__name__} codec, which have no range: thresholding is for pixels"
        )
    return lambda inner: Thresholded(inner, mode, ratio, bound)
