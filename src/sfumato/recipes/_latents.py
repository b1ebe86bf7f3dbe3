"""What recipes that teach the bundled latent model a little more share: its latents, a fine-tuning, a held-out loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import sfumato as sf
from sfumato.core import Context, Streams, mix
from sfumato.denoisers.features import network
from sfumato.guidance import cfg
from sfumato.objectives.distill.imitation import Imitation
from sfumato.recipes._emoji import bench
from sfumato.training import Trainer
from sfumato.training.data import Arrays, Batches

TIMES = (0.125, 0.375, 0.625, 0.875)


class Bed:
    """The bundled denoiser, latents x of trained and y of held-out drawings, fine-tuning and the measures of its result."""

    def __init__(self, seed: int, known: int = 1280, unseen: int = 160) -> None:
        self.seed, self.known = seed, bench("emoji-latent", known, seed)
        self.unseen = bench("emoji-latent", unseen, seed, "heldout-vendor")
        with torch.no_grad():
            encode = self.known.pipeline.codec.encode
            self.x, self.y = (torch.cat([encode(p) for p in b.drawings.split(64)]) for b in (self.known, self.unseen))
        self.base = self.known.pipeline.denoiser
        self.net: Any = network(self.base)
        self.noise = [Streams.of(mix(seed, k), len(self.y)).normal(self.y) for k in range(len(TIMES))]

    def tuned(self, net: nn.Module, updates: int, size: int = 32, lr: float = 1e-3) -> Any:
        """The network as a denoiser, taught to say what the bundled one says, on the same batches as every other."""
        denoiser = sf.parametrized(
            net.requires_grad_(True).train(), self.base.process, self.base.predicts, null=self.base.null
        )
        cond = self.known.cond
        data = Batches(Arrays({"x": self.x, **cond}), size, self.seed, cond=tuple(cond))
        options: dict[str, Any] = {"warmup": 10, "decay": "cosine", "ema": 0.9, "cpu": True, "progress": False}
        trainer = Trainer(Imitation(denoiser, self.base), data, steps=updates, lr=lr, seed=self.seed, **options)
        return next(iter(trainer.fit().values())).eval().requires_grad_(False)

    @torch.no_grad()
    def losses(self, denoiser: Any, taps: Any = ()) -> Tensor:
        """Denoising loss on the held-out drawings at each of TIMES, with the same noise for everybody."""
        found = []
        for t, noise in zip(TIMES, self.noise, strict=True):
            ctx = Context.of(len(self.y), cond=self.unseen.cond, taps=tuple(taps))
            x, _ = denoiser.process.corrupt(self.y, t, ctx, noise=noise)
            target = denoiser.process.target(self.base.predicts, self.y, noise, t)
            found.append((denoiser(x, t, ctx).native - target).square().mean())
        return torch.stack(found)

    def samples(self, denoiser: Any, n: int, steps: int) -> Tensor:
        """Guided samples for the first n of the trained prompts."""
        b = self.known
        options = {"shape": (n, *b.shape[1:]), "cond": {k: v[:n] for k, v in b.cond.items()}, "grid": "uniform"}
        return b.draw(cfg(b.pipeline.guidance)(denoiser), steps=steps, **options)


__all__ = ["TIMES", "Bed"]
