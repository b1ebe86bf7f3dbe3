"""Pictures by the name of a data set, or from a folder, or from shards: one reader for `train` and `evaluate`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from sfumato.training.data import Dataset


@dataclass(frozen=True)
class Pictures:
    """A set of pictures that is read item by item; ``batch(indices)`` gives "x" uint8 (B, C, H, W) and, where there are
    such, "label" int64 (B,) into ``classes`` and "caption", a list. All pictures have the side that was asked for."""

    dataset: Dataset
    side: int | None
    classes: tuple[str, ...]
    captioned: bool

    def __len__(self) -> int:
        return len(self.dataset)

    def batch(self, indices: Iterable[int]) -> dict[str, Any]:
        """Those items, by field."""
        found: Mapping[str, Any] = self.dataset.batch(indices)
        return {**found, "x": resized(found["x"], self.side)}

    def some(self, number: int | None) -> dict[str, Any]:
        """At most ``number`` items, spread evenly over the whole; None gives all."""
        n = len(self)
        chosen = range(n) if number is None or number >= n else [i * n // number for i in range(number)]
        return self.batch(chosen)

    def captions(self, most: int = 4096) -> list[str]:
        """The different captions, sorted."""
        n = len(self)
        parts = (self.dataset.batch(range(low, min(low + most, n)))["caption"] for low in range(0, n, most))
        return sorted({text for part in parts for text in part})


def pictures(source: str, side: int | None) -> Pictures:
    """The pictures of ``source`` at ``side`` x ``side`` pixels (None: as they are; a folder needs a side).

    ``source`` is a folder of pictures, a folder of shards, or NAME or NAME:SPLIT of a data set that `sfumato data`
    knows. Raises InputError and FileNotFoundError that say what was looked for.
    """
    from sfumato.training.data import ImageFolder, Shards

    folder = Path(source)
    if (folder / "index.json").is_file() and (folder / "00000.safetensors").is_file():
        shards = Shards(folder)
        return Pictures(shards, side, (), "caption" in shards.batch([0]))
    if folder.is_dir():
        found = ImageFolder(folder, side or 64)
        return Pictures(found, None, tuple(found.classes), bool(found.captions))
    return _of_name(source, side)


def _of_name(source: str, side: int | None) -> Pictures:
    from sfumato.core.errors import UnknownName
    from sfumato.training.data import Arrays
    from sfumato.zoo import sets

    name, _, split = source.partition(":")
    try:
        found = sets.load(name, split or None)
    except UnknownName as error:
        raise FileNotFoundError(
            f"{source!r} is no folder and no data set; the data sets: {', '.join(sets.names())}"
        ) from error
    fields = {"x": found.images, "label": found.labels, "caption": found.captions}
    return Pictures(
        Arrays({k: v for k, v in fields.items() if v is not None}),
        side,
        tuple(found.classes),
        found.captions is not None,
    )


def resized(images: Tensor, side: int | None) -> Tensor:
    """uint8 (N, C, H, W) at side x side, by antialiased bicubic interpolation, saturating at 0 and 255."""
    import torch

    if side is None or tuple(images.shape[-2:]) == (side, side):
        return images
    parts = []
    for part in images.split(256):
        small = torch.nn.functional.interpolate(part.float(), (side, side), mode="bicubic", antialias=True)
        parts.append(small.round().clamp(0, 255).to(torch.uint8))
    return torch.cat(parts)
