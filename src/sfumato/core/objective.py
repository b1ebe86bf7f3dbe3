"""What a trainer asks of a training signal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from sfumato.core.context import Context
from sfumato.core.denoiser import rebuild


@dataclass
class Loss:
    """A scalar to minimise and the named figures to log beside it."""

    total: Tensor
    terms: Mapping[str, Tensor] = field(default_factory=dict)


class Objective(nn.Module):
    """A training signal. Targets, queues and counters are its state and are saved; teachers are Frozen and are not.

    ``couples`` is True where items of a batch are compared with each other, so that a batch must not be split.
    """

    couples: bool = False

    def players(self) -> Mapping[str, nn.Module]:
        """The networks it trains, each with an optimiser of its own."""
        raise NotImplementedError(f"{type(self).__name__} must name what it trains: write players()")

    def turns(self, it: int) -> Sequence[Sequence[str]]:
        """Which players step in iteration ``it``, in order; those of one turn share a loss. Default: one turn each."""
        return [[name] for name in self.players()]

    def forward(self, batch: Mapping[str, Any], ctx: Context, player: str) -> Loss:
        """The loss of the turn whose first player is ``player``."""
        raise NotImplementedError(
            f"{type(self).__name__} must say what it minimises: write forward(batch, ctx, player)"
        )

    def after_step(self, it: int) -> None:
        """Target averages, curricula, refreshed couplings."""


class Frozen(nn.Module):
    """A teacher or an encoder: shares its tensors, stays in eval mode, moves with its owner, is never saved with it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "module", rebuild(module, lambda path, m: None).eval())

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["module"](*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Frozen:
        self.__dict__["module"]._apply(fn, recurse)
        return self

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["module"], name)
