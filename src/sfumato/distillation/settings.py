"""What a distillation is told, checked at once."""

from __future__ import annotations

from dataclasses import dataclass

from sfumato.core import InputError


@dataclass(frozen=True)
class Settings:
    """What a distillation is told; the keys of ``sfumato distill --set``.

    steps         of the student, one call each
    iterations, batch, lr, ema, seed   of the training (progressive: of each halving)
    trajectories  how many solutions of the teacher are made first
    calls         of the teacher a trajectory; a multiple of ``steps``
    guidance      what is put into the student; 0: the pipeline's own scale
    rank          train adapters of this rank only; 0: all weights (lcm-lora: 8)
    halvings      of 'progressive': the first student has steps 2^(halvings - 1)
    """

    method: str = "segments"
    steps: int = 4
    iterations: int = 1000
    batch: int = 32
    lr: float = 3e-4
    ema: float = 0.99
    seed: int = 0
    trajectories: int = 1024
    calls: int = 0
    guidance: float = 0.0
    rank: int = 0
    halvings: int = 2
    save_every: int = 200
    log_every: int = 25

    def __post_init__(self) -> None:
        from sfumato.distillation.methods import METHODS

        if self.method not in METHODS:
            raise InputError(f"method = {self.method!r}: one of {', '.join(METHODS)}")
        for name in ("steps", "iterations", "batch", "trajectories", "halvings", "save_every", "log_every"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} = {getattr(self, name)}: at least 1")
        if self.lr <= 0 or not 0 <= self.ema < 1 or self.rank < 0 or self.guidance < 0 or self.calls < 0:
            raise InputError("lr above 0, ema in [0, 1); rank, guidance and calls are not negative")
        if self.calls % self.steps:
            raise InputError(f"calls = {self.calls}: a multiple of the student's {self.steps} steps")

    @property
    def teacher_calls(self) -> int:
        """Calls of the teacher a trajectory: at least 8, a multiple of the student's steps."""
        return self.calls or self.steps * -(-8 // self.steps)

    @property
    def adapters(self) -> int:
        """The rank of the adapters to train; 0 trains all weights."""
        from sfumato.distillation.methods import METHODS

        return self.rank or METHODS[self.method].rank
