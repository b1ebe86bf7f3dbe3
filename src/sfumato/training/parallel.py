"""Several processes, one training: slices, sums over ranks, and how to start them."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sfumato.core import InputError


def share(n: int, rank: int, world: int) -> tuple[int, int]:
    """The items lo .. hi of a batch of n that a rank works on; the shares differ by one item at most."""
    return n * rank // world, n * (rank + 1) // world


def count(batch: Mapping[str, Any]) -> int:
    """The number of items of a batch: the length of its first tensor or list. Raises InputError where there is none."""
    for value in batch.values():
        n = count(value) if isinstance(value, Mapping) else _length(value)
        if n:
            return n
    return 0


def take(batch: Any, n: int, lo: int, hi: int, name: str = "batch") -> Any:
    """Items lo .. hi of every tensor and list of n items; numbers and 0-d tensors are for all items."""
    if isinstance(batch, Mapping):
        return {k: take(v, n, lo, hi, f"{name}[{k!r}]") for k, v in batch.items()}
    length = _length(batch)
    if length is None:
        return batch
    if length != n:
        raise InputError(f"{name} has {length} items, the batch has {n}: every tensor and list holds one entry an item")
    return batch[lo:hi]


def place(batch: Any, device: torch.device, channels_last: bool) -> Any:
    """The batch on the device, its float images in channels-last order if wanted."""
    if isinstance(batch, Mapping):
        return {k: place(v, device, channels_last) for k, v in batch.items()}
    if not isinstance(batch, Tensor):
        return batch
    if channels_last and batch.ndim == 4 and batch.is_floating_point():
        return batch.to(device, non_blocking=True, memory_format=torch.channels_last)
    return batch.to(device, non_blocking=True)


def sum_gradients(parameters: Sequence[Tensor], figures: Tensor) -> Tensor:
    """Add gradients and figures up over the ranks, in one message; returns the summed figures (float32).

    Every rank gets the same bits. A parameter that no rank used keeps its gradient None, as it would in one process.
    """
    used = torch.tensor([p.grad is not None for p in parameters], dtype=torch.float32, device=figures.device)
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([*(g.float().reshape(-1) for g in parts), used, figures.float()])
    dist.all_reduce(flat)
    *chunks, used, figures = flat.split([p.numel() for p in parameters] + [len(parameters), len(figures)])
    for p, g, chunk, any_rank in zip(parameters, parts, chunks, used.tolist(), strict=True):
        p.grad = g.copy_(chunk.view_as(g)) if any_rank else None
    return figures


def from_first_rank(tensors: Iterable[Tensor]) -> None:
    """Give every rank the tensors of rank 0."""
    for tensor in tensors:
        whole = tensor.detach().contiguous()
        dist.broadcast(whole, 0)
        tensor.detach().copy_(whole)


def launch(function: Callable[..., Any], processes: int, *args: Any) -> None:
    """Run ``function(*args)`` in several processes of this machine, as torchrun and ``accelerate launch`` would.

    ``function`` builds its Trainer itself; it must be importable (defined in a module). An error in one process ends all.
    """
    if processes < 1:
        raise InputError(f"processes = {processes}: at least 1")
    if processes == 1:
        function(*args)
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(_enter, (processes, port, function, args), nprocs=processes)


def _enter(rank: int, world: int, port: int, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank, "LOCAL_RANK": rank}
    os.environ.update({k: str(v) for k, v in {**where, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}.items()})
    try:
        function(*args)
        if dist.is_initialized():
            dist.barrier()  # all leave together: torch may abort a process whose peer is gone while it takes its threads down
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _length(value: Any) -> int | None:
    if isinstance(value, Tensor):
        return len(value) if value.ndim else None
    return len(value) if isinstance(value, (list, tuple)) else None
