"""What a distillation is told, checked at once."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass, fields
from typing import Any

from sfumato.core import InputError


@dataclass(frozen=True)
class Settings:
    """What a distillation is told; the keys of ``sfumato distill --set``. Raises InputError for what none can be told.

    steps         of the student, one call each
    iterations, batch, ema, seed   of the training (progressive and slimflow: of each of their parts)
    lr            learning rate; 0: the method's own
    trajectories  how many solutions of the teacher are made first, by methods that learn from those
    calls         of the teacher a trajectory; a multiple of ``steps``
    guidance      what is put into the student; 0: the pipeline's own scale
    rank          train adapters of this rank only; 0: all weights (lcm-lora: 8)
    halvings      of 'progressive': the first student has steps 2^(halvings - 1)
    width         of 'slimflow': the small network has about this share of the teacher's channels
    features      of 'mmd-ddm': what the moments are of: 'teacher' (its own activations), 'pixels' (the states), or a registered
                  feature extractor of pictures such as 'mobilenet-v2'
    latent        of 'ddgan': numbers of the latent
    r1            of 'ddgan': weight of the penalty of the critic's slope
    detail, adversarial   of 'tad-sr': weights of the comparison at small noise and of the critic
    """

    method: str = "segments"
    steps: int = 4
    iterations: int = 1000
    batch: int = 32
    lr: float = 0.0
    ema: float = 0.99
    seed: int = 0
    trajectories: int = 1024
    calls: int = 0
    guidance: float = 0.0
    rank: int = 0
    halvings: int = 2
    width: float = 0.5
    features: str = "teacher"
    latent: int = 64
    r1: float = 0.05
    detail: float = 30.0
    adversarial: float = 0.1
    save_every: int = 200
    log_every: int = 25

    def __post_init__(self) -> None:
        from sfumato.distillation.methods import METHODS

        self._check_types()
        if self.method not in METHODS:
            raise InputError(f"method = {self.method!r}: one of {', '.join(METHODS)}")
        method = METHODS[self.method]
        for name in ("steps", "iterations", "batch", "trajectories", "halvings", "latent", "save_every", "log_every"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} = {getattr(self, name)}: at least 1")
        for name in ("lr", "rank", "guidance", "calls", "r1", "detail", "adversarial"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} = {getattr(self, name)}: not negative")
        if not 0 <= self.ema < 1 or not 0 < self.width <= 1:
            raise InputError(f"ema = {self.ema}, width = {self.width}: ema in [0, 1), width above 0 and at most 1")
        if self.calls % self.steps:
            raise InputError(f"calls = {self.calls}: a multiple of the student's {self.steps} steps")
        if method.once and self.steps != 1:
            raise InputError(f"steps = {self.steps}: students of {self.method} sample in one call, steps = 1")
        if self.rank and method.whole:
            raise InputError(f"rank = {self.rank}: {self.method} changes the network itself, so it trains all weights")

    @staticmethod
    def of(method: str, steps: int, others: dict[str, Any]) -> Settings:
        """Settings by name. Raises InputError, with the names there are, for another one."""
        known = [f.name for f in fields(Settings) if f.name not in ("method", "steps")]
        for name in others:
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                hint = f" (did you mean {near[0]}?)" if near else ""
                raise InputError(f"no setting {name!r}{hint}; there are: {', '.join(known)}")
        return Settings(method=method, steps=steps, **others)

    def _check_types(self) -> None:
        """Whole numbers where the default is one, finite numbers, and names."""
        for f in fields(self):
            value, kind = getattr(self, f.name), type(f.default)
            if kind is str:
                right, wanted = isinstance(value, str), "a name"
            elif kind is int:
                right, wanted = type(value) is int, "a whole number"
            else:
                right, wanted = type(value) in (int, float) and math.isfinite(value), "a finite number"
            if not right:
                raise InputError(f"{f.name} = {value!r}: {wanted}")

    @property
    def teacher_calls(self) -> int:
        """Calls of the teacher a trajectory: at least 8, a multiple of the student's steps."""
        return self.calls or self.steps * -(-8 // self.steps)

    @property
    def adapters(self) -> int:
        """The rank of the adapters to train; 0 trains all weights."""
        from sfumato.distillation.methods import METHODS

        return self.rank or METHODS[self.method].rank

    @property
    def rate(self) -> float:
        """The learning rate."""
        from sfumato.distillation.methods import METHODS

        return self.lr or METHODS[self.method].lr
