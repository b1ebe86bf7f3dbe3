"""How the bundled ``digits`` model was made: ``sfumato zoo make digits``, about ten minutes on one core."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sfumato import codecs, conditioners, networks
from sfumato.core import mix
from sfumato.denoisers import Parametrized, parametrized
from sfumato.objectives import Denoising
from sfumato.pipeline import Pipeline
from sfumato.processes import VP
from sfumato.training import Trainer
from sfumato.zoo import sets
from sfumato.zoo.digits import NUMBERS


class DigitBatches:
    """Iteration i -> digits in [-1, 1] (B, 1, 8, 8) and their classes: a pure function of (seed, i)."""

    def __init__(self, size: int, seed: int = 0) -> None:
        found = sets.load("digits", "train")
        assert found.labels is not None
        self.images, self.labels = found.images, found.labels
        self.size, self.seed = size, seed

    def __call__(self, i: int) -> Mapping[str, Any]:
        generator = torch.Generator().manual_seed(mix(self.seed, i) & 0xFFFFFFFF)
        rows = torch.randint(len(self.images), (self.size,), generator=generator)
        return {"x": codecs.to_float(self.images[rows]), "cond": {"y": self.labels[rows]}}


def denoiser() -> Parametrized:
    """A small class-conditional U-Net that predicts eps under VP, untrained."""
    torch.manual_seed(0)
    net = networks.UNet(
        1, width=32, multipliers=(1, 2), blocks=1, attention=(False, True), heads=2, embeddings={"y": 10}
    )
    return parametrized(net, VP(), "eps", null={"y": 10})


def make_digits(out: Path, steps: int = 3000, batch: int = 128) -> Trainer:
    """Train ``digits``: scikit-learn's 8-pixel digits by class."""
    return Trainer(
        Denoising(denoiser(), dropout={"y": 0.15}), DigitBatches(batch), steps=steps, out=out, lr=1e-3, warmup=100,
        decay="cosine", ema=0.999, clip=1.0, save_every=500, config={"model": "digits", "batch": batch},
    )  # fmt: skip


def bundle(player: Parametrized, card: dict[str, Any]) -> Pipeline:
    """The pipeline that is bundled."""
    names = conditioners.Classes({"y": list(NUMBERS)})
    return Pipeline(player, codecs.Identity(1), names, (8, 8), steps=20, guidance=1.5, card=card)
