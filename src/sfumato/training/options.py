"""What a training is told beside its objective and data: numbers, strings and hooks, checked at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sfumato.core import InputError
from sfumato.training.optim import MakeOptimizer

PRECISIONS = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(eq=False, kw_only=True)
class Options:
    """The options of :class:`sfumato.training.Trainer`, which describes them."""

    steps: int
    out: str | Path | None = None
    lr: float | Mapping[str, float] = 1e-4
    betas: Sequence[float] = (0.9, 0.999)
    weight_decay: float = 0.0
    warmup: int = 0
    decay: str | None = None
    optimizer: MakeOptimizer | None = None
    ema: float | Mapping[str, float] = 0.999
    profiles: Sequence[float] = ()
    snapshot_every: int = 1000
    clip: float | None = None
    accumulate: int = 1
    precision: str = "no"
    channels_last: bool = False
    save_every: int = 1000
    log_every: int = 50
    sample_every: int = 0
    on_sample: Callable[[Mapping[str, nn.Module], int], None] | None = None
    batch: int = 1
    seed: int = 0
    log_with: str | Sequence[str] | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    cpu: bool = False
    progress: bool | None = None

    def check(self) -> None:
        """Raise InputError for an option that no training can have."""
        for name in ("steps", "accumulate", "batch", "save_every", "log_every", "snapshot_every"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise InputError(f"{name} = {value!r}: give a whole number, at least 1")
        for name in ("warmup", "sample_every"):
            if not getattr(self, name) >= 0:
                raise InputError(f"{name} = {getattr(self, name)!r}: give a whole number, at least 0")
        if self.precision not in PRECISIONS:
            raise InputError(f"precision = {self.precision!r}: use one of {', '.join(PRECISIONS)}")
        if self.decay not in (None, "cosine", "tail"):
            raise InputError(
                f"decay = {self.decay!r}: use None (constant), 'cosine' or 'tail' (constant, then down in the last fifth)"
            )
        if self.clip is not None and not self.clip > 0:
            raise InputError(f"clip = {self.clip}: the largest gradient norm is above 0, or None")

    def options(self) -> dict[str, Any]:
        """The options as JSON values; callables by name."""
        given = {f.name: getattr(self, f.name) for f in fields(Options)}
        return {k: plain(v) for k, v in given.items()}


def is_scalar(value: Any) -> bool:
    """Whether a value is a JSON value by itself."""
    return isinstance(value, (bool, int, float, str))


def plain(value: Any) -> Any:
    """A value as JSON holds it; callables by name."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if value is None or is_scalar(value):
        return value
    return getattr(value, "__name__", None) or str(value)
