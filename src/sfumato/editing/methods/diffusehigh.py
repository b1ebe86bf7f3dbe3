"""A picture that is too soft for its size, drawn anew with its own structure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sfumato.codecs import Codec
from sfumato.core import Context, Denoiser, InputError, Posterior, Wrapper
from sfumato.editing.base import Method, Task, register
from sfumato.editing.methods.basic import check_strength
from sfumato.editing.wavelets import dwt2, idwt2, low_pass, unsharp


class Structured(Wrapper):
    """In the first ``steps`` steps of a run, the low wavelet band of the believed picture is that of a guide.

    x0 <- encode(iDWT(low band of guide, high bands of decode(x0))). guide: pictures (B, C, H, W) in [-1, 1]
    """

    def __init__(self, inner: Denoiser, guide: Tensor, codec: Codec, steps: int = 5, wavelet: str = "db4") -> None:
        super().__init__(inner)
        self.low, self.size = dwt2(guide, wavelet)[0], (guide.shape[-2], guide.shape[-1])
        self.decode, self.encode, self.steps, self.wavelet = codec.decode, codec.encode, steps, wavelet

    def forward(self, x: Any, t: Any, ctx: Context) -> Posterior:
        post: Posterior = self.inner(x, t, ctx)
        if ctx.run.step >= self.steps:
            return post
        seen = self.decode(post.mean)
        if len(seen) != len(self.low):
            raise InputError("guidance that stacks its inputs goes inside this one, not around it")
        highs = dwt2(seen, self.wavelet)[1]
        return post.but(x0=self.encode(idwt2(self.low.to(seen), highs, self.size, self.wavelet)))


@register("diffusehigh")
@dataclass(frozen=True)
class DiffuseHigh(Method):
    """Detail for an enlarged picture: sharpened, noised to t = strength, and denoised with its low wavelet band held.

        g  = (1 + sharpen) x - sharpen G x,   x_t = alpha encode(g) + sigma eps
        x0 <- encode(iDWT(low band of g, high bands of decode(x0)))   in the first ``structure`` steps

    The image is given at the size that is wanted, already interpolated: ``sf.editing.enlarge`` does that, in stages, from a
    prompt or a small picture. The network must take that size (U-Nets and the DiT here do).

    strength   where the denoising starts; 0.3 is 15 of 50 steps
    structure  steps that hold the band; 0 is SDEdit of the sharpened picture
    sharpen    against the softness of interpolation, which a model would take for the style that is asked for
    sigma      of the 3 x 3 blur that sharpening takes off (the published code draws it from 0.1 to 2 at each call)
    wavelet    'db4' as published; for pictures below 100 pixels 'haar' or 'db2', whose support is shorter

    Source: Kim, Hwang, Zhang, Park, 2025, "DiffuseHigh: Training-free Progressive High-Resolution Image Synthesis through
    Structure Guidance".
    """

    strength: float = 0.3
    structure: int = 5
    sharpen: float = 1.0
    sigma: float = 1.0
    wavelet: str = "db4"

    needs = frozenset()
    accepts = frozenset({"prompt", "source"})

    def __post_init__(self) -> None:
        check_strength(self.strength)
        if self.structure < 0 or not (self.sharpen >= 0 and self.sigma > 0):
            raise InputError(
                f"structure = {self.structure}, sharpen = {self.sharpen}, sigma = {self.sigma}: not negative, sigma positive"
            )
        low_pass(self.wavelet)

    def __call__(self, task: Task) -> Tensor:
        guide = unsharp(task.images.to(task.x0) / 127.5 - 1, self.sharpen, self.sigma)
        ctx = task.context()
        x, _ = task.process.corrupt(task.codec.encode(guide), self.strength, ctx)
        denoiser = Structured(task.guided, guide, task.codec, self.structure, self.wavelet)
        return task.solver.read(task.run(x, denoiser=denoiser, start=self.strength, ctx=ctx))  # type: ignore[return-value]


__all__ = ["DiffuseHigh", "Structured"]
