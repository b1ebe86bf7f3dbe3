"""Stateless randomness: draw k of step j of item i is a pure function of (seed of i, j, k)."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sfumato.core.errors import InputError

_M32, _M64, _GOLDEN = (1 << 32) - 1, (1 << 64) - 1, 0x9E3779B97F4A7C15
_MANY = 32  # indices from which an array is faster than a loop


def mix(*keys: int) -> int:
    """A 63-bit hash of integers (the splitmix64 finaliser over a running sum); frozen: results depend on it."""
    z = 0
    for key in keys:
        z = (z + key * _GOLDEN + _GOLDEN) & _M64
        z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & _M64
        z = ((z ^ z >> 27) * 0x94D049BB133111EB) & _M64
        z ^= z >> 31
    return z >> 1


def _scattered(runs: Sequence[tuple[int, Any]], step: int, k: int) -> list[int]:
    """A generator seed an item: its index through a bijection of 32-bit integers that (seed, step, k) chooses, so that
    items of one draw never share one."""
    found: list[int] = []
    for seed, indices in runs:
        key = mix(seed, step, k)
        low, high = key & _M32 ^ (key & _M32) >> 16, key >> 31 & _M32
        if isinstance(indices, np.ndarray):
            found += _bijection(indices, low, high).tolist()
        else:
            found += [_bijection(z, low, high) for z in indices]
    return found


def _bijection(z: Any, low: int, high: int) -> Any:
    """An integer, or an array of them."""
    z = ((z ^ z >> 16 ^ low) * 0x85EBCA6B) & _M32
    z = ((z ^ z >> 13) * 0xC2B2AE35) & _M32
    return z ^ z >> 16 ^ high


@dataclass
class Streams:
    """One stream of noise an item; nothing to save, and item i never depends on the batch it is in.

    ``seeds`` holds (key, index) an item: :meth:`of` makes them. ``step`` is set by the sampling loop, ``k`` counts the
    draws within it. Numbers are drawn on the CPU in one fixed dtype and then cast, so float32 and float64 runs and all
    devices see the same noise.
    """

    seeds: tuple[tuple[int, int], ...]
    step: int = 0
    k: int = 0
    _generator: torch.Generator = field(default_factory=torch.Generator, repr=False, compare=False)

    @cached_property
    def _runs(self) -> list[tuple[int, Any]]:
        """(key, its items' indices in order), as an array where there are many."""
        runs = ((key, [i for _, i in items]) for key, items in groupby(self.seeds, operator.itemgetter(0)))
        return [(key, np.array(i, dtype=np.uint64) if len(i) >= _MANY else i) for key, i in runs]

    @staticmethod
    def of(seed: Any, n: int) -> Streams:
        """An int gives item i the stream (seed, i); a sequence gives each item its own seed (the stream (seed, 0)).

        Seeds are whole numbers of any library, modulo 2^64. Streams give theirs: a slice of a larger set's, say.
        """
        try:
            if isinstance(seed, Streams):
                streams = seed.seeds
            elif hasattr(seed, "__len__"):
                streams = tuple((mix(operator.index(s)), 0) for s in seed)
            else:
                streams = tuple((mix(operator.index(seed)), i) for i in range(n))
        except TypeError:
            raise InputError(f"seed = {seed!r}: give one whole number, or one an item") from None
        if len(streams) != n:
            raise InputError(f"{len(streams)} seeds for {n} items: give one int, or one int an item")
        return Streams(streams)

    def at(self, step: int) -> None:
        """Move to the draws of another step."""
        self.step, self.k = step, 0

    def normal(self, like: Tensor) -> Tensor:
        """N(0, 1) of the shape, dtype and device of ``like`` (B, *)."""
        return self._fill(like, torch.float32, "normal_")

    def uniform(self, like: Tensor) -> Tensor:
        """U[0, 1) drawn in float64 and cast to the dtype of ``like`` (float64 for integer states)."""
        return self._fill(like, torch.float64, "uniform_")

    def select(self, items: slice | Sequence[int]) -> Streams:
        """The streams of some of the items, at the same place."""
        chosen = self.seeds[items] if isinstance(items, slice) else tuple(self.seeds[i] for i in items)
        return Streams(chosen, self.step, self.k)

    def _fill(self, like: Tensor, dtype: torch.dtype, how: str) -> Tensor:
        if like.shape[0] != len(self.seeds):
            raise InputError(
                f"a draw of {like.shape[0]} rows from {len(self.seeds)} streams: noise is drawn by solvers, "
                "one row an item, never inside a denoiser that has stacked its inputs"
            )
        out = torch.empty(like.shape, dtype=dtype)
        seeded, fill = self._generator.manual_seed, getattr(torch.Tensor, how)
        items = zip(out.unbind(0), _scattered(self._runs, self.step, self.k), strict=True)
        with torch.inference_mode():  # a cheaper call; ``out`` stays an ordinary tensor
            for row, seed in items:
                fill(row, generator=seeded(seed))
        self.k += 1
        return out.to(like.device, like.dtype if like.is_floating_point() else dtype)
