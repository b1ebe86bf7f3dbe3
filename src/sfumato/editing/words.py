"""Words among tokens: which token of one text continues which of another, and where in a picture they are attended."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.core import InputError


def columns(values: Tensor, maps: Tensor, null: float) -> Tensor:
    """Values a token (n, L) as (R, 1, 1, columns): repeated under guidance, shifted past leading null tokens.

    Those columns are ``null``: their own column where ``values`` are indices.
    """
    n, length = values.shape
    lead = maps.shape[-1] - length
    if lead < 0 or len(maps) % n:
        raise InputError(f"values a token {tuple(values.shape)} do not fit maps {tuple(maps.shape)}")
    if values.dtype == torch.int64:  # indices of columns
        first = torch.arange(lead, device=values.device).expand(n, -1)
        values = torch.where(values >= 0, values + lead, values)
    else:
        first = values.new_full((n, lead), null)
    values = torch.cat([first, values], 1).to(maps.device)
    return values.repeat(len(maps) // n, 1)[:, None, None]


def alignment(source: Mapping[str, Any], target: Mapping[str, Any]) -> Tensor:
    """Which source token each target token continues, (n, L) int64, -1 for a new one.

    source, target  conditions with ``text`` (n, L, C) and, where the model has it, ``text_mask``

    The monotone matching of the two texts of the largest sum of cosines (Needleman and Wunsch 1970): a word that was
    swapped is matched to the one in its place, an inserted one to none. Features of the same word in two sentences are alike,
    so no tokenizer is asked. Raises InputError where the conditions hold no text.
    """
    if "text" not in source or "text" not in target:
        raise InputError("there is no text among the conditions: align tokens by hand, or control self-attention only")
    one, two = (F.normalize(c["text"].double(), dim=-1) for c in (source, target))
    alike = (two @ one.transpose(1, 2)).clamp(min=0)
    for cond, other in ((source, 1), (target, 2)):
        if cond.get("text_mask") is not None:
            alike = alike * cond["text_mask"].bool().unsqueeze(other)
    return torch.tensor([_match(rows) for rows in alike.tolist()], device=one.device)


def _match(alike: list[list[float]]) -> list[int]:
    """For each row the column of the best monotone matching, or -1."""
    rows, columns = len(alike), len(alike[0])
    best = [[0.0] * (columns + 1) for _ in range(rows + 1)]
    for i in range(rows):
        for j in range(columns):
            best[i + 1][j + 1] = max(best[i][j] + alike[i][j], best[i][j + 1], best[i + 1][j])
    out, i, j = [-1] * rows, rows, columns
    while i and j:
        if alike[i - 1][j - 1] > 0 and best[i][j] == best[i - 1][j - 1] + alike[i - 1][j - 1]:
            i, j = i - 1, j - 1
            out[i] = j
        elif best[i][j] == best[i - 1][j]:
            i -= 1
        else:
            j -= 1
    return out


def changed(source: Mapping[str, Any], target: Mapping[str, Any], below: float = 0.7) -> tuple[Tensor, Tensor]:
    """(n, L) bool a side: the tokens that the texts do not share, unmatched or matched at a cosine under ``below``.

    The first and the last token of a text (the marks of its begin and end) are not words and never count.
    """
    align = alignment(source, target)
    one, two = (F.normalize(c["text"].double(), dim=-1) for c in (source, target))
    cosine = (two * one.gather(1, align.clamp(min=0)[..., None].expand_as(two))).sum(-1)
    same = (align >= 0) & (cosine >= below)
    length = one.shape[1]
    index = torch.where(same, align, length)  # one column more, for what matches nothing
    taken = torch.zeros(len(align), length + 1, dtype=torch.bool, device=align.device).scatter(1, index, True)
    return ~taken[:, :-1] & words(source), ~same & words(target)


def words(cond: Mapping[str, Any]) -> Tensor:
    """(n, L) bool: all tokens but the first, the last and those that are masked."""
    text, mask = cond["text"], cond.get("text_mask")
    place = torch.arange(text.shape[1], device=text.device).expand(text.shape[:2])
    length = torch.full_like(place[:, :1], text.shape[1]) if mask is None else mask.long().sum(1, keepdim=True)
    return (place > 0) & (place < length - 1)


def attention_map(maps: list[tuple[str, Tensor]], tokens: Tensor, size: tuple[int, int]) -> Tensor:
    """Where the chosen tokens (n, L) bool are attended, (n, 1, H, W): the mean over sites, heads and tokens, at most 1.

    maps  from :func:`watched`; their first n rows are read (the conditional ones under guidance)
    """
    n, places = len(tokens), []
    for _, p in maps:
        chosen = columns(tokens.to(p), p[:n], 0.0)
        place = (p[:n] * chosen).sum(-1).mean(1) / chosen.sum(-1).mean(1).clamp(min=1)
        places.append(F.interpolate(as_image(place, size), size, mode="bilinear"))
    if not places:
        raise InputError("no maps to look at: put controlled(denoiser, Watch()) into the run")
    return torch.stack(places).mean(0)


def as_image(place: Tensor, size: tuple[int, int]) -> Tensor:
    """Values a query (n, N) as (n, 1, h, w), h / w being that of ``size``."""
    height = round(math.sqrt(place.shape[1] * size[0] / size[1]))
    if height * (place.shape[1] // height) != place.shape[1]:
        raise InputError(f"{place.shape[1]} queries are no picture of the shape of {size}")
    return place.unflatten(1, (height, -1))[:, None]


__all__ = ["alignment", "as_image", "attention_map", "changed", "columns", "words"]
