"""Pairs of prompts for recipes that show two things in one picture, and intervals of paired differences."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sfumato.core import mix
from sfumato.guidance import also

PROMPTS = (
    "red heart", "cat face", "pizza", "rocket", "deciduous tree", "soccer ball", "red apple", "blue book", "penguin", "alarm clock",
    "sunflower", "ghost", "hamburger", "dog face", "green salad", "full moon", "pumpkin", "owl", "doughnut", "maple leaf",
)  # fmt: skip


def pairs(n: int, seed: int) -> list[tuple[str, str]]:
    """n ordered pairs of different prompts; pair i is a pure function of (seed, i)."""
    out = []
    for i in range(n):
        order = torch.randperm(len(PROMPTS), generator=torch.Generator().manual_seed(mix(seed, i))).tolist()
        out.append((PROMPTS[order[0]], PROMPTS[order[1]]))
    return out


def told(pipeline: Any, asked: list[tuple[str, str]]) -> tuple[dict[str, Any], Tensor]:
    """(conditions of the first prompts with the second ones beside them, the vectors (n, 2, d) that text encoders read)."""
    first, second = (pipeline.conditions(len(asked), [pair[i] for pair in asked]) for i in (0, 1))
    return first | also(second), torch.stack([first["vector"], second["vector"]], 1)


def interval(gain: Tensor, seed: int) -> tuple[float, float]:
    """95 % bootstrap interval of the mean of paired differences (n,)."""
    rows = torch.randint(len(gain), (4000, len(gain)), generator=torch.Generator().manual_seed(mix(seed, 9)))
    low, high = gain[rows].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=gain.dtype)).tolist()
    return low, high


__all__ = ["PROMPTS", "interval", "pairs", "told"]
