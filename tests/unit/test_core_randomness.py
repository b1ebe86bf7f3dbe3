"""Streams: draw k of step j of item i is a pure function of (seed, i, j, k), and looks like noise in every direction."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sfumato.core import InputError, Streams, mix
from sfumato.core.randomness import _scattered

seeds = st.one_of(st.integers(-(2**100), 2**100), st.integers(-5, 5))


def draw(streams: Streams, *shape: int, step: int = 1, k: int = 0, how: str = "normal") -> Tensor:
    streams.at(step)
    for _ in range(k):
        streams.normal(torch.empty(len(streams.seeds), 1))
    return getattr(streams, how)(torch.empty(len(streams.seeds), *shape, dtype=torch.float64))


@given(seeds, st.integers(1, 9), st.integers(0, 2000), st.integers(0, 3))
def test_an_item_is_the_same_in_every_batch(seed: int, n: int, step: int, k: int) -> None:
    whole = draw(Streams.of(seed, n), 3, step=step, k=k)
    assert torch.equal(draw(Streams.of(seed, n + 4), 3, step=step, k=k)[:n], whole)
    items = [i for i in range(n) if (i + step) % 2]
    assert torch.equal(draw(Streams.of(seed, n).select(items), 3, step=step, k=k), whole[items])
    assert torch.equal(draw(Streams.of(seed, n).select(slice(1, None)), 3, step=step, k=k), whole[1:])
    assert torch.equal(draw(Streams.of([seed] * n, n), 3, step=step, k=k), whole[:1].expand(n, 3))
    assert whole.isfinite().all()


@given(st.lists(seeds, min_size=2, max_size=6, unique_by=lambda seed: seed % 2**64))
def test_one_seed_an_item(several: list[int]) -> None:
    z = draw(Streams.of(several, len(several)), 4)
    for i, seed in enumerate(several):
        assert torch.equal(z[i], draw(Streams.of(seed, 1), 4)[0])
    assert len({tuple(row.tolist()) for row in z}) == len(several)


@given(seeds)
def test_whole_numbers_of_every_library_are_seeds(seed: int) -> None:
    small = seed % 2**31
    expected = Streams.of(small, 2).seeds
    assert Streams.of(np.int64(small), 2).seeds == expected
    assert Streams.of(np.array([small, 3]), 2).seeds == Streams.of([small, 3], 2).seeds
    assert Streams.of(torch.tensor([small, 3]), 2).seeds == Streams.of((small, 3), 2).seeds


@pytest.mark.parametrize("seed", [1.5, "7", None, [1, 2.5], ["1", "2"], object()])
def test_anything_else_is_no_seed(seed: object) -> None:
    with pytest.raises(InputError, match="one whole number, or one an item"):
        Streams.of(seed, 2)  # type: ignore[arg-type]


@given(st.integers(0, 5), st.integers(1, 5))
def test_as_many_seeds_as_items(n: int, items: int) -> None:
    if n != items:
        with pytest.raises(InputError, match=f"{n} seeds for {items} items"):
            Streams.of(list(range(n)), items)


def test_draws_of_one_place_differ_from_all_others() -> None:
    """Seeds, items, steps and draws: no two of them give one number twice."""
    numbers = [
        draw(Streams.of(seed, 3), 2, step=step, k=k).flatten()
        for seed in (0, 1, -1, 2**63)
        for step in range(4)
        for k in range(3)
    ]
    flat = torch.cat(numbers)
    assert flat.unique().numel() == flat.numel()


def test_the_hash_is_frozen() -> None:
    """Every result of every seed depends on these numbers."""
    assert [mix(0), mix(1), mix(-1)] == [8147104208329303767, 3980143261097177850, 0]
    assert [mix(1, 2), mix(2, 1), mix(0, 1, 0)] == [8108304748106729788, 7506645770294462993, 1695622787639244048]


@given(st.integers(0, 2**63 - 1), st.integers(0, 2**32 - 2000))
def test_items_of_one_draw_never_share_a_generator(key: int, low: int) -> None:
    values = _scattered([(key, range(low, low + 1000))], 0, 0)
    assert len(set(values)) == 1000 and all(0 <= v < 2**32 for v in values)


@given(st.lists(st.tuples(st.integers(0, 2**63 - 1), st.lists(st.integers(0, 2**32 - 1), max_size=3)), max_size=3))
def test_a_generator_seed_is_one_finalised_word(runs: list[tuple[int, list[int]]]) -> None:
    """The murmur3 finaliser of index and key, in arrays too: every result of every seed depends on these numbers."""
    want = []
    for seed, indices in runs:
        key = mix(seed, 5, 1)
        for index in indices:
            z = (index ^ key) % 2**32
            z = (z ^ z >> 16) * 0x85EBCA6B % 2**32
            z = (z ^ z >> 13) * 0xC2B2AE35 % 2**32
            want.append((z ^ z >> 16 ^ key >> 31) % 2**32)
    assert _scattered(runs, 5, 1) == want
    assert _scattered([(seed, np.array(i, dtype=np.uint64)) for seed, i in runs], 5, 1) == want


def test_many_items_draw_what_few_draw() -> None:
    """Whatever the streams beside them, and in whichever order: one seed, several, and parts of both."""
    seeds = [0] * 40 + [7] * 3 + [0] * 33
    streams = Streams.of(seeds, len(seeds))
    parts = [draw(streams.select([i]), 3) for i in range(len(seeds))]
    assert torch.equal(draw(streams, 3), torch.cat(parts))
    whole = Streams.of(4, 100)
    order = [*range(99, 40, -1), 2, 2, *range(20)]
    assert torch.equal(draw(whole.select(order), 3), draw(whole, 3)[order])


def test_noise_is_standard_normal_and_uncorrelated() -> None:
    """Across items, components, steps and draws alike: 40,000 numbers a direction."""
    n = 4000
    streams = Streams.of(12, n)
    z = torch.stack([draw(streams, 5, step=step, k=k) for step in (1, 2) for k in (0, 1)], -1).reshape(n, 20)
    assert z.mean(0).abs().max() < 4.5 / math.sqrt(n)
    correlation = z.T @ z / n - torch.eye(20)
    assert correlation.abs().max() < 5.5 * math.sqrt(2 / n)
    along = (z[1:] * z[:-1]).mean(0)
    assert along.abs().max() < 4.5 / math.sqrt(n), "neighbouring items"
    ordered = z.flatten().sort().values
    uniform = 0.5 * (1 + torch.erf(ordered / math.sqrt(2)))
    gap = (uniform - (torch.arange(len(ordered)) + 0.5) / len(ordered)).abs().max()
    assert gap < 1.95 / math.sqrt(len(ordered)), "Kolmogorov-Smirnov at 0.1 %"


def test_uniform_numbers() -> None:
    u = draw(Streams.of(3, 3000), 4, how="uniform")
    assert u.min() >= 0 and u.max() < 1 and u.unique().numel() == u.numel()
    gap = (u.flatten().sort().values - (torch.arange(12000) + 0.5) / 12000).abs().max()
    assert gap < 1.95 / math.sqrt(12000)
    streams = Streams.of(3, 2)
    assert streams.uniform(torch.zeros(2, 3, dtype=torch.int64)).dtype == torch.float64, "for tokens"


def test_consecutive_draws_count_and_places_are_kept_by_select() -> None:
    streams = Streams.of(1, 3)
    streams.at(5)
    streams.normal(torch.empty(3, 2))
    chosen = streams.select([2])
    assert torch.equal(chosen.normal(torch.empty(1, 2)), streams.normal(torch.empty(3, 2))[2:])
    assert (streams.step, streams.k) == (5, 2)


def test_as_many_rows_as_streams() -> None:
    with pytest.raises(InputError, match="a draw of 2 rows from 3 streams"):
        Streams.of(1, 3).normal(torch.empty(2, 2))
