"""Of several tries of an edit the one is kept that goes the way it is meant."""

from __future__ import annotations

import pytest
import torch

from sfumato.core import InputError
from sfumato.editing.candidates import best_of, directional_similarity


def test_what_goes_the_way_scores_one_and_what_goes_back_minus_one():
    before, way = torch.randn(5, 7), torch.randn(7)
    sideways = torch.linalg.svd(way[None]).Vh[1]
    for change, cosine in ((3.0 * way, 1.0), (-0.2 * way, -1.0), (sideways, 0.0), (torch.zeros(7), 0.0)):
        found = directional_similarity(before, before + change, way)
        assert torch.allclose(found, torch.full((5,), cosine), atol=1e-5)


def test_each_item_keeps_its_own_best_try():
    """Row k N + i is try k of item i: every item keeps the try with the largest score, whichever that is."""
    x = torch.arange(4.0)[:, None].expand(4, 3)
    moves = torch.randn(6 * 4, 3, generator=torch.Generator().manual_seed(1))
    kept = best_of(6, lambda rows: rows + moves, x, lambda before, tried: (tried - before)[..., 0])
    best = moves[:, 0].reshape(6, 4).argmax(0)
    assert torch.equal(kept, x + moves[best * 4 + torch.arange(4)])
    assert torch.equal(best_of(1, lambda rows: rows + 1, x, lambda before, tried: tried[..., 0]), x + 1)


def test_no_try_at_all_is_refused():
    with pytest.raises(InputError, match="trials = 0"):
        best_of(0, lambda rows: rows, torch.zeros(1, 2), lambda before, tried: tried[..., 0])
