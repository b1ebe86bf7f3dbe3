"""Edits whose truth is known: pairs of emoji that differ by one thing, with words for both and a mask of the difference."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sfumato.core.errors import InputError
from sfumato.zoo import emoji

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "brown")
COLOURED = ("heart", "circle", "square")
ATTRIBUTES = (
    ("cloud", "cloud with rain"),
    ("cloud", "cloud with snow"),
    ("cloud with rain", "cloud with lightning and rain"),
    ("bell", "bell with slash"),
    ("cat", "black cat"),
    ("grinning cat", "smiling cat with heart-eyes"),
    ("grinning face", "grinning face with sweat"),
    ("neutral face", "face without mouth"),
    ("smiling face with smiling eyes", "smiling face with halo"),
    ("smiling face with smiling eyes", "smiling face with hearts"),
    ("face with open mouth", "face with open eyes and hand over mouth"),
    ("smiling face with sunglasses", "smiling face"),
    ("snowman without snow", "snowman"),
    ("closed mailbox with lowered flag", "closed mailbox with raised flag"),
    ("open mailbox with lowered flag", "open mailbox with raised flag"),
    ("winking face", "winking face with tongue"),
)
KINDS = ("tone", "vendor", "colour", "attribute")


@dataclass(frozen=True)
class Edits:
    """N edits of one kind.

    before, after        uint8 (N, 3, size, size): what is given and what the edit should become
    source, target       a text each
    source_cond, cond    {"vendor": [a name an edit]}
    mask                 (N, 1, size, size) in {0, 1}: where the true pair differs, and a margin around it
    """

    kind: str
    before: Tensor
    after: Tensor
    source: list[str]
    target: list[str]
    source_cond: dict[str, list[str]]
    cond: dict[str, list[str]]
    mask: Tensor

    def __len__(self) -> int:
        return len(self.source)

    def select(self, rows: Sequence[int]) -> Edits:
        """These edits, in this order."""
        index = torch.tensor(list(rows))

        def pick(values: Sequence[str]) -> list[str]:
            return [values[i] for i in rows]

        return Edits(
            self.kind, self.before[index], self.after[index], pick(self.source), pick(self.target),
            {k: pick(v) for k, v in self.source_cond.items()}, {k: pick(v) for k, v in self.cond.items()}, self.mask[index],
        )  # fmt: skip


def load(kind: str, n: int | None = None, size: int = 64, split: str | None = None, seed: int = 0) -> Edits:
    """Pairs of one kind, ``n`` of them drawn without replacement by ``seed`` (default: all).

    tone       the same person or hand with another skin tone (one of five, or none)
    vendor     the same concept drawn by another vendor; the mask is everything
    colour     a heart, circle or square of another colour
    attribute  something added or taken away: rain, a halo, a raised flag

    ``split`` is where both drawings are from: "unseen" (no bundled model was trained on them) for tone and vendor, "all"
    for colour and attribute, of which there are too few to hold any out. Raises InputError for another kind or split.
    """
    if kind not in KINDS:
        raise InputError(f"no kind of edit {kind!r}: one of {', '.join(KINDS)}")
    items = emoji.load(size, split=split or ("unseen" if kind in ("tone", "vendor") else "all"))
    pairs = PAIRS[kind](items)
    if n is not None:
        if not 1 <= n <= len(pairs):
            raise InputError(f"n = {n}: there are {len(pairs)} edits of kind {kind!r} here")
        order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed)).tolist()
        pairs = [pairs[i] for i in order[:n]]
    first, second = (torch.tensor([pair[side] for pair in pairs]) for side in (0, 1))
    before, after = items.images[first], items.images[second]
    texts = [[items.captions[i] for i in side.tolist()] for side in (first, second)]
    vendors = [{"vendor": [emoji.VENDORS[v] for v in items.vendor[side].tolist()]} for side in (first, second)]
    mask = torch.ones_like(before[:, :1]).float() if kind == "vendor" else difference(before, after)
    return Edits(kind, before, after, texts[0], texts[1], vendors[0], vendors[1], mask)


def difference(before: Tensor, after: Tensor, threshold: int = 24, margin: int = 2) -> Tensor:
    """(N, 1, H, W) in {0, 1}: pixels of which a channel differs by more than ``threshold``, grown by ``margin``."""
    apart = ((before.int() - after.int()).abs().amax(1, keepdim=True) > threshold).float()
    return torch.nn.functional.max_pool2d(apart, 2 * margin + 1, stride=1, padding=margin)


def _by_name(items: emoji.EmojiSet) -> dict[tuple[str, int], int]:
    return {(c, v): i for i, (c, v) in enumerate(zip(items.captions, items.vendor.tolist(), strict=True))}


def _tones(items: emoji.EmojiSet) -> list[tuple[int, int]]:
    """Each toned drawing to the next tone of the same person, in the order of the concepts; the last to the first."""
    families: dict[tuple[str, int], list[int]] = {}
    for i, (c, v) in enumerate(zip(items.concept.tolist(), items.vendor.tolist(), strict=True)):
        concept = items.concepts[c]
        if concept.tone is None or " and " not in concept.tone:
            families.setdefault((concept.base, v), []).append(i)
    pairs = []
    for rows in families.values():
        pairs += [(a, rows[(i + 3) % len(rows)]) for i, a in enumerate(rows) if len(rows) > 3]
    return pairs


def _vendors(items: emoji.EmojiSet) -> list[tuple[int, int]]:
    pairs = []
    for first in emoji.VENDORS:
        for second in emoji.VENDORS:
            if first != second:
                pairs += [
                    (a, b)
                    for a, b in items.pairs(first, second).tolist()
                    if items.concepts[int(items.concept[a])].tone is None
                ]
    return pairs


def _colours(items: emoji.EmojiSet) -> list[tuple[int, int]]:
    rows = _by_name(items)
    return [
        (rows[f"{a} {thing}", v], rows[f"{b} {thing}", v])
        for thing in COLOURED
        for a in COLOURS
        for b in COLOURS
        for v in range(len(emoji.VENDORS))
        if a != b and (f"{a} {thing}", v) in rows and (f"{b} {thing}", v) in rows
    ]


def _attributes(items: emoji.EmojiSet) -> list[tuple[int, int]]:
    rows = _by_name(items)
    both = [*ATTRIBUTES, *((b, a) for a, b in ATTRIBUTES)]
    vendors = range(len(emoji.VENDORS))
    return [(rows[a, v], rows[b, v]) for a, b in both for v in vendors if (a, v) in rows and (b, v) in rows]


PAIRS: Mapping[str, Callable[[Any], list[tuple[int, int]]]] = {
    "tone": _tones, "vendor": _vendors, "colour": _colours, "attribute": _attributes,
}  # fmt: skip


__all__ = ["KINDS", "Edits", "difference", "load"]
