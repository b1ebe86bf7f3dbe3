"""Runs that share a model and a method, at once."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch


def apart(run: Callable[[int], torch.Tensor], seeds: tuple[int, ...] = (1, 2)) -> None:
    """Each run gives in a thread beside the others what it gives alone."""
    alone = {seed: run(seed) for seed in seeds}
    found: dict[int, torch.Tensor] = {}
    threads = [threading.Thread(target=lambda seed=seed: found.update({seed: run(seed)})) for seed in seeds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[seed], alone[seed]) for seed in seeds)
