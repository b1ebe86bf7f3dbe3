"""Features of many images, one batch at a time, on one process or shared out over several."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from sfumato.core.errors import InputError, MissingExtra, SfumatoError
from sfumato.evaluation.features import Extractor, check_images

T = TypeVar("T")
Images = Tensor | Iterable[Tensor]


@dataclass(frozen=True)
class Ranks:
    """This process among its peers. Batch i belongs to process i mod ``count``."""

    index: int = 0
    count: int = 1

    @staticmethod
    def detect(distributed: bool | None = None) -> Ranks:
        """The processes that a launcher started (accelerate, torchrun); one process where there is none.

        ``distributed``: False is one process in any case, for code that only the main process runs; True insists.

        Raises:
            InputError: True, but no launcher started this process; or accelerate knows of no peers.
            MissingExtra: several processes, but accelerate is not installed.
        """
        started = torch.distributed.is_available() and torch.distributed.is_initialized()
        launched = started or int(os.environ.get("WORLD_SIZE", "1")) > 1
        if distributed and not launched:
            raise InputError("distributed=True in a single process: start it with accelerate launch or torchrun")
        if distributed is False or not launched:
            return Ranks()
        try:
            from accelerate import PartialState
        except ImportError:
            raise MissingExtra("accelerate", extra="train") from None
        # Without an accelerator the processes find each other only if the CPU is asked for.
        state = PartialState(cpu=not torch.accelerator.is_available())
        if state.num_processes == 1:
            raise InputError(
                "a launcher started several processes, but accelerate was set up for one: pass cpu=True where its "
                "first Accelerator or PartialState is made, or distributed=False here"
            )
        if not started:
            # A process that ends with the group still open may abort after its work is done.
            atexit.register(_leave)
        return Ranks(state.process_index, state.num_processes)

    def together(self, work: Callable[[], list[T]]) -> list[T]:
        """The joined results of ``work`` on every process, on every process; if one fails, all raise."""
        if self.count == 1:
            return work()
        from accelerate.utils import gather_object

        found: list[Any] = []
        failure: Exception | None = None
        try:
            found = work()
        except Exception as error:
            # Peers already wait in the gathering, so the news has to travel through it.
            failure = error
        reports = gather_object(
            [(self.index, found, None if failure is None else f"{type(failure).__name__}: {failure}")]
        )
        if failure is not None:
            raise failure
        for index, _, message in reports:
            if message is not None:
                raise SfumatoError(f"process {index} of {self.count} failed: {message}")
        return [item for _, items, _ in sorted(reports, key=lambda report: report[0]) for item in items]

    def first(self, work: Callable[[], list[T]]) -> list[T]:
        """The results of ``work`` on the first process alone, on every process."""
        return self.together(work if self.index == 0 else list)


def _leave() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def batches(images: Images, size: int, name: str = "images") -> Iterator[Tensor]:
    """Batches of ``size`` uint8 images (B, C, H, W) whatever batches come in: the last of each image size is smaller.

    ``images`` is one tensor (a memory-mapped one stays on disk) or an iterable of batches.

    Raises:
        InputError: no images at all, or something else than uint8 batches.
    """
    held: list[Tensor] = []
    any_seen = False
    for chunk in _chunks(images, size, name):
        any_seen = True
        if held and held[0].shape[1:] != chunk.shape[1:]:
            yield torch.cat(held)
            held = []
        while len(chunk):
            room = size - sum(map(len, held))
            held.append(chunk[:room])
            chunk = chunk[room:]
            if sum(map(len, held)) == size:
                yield held[0] if len(held) == 1 else torch.cat(held)
                held = []
    if held:
        yield torch.cat(held)
    if not any_seen:
        raise InputError(f"{name} hold no images")


def _chunks(images: Images, size: int, name: str) -> Iterator[Tensor]:
    if isinstance(images, Tensor):
        if not images.numel():
            raise InputError(f"{name} hold no images: shape {tuple(images.shape)}")
        yield from (images[i : i + size] for i in range(0, len(images), size))
        return
    if isinstance(images, str | bytes | os.PathLike) or not isinstance(images, Iterable):
        raise InputError(f"{name}: a uint8 tensor or an iterable of uint8 batches is wanted, got {images!r}")
    for batch in images:
        try:
            yield check_images(batch)
        except InputError as error:
            raise InputError(f"{name}: {error}") from None


def extract(
    images: Images, extractor: Extractor, *, batch: int = 64, ranks: Ranks | None = None, name: str = "images"
) -> Tensor:
    """Features (N, d) of all images on the CPU, in order.

    Batches are cut to one size before they are shared out, so the result does not depend on the number of processes
    nor on the batches that came in. Every process walks the whole iterable and computes its own batches only.

    Raises:
        InputError: as :func:`batches`, or features that are not finite (B, d).
    """
    if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
        raise InputError(f"batch = {batch!r}: images at once, a positive integer")
    ranks = Ranks() if ranks is None else ranks

    def own() -> list[tuple[int, Tensor]]:
        cut = enumerate(batches(images, batch, name))
        return [(i, _features(extractor, part)) for i, part in cut if i % ranks.count == ranks.index]

    found = sorted(ranks.together(own), key=lambda pair: pair[0])
    widths = sorted({part.shape[1] for _, part in found})
    if len(widths) > 1:
        raise InputError(f"{extractor.name} gave features of different widths for {name}: {widths}")
    return torch.cat([part for _, part in found])


def _features(extractor: Extractor, images: Tensor) -> Tensor:
    found = extractor(check_images(images))
    if not isinstance(found, Tensor) or found.dim() != 2 or len(found) != len(images):
        given = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise InputError(f"{extractor.name}: features ({len(images)}, d) are wanted, got {given}")
    return found.detach().cpu()
