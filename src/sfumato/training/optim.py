"""Optimisers and learning rates as pure functions of the iteration."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from sfumato.core import InputError
from sfumato.training.checkpoint import fit_shapes

MakeOptimizer: TypeAlias = Callable[[str, list[nn.Parameter]], torch.optim.Optimizer]


def factor(it: int, steps: int, warmup: int, decay: str | None) -> float:
    """What the learning rate is multiplied with in iteration it = 0, 1, ...

    (it + 1) / warmup while it < warmup, then 1, or over the remaining share u of the training, decay='cosine': (1 + cos(pi u)) / 2,
    decay='tail': 1 until u = 0.8, then linearly to 0 (Hu et al. 2024, MiniCPM: a longer training may branch off before the tail).
    """
    if it < warmup:
        return (it + 1) / warmup
    share = (it - warmup) / max(steps - warmup, 1)
    if decay == "cosine":
        return 0.5 * (1 + math.cos(math.pi * share))
    return min(1.0, (1 - share) / 0.2) if decay == "tail" else 1.0


def adamw(lr: float, betas: Sequence[float], weight_decay: float) -> MakeOptimizer:
    """AdamW in one kernel for all parameters of a player."""

    def make(player: str, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        fused = all(p.is_floating_point() and p.device.type in ("cpu", "cuda", "mps", "xpu") for p in parameters)
        pair = (float(betas[0]), float(betas[1]))
        return torch.optim.AdamW(parameters, lr=lr, betas=pair, weight_decay=weight_decay, fused=fused)

    return make


def rates(lr: float | Mapping[str, float], players: Sequence[str]) -> dict[str, float]:
    """The learning rate of each player; a mapping names every one of them."""
    if not isinstance(lr, Mapping):
        return dict.fromkeys(players, float(lr))
    if set(lr) != set(players):
        raise InputError(
            f"lr names {sorted(lr)}; the players are {sorted(players)}: name every one, or give one number"
        )
    return {name: float(lr[name]) for name in players}


def state(optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Any]]:
    """The moments and counters by parameter index. Learning rates and the like belong to the configuration."""
    return optimizer.state_dict()["state"]  # type: ignore[no-any-return]


def restore(optimizer: torch.optim.Optimizer, saved: Mapping[int, Mapping[str, Any]], player: str) -> None:
    """Put saved moments back, in the memory layout of their parameters. Raises InputError where shapes differ."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if saved and max(saved) >= len(parameters):
        raise InputError(f"the optimiser of {player!r} was saved with more parameters than it has now")
    shaped: dict[int, dict[str, Any]] = {}
    for index, entries in saved.items():
        p = parameters[index]
        tensors = {k: v for k, v in entries.items() if isinstance(v, Tensor) and v.ndim}
        fit_shapes(f"the optimiser of {player!r}", tensors, dict.fromkeys(tensors, p))
        shaped[index] = {k: torch.empty_like(p).copy_(v) if k in tensors else v for k, v in entries.items()}
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": shaped, "param_groups": groups})
