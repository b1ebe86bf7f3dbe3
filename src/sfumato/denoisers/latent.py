"""A denoiser with a latent: each call draws one, so the belief it states is a sample and a few large steps have many modes."""

from __future__ import annotations

from typing import Any

import torch

from sfumato.core import Context, Denoiser, InputError, Posterior, Wrapper


class Latent(Wrapper):
    """Tells the inner denoiser a fresh z ~ N(0, I) at each call, as the condition ``name`` (B, size).

    Its x0 is a draw from q(x0 | x_t), not a mean: sample it with 'ddpm', whose kernel is the posterior of the process.
    Source: Xiao, Kreis, Vahdat, 2022, "Tackling the Generative Learning Trilemma with Denoising Diffusion GANs".
    """

    def __init__(self, inner: Denoiser, size: int, name: str = "vector") -> None:
        super().__init__(inner)
        if size < 1:
            raise InputError(f"size = {size}: a latent has one number at least")
        self.size, self.name = size, name

    def forward(self, x: Any, t: Any, ctx: Context) -> Posterior:
        if ctx.rng is None:
            raise InputError("a latent is drawn at each call: give a context with streams, Context.of(batch, seed)")
        z = ctx.rng.normal(torch.empty(len(x), self.size, dtype=x.dtype, device=x.device))
        return self.inner(x, t, ctx.fork(cond={**ctx.cond, self.name: z}))  # type: ignore[no-any-return]
