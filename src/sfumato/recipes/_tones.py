"""People and hands drawn in a light and in a dark skin tone: an attribute with its truth, and independent eyes for it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sfumato.recipes._emoji import Judge
from sfumato.zoo import emoji

VENDORS = ("noto", "twemoji")


class People(NamedTuple):
    """light, dark  uint8 (N, 3, 32, 32), the same subjects; noto bool (N,): by that vendor, else twemoji; subject (N,)."""

    light: Tensor
    dark: Tensor
    noto: Tensor
    subject: Tensor

    def select(self, rows: slice) -> People:
        """Some of them."""
        return People(*(part[rows] for part in self))

    @property
    def both(self) -> Tensor:
        """All light ones, then all dark ones."""
        return torch.cat([self.light, self.dark])

    @property
    def labels(self) -> Tensor:
        """Whether each of ``both`` is dark."""
        return torch.arange(2 * len(self.light)) >= len(self.light)


def people(split: str, n: int, seed: int) -> People:
    """n drawings of each tone, half of each vendor, the order drawn by ``seed``."""
    items = emoji.load(32, vendors=VENDORS, split=split)
    found: dict[tuple[str, int], dict[str, int]] = {}
    for row, (concept, vendor) in enumerate(zip(items.concept.tolist(), items.vendor.tolist(), strict=True)):
        about = items.concepts[concept]
        if about.tone in ("light", "dark"):
            found.setdefault((about.base, vendor), {})[about.tone] = row
    whole = {key: rows for key, rows in found.items() if len(rows) == 2}
    subjects = {base: i for i, base in enumerate(sorted({base for base, _ in whole}))}
    draw, halves = torch.Generator().manual_seed(seed), []
    for vendor in range(2):
        keys = [key for key in whole if key[1] == vendor]
        halves.append([keys[i] for i in torch.randperm(len(keys), generator=draw).tolist()[: n // 2]])
    chosen = [key for pair in zip(*halves, strict=True) for key in pair]
    light, dark = (torch.tensor([whole[key][tone] for key in chosen]) for tone in ("light", "dark"))
    return People(
        items.images[light], items.images[dark], torch.tensor([key[1] == 0 for key in chosen]),
        torch.tensor([subjects[key[0]] for key in chosen]),
    )  # fmt: skip


class Eyes:
    """What the judge sees: the tone by a probe fitted to drawings, the vendor by its own head, and who it is."""

    def __init__(self, drawings: People) -> None:
        from sklearn.linear_model import LogisticRegression

        self.judge: Any = Judge()
        probe = LogisticRegression(C=10.0, max_iter=2000).fit(
            self.judge(drawings.both).numpy(), drawings.labels.numpy()
        )
        self.weights, self.bias = torch.tensor(probe.coef_[0]).float(), float(probe.intercept_[0])

    def tone(self, images: Tensor) -> Tensor:
        """Log odds of dark against light (N,)."""
        return self.judge(images) @ self.weights + self.bias

    def dark(self, images: Tensor) -> float:
        """The share that is seen as dark."""
        return float((self.tone(images) > 0).double().mean())

    def turned(self, images: Tensor, sources: Tensor) -> float:
        """The share that is seen as dark and still recognised."""
        return float(((self.tone(images) > 0) & self._own(images, sources)).double().mean())

    @torch.no_grad()
    def vendor(self, images: Tensor) -> Tensor:
        """Log odds of noto against twemoji (N,)."""
        logits = self.judge.encoder.classify(self.judge(images))["vendor"]
        return logits[:, emoji.VENDORS.index("noto")] - logits[:, emoji.VENDORS.index("twemoji")]

    def kept(self, images: Tensor, sources: Tensor) -> float:
        """The share whose nearest source is their own."""
        return float(self._own(images, sources).double().mean())

    def _own(self, images: Tensor, sources: Tensor) -> Tensor:
        return (self.judge(images) @ self.judge(sources).T).argmax(1) == torch.arange(len(images))


def change(images: Tensor, before: Tensor) -> Tensor:
    """Root mean square difference of each image (N,), in grey levels."""
    return (images.float() - before.float()).flatten(1).square().mean(1).sqrt()


__all__ = ["Eyes", "People", "change", "people"]
