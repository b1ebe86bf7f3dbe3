"""What the core asks of a noising law; :class:`sfumato.processes.Gaussian` is the law itself."""

from __future__ import annotations

from typing import Protocol

from sfumato.core.context import Context
from sfumato.core.trees import State


class Space(Protocol):
    """Where states live, and what noise is there."""

    def noise(self, like: State, ctx: Context) -> State:
        """The noise of one step, from the streams of ``ctx``."""
        ...


class Kernel(Protocol):
    """A reverse transition q(x_s | x_t, belief): Gaussian ones also have ``mean``, ``std`` and ``noise(x_s)``."""

    def draw(self, noise: State) -> State:
        """x_s from the noise of the step: a deterministic map, so noise can be recorded and replayed."""
        ...
