"""What recipes on the bundled emoji models share: prompts, drawings to compare with, and the judge's features."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import sfumato as sf
from sfumato.evaluation.metrics import frechet_distance
from sfumato.zoo import emoji
from sfumato.zoo.encoders import embed_images, load_encoder
from sfumato.zoo.score_emoji import one_a_concept

JUDGE = "emoji-judge"


@dataclass(frozen=True)
class Bench:
    """A bundled text-to-emoji model and n prompts, one a concept, with the drawings the prompts belong to.

    ``cond`` is what the network reads; ``drawings`` (n, 3, H, W) and ``captions`` the items; ``shape`` of the states.
    """

    pipeline: Any
    drawings: Tensor
    captions: list[str]
    vendors: list[str]
    cond: dict[str, Any]
    seed: int

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, *) of the states."""
        return (len(self.captions), *self.pipeline.codec.shape(*self.pipeline.size))

    @torch.no_grad()
    def draw(self, denoiser: Any = None, **options: Any) -> Tensor:
        """States at t = 0 from the bench's noise: DDIM, in chunks; ``denoiser`` is the pipeline's unless given."""
        denoiser = self.pipeline.denoiser if denoiser is None else denoiser
        settings: dict[str, Any] = {
            "solver": "ddim", "grid": self.pipeline.grid, "shape": self.shape, "cond": self.cond, "seed": self.seed, "batch": 64,
        }  # fmt: skip
        return sf.sample(denoiser, **{**settings, **options})

    def images(self, x: Tensor) -> Tensor:
        """uint8 pictures of states."""
        with torch.no_grad():
            return torch.cat([self.pipeline.codec.images(part) for part in x.split(64)])


def bench(model: str, n: int, seed: int, split: str = "train") -> Bench:
    """``n`` concepts without skin tone, each by one of its vendors, drawn by ``seed``."""
    pipeline = sf.load(model)
    items = emoji.load(pipeline.size[0], split=split, skin_tones=False)
    chosen = items.select(one_a_concept(items, n, seed))
    vendors = [emoji.VENDORS[v] for v in chosen.vendor.tolist()]
    cond = pipeline.conditions(n, chosen.captions, vendor=vendors)
    return Bench(pipeline, chosen.images, chosen.captions, vendors, cond, seed)


class Judge:
    """The encoder that nothing was trained or guided with: features of pictures, and distances between sets of them."""

    def __init__(self) -> None:
        self.encoder: Any = load_encoder(JUDGE)

    def __call__(self, images: Tensor) -> Tensor:
        """(N, 128) unit vectors of uint8 pictures."""
        return embed_images(self.encoder, images)

    def frechet(self, images: Tensor, reference: Tensor, components: int = 32) -> float:
        """Fréchet distance of pictures to a reference set, in the reference's first principal components of its features."""
        ours, theirs = self(images).double(), self(reference).double()
        _, _, directions = torch.linalg.svd(theirs - theirs.mean(0), full_matrices=False)
        return float(frechet_distance(ours @ directions[:components].T, theirs @ directions[:components].T).value)

    @torch.no_grad()
    def agreement(self, images: Tensor, vector: Tensor) -> Tensor:
        """Cosine of each picture with its caption (N,), given as the condition ``vector``."""
        return (self(images) * self.encoder.text(vector)).sum(1)


def rms(x: Tensor, y: Tensor) -> float:
    """Root mean square difference of states."""
    return float((x - y).square().mean().sqrt())


def seconds(runs: dict[str, Callable[[], Any]], times: int = 5) -> dict[str, float]:
    """Median seconds of each run, in turns."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(times):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            taken[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in taken.items()}


__all__ = ["JUDGE", "Bench", "Judge", "bench", "rms", "seconds"]
