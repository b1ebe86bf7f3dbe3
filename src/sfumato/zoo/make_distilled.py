"""How the bundled few-step emoji models were made: trajectories of the guided teacher, then students of its segments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato import grids
from sfumato.core import mix
from sfumato.pipeline import load
from sfumato.training.trajectories import Trajectories
from sfumato.zoo import captions, emoji
from sfumato.zoo.make_emoji import SKIN_TONE_WEIGHT, VENDORS

TEACHER, GUIDANCE = "emoji-latent", 3.0
TIMES = (1.0, 0.9, 0.75, 0.6, 0.45, 0.3, 0.16, 0.06, 0.0)  # of the teacher; the student takes every second
PART = 8192  # trajectories a folder
UNNAMED, SILENT = 0.15, 0.03  # how often no vendor, and no text, is asked for


class Requests:
    """indices -> what is asked for: a drawing of the training split, one of its texts, its vendor. Each index has its own draws."""

    def __init__(self, seed: int = 0) -> None:
        items = emoji.load(64, split="train")
        self.items, self.bank, self.seed = items, captions.bank(items), seed
        toned = torch.tensor([items.concepts[c].tone is not None for c in items.concept.tolist()])
        self.cumulative = torch.where(toned, SKIN_TONE_WEIGHT, 1.0).double().cumsum(0)

    def __call__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        rows, texts, vendors, silent = [], [], [], []
        for index in indices:
            generator = torch.Generator().manual_seed(mix(self.seed, index) & 0xFFFFFFFF)
            u = torch.rand(3, generator=generator, dtype=torch.float64)
            row = torch.searchsorted(self.cumulative, u[:1] * self.cumulative[-1])
            rows.append(row)
            texts.append(self.bank.choose(row, generator))
            silent.append(bool(u[1] < SILENT))
            vendors.append(VENDORS if u[2] < UNNAMED else int(self.items.vendor[row]))
        cond = self.bank.conditions(torch.cat(texts))
        spoken = ~torch.tensor(silent)
        cond = {
            "text": cond["text"] * spoken[:, None, None],
            "text_mask": cond["text_mask"] & spoken[:, None],
            "vector": cond["vector"] * spoken[:, None],
        }
        return {**cond, "vendor": torch.tensor(vendors)}


def trajectories(part: int) -> Trajectories:
    """Trajectories ``part`` PART .. (part + 1) PART of the guided teacher, 8 calls each."""
    teacher = load(TEACHER)
    grid = grids.fixed(TIMES)
    return Trajectories(
        teacher.guided(GUIDANCE), PART, teacher.codec.shape(*teacher.size), conditions=Requests(), solver="arc", grid=grid,
        steps=len(TIMES) - 1, first=part * PART,
    )  # fmt: skip


def write_trajectories(run: Path, part: int) -> Path:
    """Solve one part into ``run``; what is there already is kept."""
    card: Mapping[str, Any] = {"teacher": TEACHER, "guidance": GUIDANCE}
    folder = run / f"{part:02d}"
    trajectories(part).write(folder, dtype=torch.float16, per_shard=1024, card=card)
    return folder
