"""What recipes on small data share: handwritten digits as vectors, and a training that takes seconds."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Digits(NamedTuple):
    """scikit-learn's 1,797 digits of 8 x 8: x (N, 64) in [-1, 1], labels (N,), and whether an item is unseen (N,).

    Every third item is: writers follow each other in the table, so all of them are in both parts.
    """

    x: Tensor
    labels: Tensor
    unseen: Tensor


def digits() -> Digits:
    """The table in its own order."""
    from sfumato.zoo import sets

    parts = [sets.load("digits", split) for split in ("train", "test")]
    images, labels = torch.cat([p.images for p in parts]), torch.cat([p.labels for p in parts])  # type: ignore[misc]
    return Digits(images.flatten(1).float() / 127.5 - 1, labels, torch.arange(len(labels)) % 3 == 2)


def pictures(x: Tensor) -> Tensor:
    """Vectors (N, 64) as the images (N, 1, 8, 8) uint8 that are shown and measured."""
    return ((x.reshape(-1, 1, 8, 8) + 1) * 127.5).clamp(0, 255).round().to(torch.uint8)


def learn(objective: Any, fields: dict[str, Tensor], seed: int, *, steps: int, size: int = 256, lr: float = 2e-3, **options: Any) -> Any:
    """The player 'denoiser' of an objective, taught on the CPU with AdamW, a warm-up and a cosine decay; weights averaged."""
    from sfumato.training import Trainer
    from sfumato.training.data import Arrays, Batches

    data = Batches(Arrays(fields), size, seed, **options)
    trainer = Trainer(
        objective, data, steps=steps, lr=lr, warmup=50, decay="cosine", ema=0.99, seed=seed, cpu=True, progress=False
    )
    return trainer.fit()["denoiser"]
