"""Several tries of one edit, of which the one is kept that goes the way the edit is meant."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.core import InputError


def directional_similarity(before: Tensor, after: Tensor, direction: Tensor) -> Tensor:
    """cos(after - before, direction) of each item, in whatever space they are given: (..., N).

    before, direction  broadcast against after (..., N, D); a direction is e.g. the difference of the means of two domains, or
                       of two texts (Gal, Patashnik, Maron, Bermano, Chechik, Cohen-Or, 2022, "StyleGAN-NADA")
    An item that has not moved has no direction: 0.
    """
    return F.cosine_similarity(after - before, direction.expand_as(after), dim=-1)


def best_of(
    trials: int, edit: Callable[[Tensor], Tensor], x: Tensor, score: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """The best (N, *) of ``trials`` edits of each x (N, *), all drawn in one batch of trials N rows.

    edit   (M, *) -> (M, *); what it draws differs between rows
    score  (x (N, *), candidates (trials, N, *)) -> (trials, N): the largest is kept, the first of equals

    Raises InputError for fewer trials than one. Wu, De la Torre, 2023 ("Unifying Diffusion Models' Latent Space") rank 15
    trials of an edit by their directional similarity.
    """
    if trials < 1:
        raise InputError(f"trials = {trials}: at least 1")
    tried = edit(x.repeat(trials, *[1] * (x.ndim - 1))).unflatten(0, (trials, len(x)))
    return tried[score(x, tried).argmax(0), torch.arange(len(x), device=x.device)]


__all__ = ["best_of", "directional_similarity"]
