"""Words for emoji: which texts a model hears while it trains, and their sentence features, computed once and cached."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sfumato.files import cache_folder
from sfumato.networks import EmbeddingTable, SentenceEncoder
from sfumato.zoo.emoji import EmojiSet, load

TOKENS = 16
TABLE = "emoji-captions.safetensors"
DEMO_PROMPTS = (
    "puppy",
    "happy face",
    "crimson heart",
    "red heart",
    "cat",
    "pizza",
    "rocket",
    "tree",
    "smiling sun",
    "blue car",
)
NEVER_HEARD = ("puppy", "crimson", "happy face")
"""Kept out of every training text, so that the demo's prompts really are new words."""


def texts_of(caption: str, tags: Sequence[str]) -> list[str]:
    """The texts that may stand for one emoji in training: its caption first, then its tags, without the kept-out words."""
    texts = [caption, *tags]
    return [t for i, t in enumerate(texts) if i == 0 or not any(word in t for word in NEVER_HEARD)]


@dataclass
class TextBank:
    """Features of all training texts; row choices are made by the training's own streams.

    tokens (T, L, 384) and pooled (T, 384) float16, mask (T, L); ``options[i]`` are the rows that may stand for item i.
    """

    tokens: Tensor
    mask: Tensor
    pooled: Tensor
    options: list[list[int]]

    def conditions(self, rows: Tensor) -> dict[str, Tensor]:
        """The conditions ``text``, ``text_mask`` and ``vector`` of these rows."""
        return conditions(self.tokens[rows].float(), self.mask[rows], self.pooled[rows].float())

    def choose(self, items: Tensor, generator: torch.Generator, caption: float = 0.7) -> Tensor:
        """A row for each item: its caption with probability ``caption``, otherwise one of its tags."""
        u = torch.rand(len(items), 2, generator=generator)
        rows = []
        for item, (first, second) in zip(items.tolist(), u.tolist(), strict=True):
            options = self.options[item]
            alone = len(options) == 1 or first < caption
            rows.append(options[0] if alone else options[1 + int(second * (len(options) - 1))])
        return torch.tensor(rows)


def conditions(tokens: Tensor, mask: Tensor, pooled: Tensor) -> dict[str, Tensor]:
    """Network conditions from sentence features: the pooled vector is scaled to entries of variance about 1."""
    return {"text": tokens, "text_mask": mask, "vector": pooled * pooled.shape[-1] ** 0.5}


def bank(items: EmojiSet) -> TextBank:
    """The text bank of a set of emoji, from the cache if these texts were encoded before."""
    texts = [texts_of(caption, tags) for caption, tags in zip(items.captions, items.tags, strict=True)]
    unique = sorted({t for options in texts for t in options})
    digest = hashlib.sha256("\n".join(unique).encode()).hexdigest()[:16]
    path = Path(cache_folder()) / f"emoji-texts-{TOKENS}-{digest}.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        EmbeddingTable.of(SentenceEncoder(), unique, TOKENS).save(path)
    table = EmbeddingTable.load(path)
    row = {t: i for i, t in enumerate(table.captions)}
    return TextBank(*table.features, [[row[t] for t in options] for options in texts])


def table_path() -> Path:
    """Where the bundled table of caption features is."""
    return Path(__file__).parent / "data" / TABLE


def bundled_table(out: Path) -> Path:
    """Write the table of caption features that comes with the package: every concept without skin tone, and the demo's
    prompts, so that those need no text encoder."""
    concepts = load(32, split="all").concepts
    texts = [c.caption for c in concepts if c.tone is None]
    EmbeddingTable.of(SentenceEncoder(), [*texts, *DEMO_PROMPTS], TOKENS).save(out)
    return out
