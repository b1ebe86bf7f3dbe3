"""All that varies per trajectory: conditions, randomness, memory, taps. Nothing of it lives on a module or a solver."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from sfumato.core.randomness import Streams
from sfumato.core.trees import State, Times

if TYPE_CHECKING:
    from sfumato.core.process import Space

Tap: TypeAlias = Callable[..., Any]  # around(ctx, call, *args, **kwargs) of one submodule


@dataclass
class Run:
    """What all forks of one trajectory's context share. ``nfe`` counts rows / batch at the leaf denoisers only."""

    step: int = 0
    nfe: float = 0.0
    total: int | None = None
    t: Times = 1.0
    s: Times = 0.0
    noise: list[State] = field(default_factory=list)
    accepted: list[Callable[[State, Times], None]] = field(default_factory=list)
    shared: dict[str, Any] = field(default_factory=dict)


@dataclass
class Context:
    """The surroundings of a denoiser call.

    cond     what the network is conditioned on, by name
    rng      one stream an item, or None where nothing may be drawn
    memory   what wrappers carry from step to step; a named fork has its own branch of it
    taps     (submodule path, around) pairs, active inside a leaf denoiser's call
    source   source(ctx, fresh) -> State replaces a draw: warped, recorded or searched noise
    look     this is a look-ahead: its memory is scratch and it is never told of accepted steps
    """

    cond: Mapping[str, Any] = field(default_factory=dict)
    rng: Streams | None = None
    memory: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    device: Any = "cpu"
    batch: int = 1
    run: Run = field(default_factory=Run)
    source: Callable[[Context, Callable[[], State]], State] | None = None
    taps: tuple[tuple[str, Tap], ...] = ()
    look: bool = False

    @staticmethod
    def of(batch: int, seed: int | Sequence[int] | None = 0, **fields: Any) -> Context:
        """A context for ``batch`` items, item i drawing from stream (seed, i); ``seed=None`` forbids drawing."""
        return Context(rng=None if seed is None else Streams.of(seed, batch), batch=batch, **fields)

    def draw(self, space: Space, like: State) -> State:
        """The noise of a step. Solvers draw before they call the denoiser, so wrappers can read ``run.noise[-1]``."""
        noise = space.noise(like, self) if self.source is None else self.source(self, lambda: space.noise(like, self))
        self.run.noise.append(noise)
        return noise

    def fork(
        self,
        name: str | None = None,
        *,
        cond: Mapping[str, Any] | None = None,
        taps: Sequence[tuple[str, Tap]] = (),
        look: bool = False,
        batch: int | None = None,
    ) -> Context:
        """The same run seen by an inner denoiser: other conditions, more taps, its own branch of the memory.

        Name a fork where a wrapper makes several inner calls, so that they never share a cache. ``look=True`` is for
        trial calls: it sees a copy of the memory. ``batch`` is the number of items where rows are regrouped.
        """
        memory = _copied(self.memory) if look else self.memory
        return replace(
            self,
            cond=self.cond if cond is None else cond,
            memory=memory if name is None else memory.setdefault(name, {}),
            taps=(*self.taps, *taps),
            look=look or self.look,
            batch=self.batch if batch is None else batch,
        )

    def after(self, fn: Callable[[State, Times], None]) -> None:
        """Have ``fn(x_next, s)`` called once the step under way is accepted; look-aheads are never accepted."""
        if not self.look:
            self.run.accepted.append(fn)


def _copied(memory: dict[str, Any]) -> dict[str, Any]:
    return {k: _copied(v) if isinstance(v, dict) else v for k, v in memory.items()}
