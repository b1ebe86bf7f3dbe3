"""What recipes on small data share: handwritten digits as vectors, and a training that takes seconds."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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


def learn(
    objective: Any,
    fields: dict[str, Tensor],
    seed: int,
    *,
    steps: int,
    size: int = 256,
    lr: float = 2e-3,
    **options: Any,
) -> Any:
    """The first player of an objective, taught on the CPU with AdamW, a warm-up and a cosine decay; weights averaged."""
    from sfumato.training import Trainer
    from sfumato.training.data import Arrays, Batches

    data = Batches(Arrays(fields), size, seed, **options)
    trainer = Trainer(
        objective, data, steps=steps, lr=lr, warmup=50, decay="cosine", ema=0.99, seed=seed, cpu=True, progress=False
    )
    return next(iter(trainer.fit().values()))


class Judge:
    """A classifier of digits (N, 64) in [-1, 1] or as uint8 pictures, fitted here; its last 32 features are for measuring."""

    def __init__(self, x: Tensor, labels: Tensor, seed: int, steps: int = 300) -> None:
        torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Linear(64, 128), nn.SiLU(), nn.Linear(128, 32), nn.SiLU())
        self.head = nn.Linear(32, 10)
        optimizer = torch.optim.AdamW([*self.body.parameters(), *self.head.parameters()], lr=3e-3, weight_decay=0.1)
        with torch.enable_grad():
            for _ in range(steps):
                optimizer.zero_grad()
                F.cross_entropy(self.head(self.body(x + 0.2 * torch.randn_like(x))), labels).backward()
                optimizer.step()

    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        """(N, 32)."""
        return self.body(x.flatten(1) if x.is_floating_point() else x.flatten(1).float() / 127.5 - 1)  # type: ignore[no-any-return]

    @torch.no_grad()
    def logits(self, x: Tensor) -> Tensor:
        """(N, 10)."""
        return self.head(self.features(x))  # type: ignore[no-any-return]

    def accuracy(self, x: Tensor, labels: Tensor) -> float:
        """The share of digits that are read as what they are."""
        return float((self.logits(x).argmax(1) == labels).float().mean())
