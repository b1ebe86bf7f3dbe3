"""The bundled emoji: three families, captions and keywords, and a split into seen, partly seen and unseen concepts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor

from sfumato.core.errors import InputError

VENDORS = ("noto", "twemoji", "fluent")
SPLITS = ("train", "unseen", "heldout-vendor", "all")
CELL, COLUMNS = 64, 16
SHEET = 512  # cells a sheet: smallest files of 512, 1,024, 2,048 and all in one


@dataclass(frozen=True)
class Concept:
    """One emoji, whoever draws it.

    ``key`` is its Unicode sequence (``"1F44B-1F3FD"``), ``base`` that of the emoji without skin tone (itself if it has
    none), ``tone`` a word such as ``"medium-dark"`` (``"light and dark"`` for two people) or None. ``split`` is
    ``"train"``, ``"unseen"`` (no vendor's drawing is ever trained on) or ``"partial"`` (all but the drawing of
    ``held_out``); ``group`` is the key that decides it, so concepts that are drawn alike lie on the same side."""

    key: str
    name: str
    caption: str
    tags: tuple[str, ...]
    category: str
    subcategory: str
    base: str
    tone: str | None
    vendors: tuple[str, ...]
    split: str
    held_out: str | None
    group: str


@dataclass(frozen=True)
class EmojiSet:
    """N pictures. ``images`` is uint8 (N, 3, size, size); ``vendor`` indexes ``vendors``, ``concept`` indexes
    ``concepts`` (always all of them, so indices agree between sets) and ``category`` indexes ``categories``; all are
    int64 (N,)."""

    images: Tensor
    captions: list[str]
    tags: list[tuple[str, ...]]
    vendor: Tensor
    concept: Tensor
    category: Tensor
    concepts: tuple[Concept, ...]
    categories: tuple[str, ...]
    vendors: tuple[str, ...] = VENDORS

    def __len__(self) -> int:
        return len(self.captions)

    def select(self, rows: Sequence[int] | Tensor) -> EmojiSet:
        """The pictures at these positions (or where a boolean mask is true), in this order."""
        index = torch.as_tensor(rows)
        index = index.nonzero()[:, 0] if index.dtype == torch.bool else index.long()
        kept = index.tolist()
        return EmojiSet(
            self.images[index], [self.captions[i] for i in kept], [self.tags[i] for i in kept],
            self.vendor[index], self.concept[index], self.category[index], self.concepts, self.categories,
        )  # fmt: skip

    def pairs(self, first: str, second: str) -> Tensor:
        """Positions (P, 2) of the same concept drawn by two vendors: aligned data for image-to-image translation."""
        a, b = self._rows(first), self._rows(second)
        return torch.tensor([[a[c], b[c]] for c in sorted(a.keys() & b.keys())], dtype=torch.int64).reshape(-1, 2)

    def _rows(self, vendor: str) -> dict[int, int]:
        rows = (self.vendor == _vendor(vendor)).nonzero()[:, 0]
        return dict(zip(self.concept[rows].tolist(), rows.tolist(), strict=True))


def _vendor(name: str) -> int:
    if name not in VENDORS:
        raise InputError(f"no emoji vendor {name!r}: choose from {', '.join(VENDORS)}")
    return VENDORS.index(name)


@cache
def concepts() -> tuple[Concept, ...]:
    """All 3,786 concepts in the order of the sheets: by category, each base followed by its skin tones."""
    records = json.loads(_read("index.json"))
    bases = {r["key"]: r for r in records if "base" not in r}
    out = []
    for own in records:
        base = bases[own.get("base", own["key"])]
        out.append(
            Concept(
                own["key"],
                base["name"],
                own["caption"],
                tuple(base["tags"]),
                base["category"],
                base["subcategory"],
                base["key"],
                own.get("tone"),
                tuple(own["vendors"]),
                base["split"],
                base.get("held_out"),
                base.get("group", base["key"]),
            )  # fmt: skip
        )
    return tuple(out)


@cache
def categories() -> tuple[str, ...]:
    """The ten Unicode categories, in alphabetical order."""
    return tuple(sorted({c.category for c in concepts()}))


def card() -> dict[str, Any]:
    """Origin, licences, counts and the building command of the bundled set."""
    return json.loads(_read("card.json"))


def _read(name: str) -> bytes:
    return (files("sfumato.zoo") / "data" / "emoji" / name).read_bytes()


def _cells(vendor: str, background: Sequence[int]) -> Any:
    """One vendor's pictures on an opaque background, (n, 64, 64, 3) uint8 in the order of ``concepts()`` (the last row
    may be padded)."""
    import io

    import numpy as np
    from PIL import Image

    count = sum(vendor in concept.vendors for concept in concepts())
    parts = []
    for number in range(-(-count // SHEET)):
        sheet = Image.open(io.BytesIO(_read(f"{vendor}-{number}.webp"))).convert("RGBA")
        ground = Image.new("RGBA", sheet.size, (*background, 255))
        pixels = np.asarray(Image.alpha_composite(ground, sheet).convert("RGB"))
        parts.append(pixels.reshape(-1, CELL, COLUMNS, CELL, 3).swapaxes(1, 2).reshape(-1, CELL, CELL, 3))
    return np.concatenate(parts)


def _wanted(concept: Concept, vendor: str, split: str, skin_tones: bool) -> bool:
    if vendor not in concept.vendors or (concept.tone is not None and not skin_tones):
        return False
    if split == "train":
        return concept.split != "unseen" and concept.held_out != vendor
    return (
        split == "all"
        or (split == "unseen" and concept.split == "unseen")
        or (split == "heldout-vendor" and concept.held_out == vendor)
    )


def _shrunk(cells: Any, size: int) -> Any:
    """(N, 64, 64, 3) to (N, size, size, 3) by Lanczos.

    The pictures are already composited: resizing is linear with weights that sum to one, so this equals resizing
    premultiplied colours and compositing after (up to rounding), and no colour of a transparent pixel can bleed in."""
    import numpy as np
    from PIL import Image

    if size == CELL:
        return cells
    small = [np.asarray(Image.fromarray(cell).resize((size, size), Image.Resampling.LANCZOS)) for cell in cells]
    return np.stack(small) if small else np.empty((0, size, size, 3), np.uint8)


def _check(size: int, vendors: Sequence[str], split: str, background: Sequence[int]) -> None:
    if not isinstance(size, int) or not 1 <= size <= CELL:
        raise InputError(f"size is {size!r}: the bundled emoji are {CELL} pixels, give a whole number from 1 to {CELL}")
    if isinstance(vendors, str) or not vendors or len(set(vendors)) != len(vendors):
        raise InputError(f"vendors is {vendors!r}: give a tuple of different names from {', '.join(VENDORS)}")
    for name in vendors:
        _vendor(name)
    if split not in SPLITS:
        raise InputError(f"no emoji split {split!r}: choose from {', '.join(SPLITS)}")
    if len(background) != 3 or not all(isinstance(v, int) and 0 <= v <= 255 for v in background):
        raise InputError(f"background is {background!r}: give three whole numbers from 0 to 255 (red, green, blue)")


def load(
    size: int = 64,
    *,
    vendors: Sequence[str] = VENDORS,
    split: str = "train",
    skin_tones: bool = True,
    background: Sequence[int] = (255, 255, 255),
) -> EmojiSet:
    """Emoji on an opaque background, as uint8 (N, 3, size, size) with captions.

    ``split``: ``"train"`` leaves out unseen concepts and, of partial concepts, the held-out vendor's drawing;
    ``"unseen"`` is every vendor's drawing of the unseen concepts; ``"heldout-vendor"`` is exactly the held-out
    drawings; ``"all"`` is everything. Pictures are ordered by vendor, then as in ``concepts()``. Raises InputError for
    a size outside 1..64, an unknown vendor or split, or a bad background."""
    import numpy as np

    _check(size, vendors, split, background)
    listing = concepts()
    pictures, vendor, concept = [], [], []
    for name in vendors:
        held = [i for i, c in enumerate(listing) if name in c.vendors]
        chosen = [(cell, i) for cell, i in enumerate(held) if _wanted(listing[i], name, split, skin_tones)]
        pictures.append(_shrunk(_cells(name, background)[[cell for cell, _ in chosen]], size))
        vendor += [_vendor(name)] * len(chosen)
        concept += [i for _, i in chosen]
    images = torch.from_numpy(np.concatenate(pictures)).permute(0, 3, 1, 2).contiguous()
    names = categories()
    return EmojiSet(
        images, [listing[i].caption for i in concept], [listing[i].tags for i in concept],
        torch.tensor(vendor, dtype=torch.int64), torch.tensor(concept, dtype=torch.int64),
        torch.tensor([names.index(listing[i].category) for i in concept], dtype=torch.int64), listing, names,
    )  # fmt: skip
