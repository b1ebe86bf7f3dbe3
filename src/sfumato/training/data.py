"""Batches as pure functions of the iteration: nothing about their order is ever saved."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from sfumato.core import InputError, mix
from sfumato.training.images import ImageFolder, read_image
from sfumato.training.shards import Arrays, Dataset, Shards, write_shards

ORDER, FLIP = 1, 2  # which draw of (seed, ...) it is


class Batches:
    """``batches(i)`` is the batch of iteration i, a pure function of (seed, i).

    Items come in the order of one permutation an epoch: item k of batch i is number (i size + k) mod n of epoch
    (i size + k) // n, so every item is seen exactly once an epoch, and a batch may cross from one epoch into the next.

    size       items a batch (may exceed the data set)
    cond       fields that go under "cond": names, or {field: condition}
    flip       mirror each picture left-right with probability 1/2 (not for latents: their mirror is not their codec's)
    transform  batch -> batch, last: augmentations must be functions of the items alone
    prefetch   make the next batch in a background thread meanwhile

    Pictures (uint8 "x") become float32 in [-1, 1]; float16 fields become float32.
    """

    def __init__(
        self,
        dataset: Dataset,
        size: int,
        seed: int = 0,
        *,
        cond: Sequence[str] | Mapping[str, str] = (),
        flip: bool = False,
        transform: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
        prefetch: bool = True,
    ) -> None:
        if not (isinstance(size, int) and size >= 1):
            raise InputError(f"size = {size!r}: a batch has at least 1 item")
        if not len(dataset):
            raise InputError("the data set is empty")
        self.dataset, self.size, self.seed, self.flip, self.transform = dataset, size, seed, flip, transform
        self.cond = dict(cond) if isinstance(cond, Mapping) else {name: name for name in cond}
        self.prefetch = prefetch
        self._worker: ThreadPoolExecutor | None = None
        self._next: tuple[tuple[int, int, int], Future[dict[str, Any]]] | None = None

    def __call__(self, it: int) -> dict[str, Any]:
        """The whole batch of iteration ``it``."""
        return self.part(it, 0, self.size)

    def part(self, it: int, lo: int, hi: int) -> dict[str, Any]:
        """Items lo .. hi of the batch of iteration ``it``: what one of several processes needs."""
        if not self.prefetch:
            return self._make(it, lo, hi)
        if self._worker is None:
            self._worker = ThreadPoolExecutor(1, "batches")
        ready, self._next = self._next, None
        batch = ready[1].result() if ready is not None and ready[0] == (it, lo, hi) else self._make(it, lo, hi)
        self._next = (it + 1, lo, hi), self._worker.submit(self._make, it + 1, lo, hi)
        return batch

    def indices(self, it: int, lo: int = 0, hi: int | None = None) -> list[int]:
        """Which items of the data set these are."""
        n = len(self.dataset)
        places = range(it * self.size + lo, it * self.size + (self.size if hi is None else hi))
        return [_permutation(mix(self.seed, ORDER, place // n), n)[place % n] for place in places]

    def _make(self, it: int, lo: int, hi: int) -> dict[str, Any]:
        fields = {name: _usable(value) for name, value in self.dataset.batch(self.indices(it, lo, hi)).items()}
        if self.flip:
            fields["x"] = self._flipped(fields, it * self.size + lo)
        missing = set(self.cond) - set(fields)
        if missing:
            raise InputError(f"the data set has no field {sorted(missing)} for a condition; it has {sorted(fields)}")
        batch = {name: value for name, value in fields.items() if name not in self.cond}
        if self.cond:
            batch["cond"] = {name: fields[field] for field, name in self.cond.items()}
        return batch if self.transform is None else self.transform(batch)

    def _flipped(self, fields: Mapping[str, Any], first: int) -> Tensor:
        x: Tensor = fields["x"]
        if "std" in fields or x.ndim != 4:
            raise InputError(
                f"flip=True is for pictures (B, C, H, W), the data are {'latents' if 'std' in fields else tuple(x.shape)}"
            )
        mirrored = torch.tensor([mix(self.seed, FLIP, first + k) % 2 == 1 for k in range(len(x))], dtype=torch.bool)
        return torch.where(mirrored[:, None, None, None], x.flip(-1), x)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_worker": None, "_next": None}


@lru_cache(maxsize=4)
def _permutation(key: int, n: int) -> Sequence[int]:
    order = torch.randperm(n, generator=torch.Generator().manual_seed(key))
    return order.numpy() if n > 1_000_000 else order.tolist()  # type: ignore[return-value]


def _usable(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    if value.dtype == torch.uint8 and value.ndim == 4:
        return value.float().div_(127.5).sub_(1.0)
    return value.float() if value.dtype == torch.float16 else value


__all__ = ["Arrays", "Batches", "Dataset", "ImageFolder", "Shards", "read_image", "write_shards"]
