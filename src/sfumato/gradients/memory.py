"""How much memory a computation needs, counted tensor by tensor."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class Memory(TorchDispatchMode):
    """Counts the bytes of all tensors made inside the block that are alive, graphs included: ``peak`` and ``now``.

    >>> with Memory() as used:
    ...     sample(denoiser, x=x).sum().backward()
    >>> used.peak

    Unlike the size of the process it has no noise and no allocator in it. Work space inside one operation is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(v.untyped_storage()) for v in tree_iter((args, kwargs or {})) if isinstance(v, Tensor)}
        out = func(*args, **(kwargs or {}))
        for value in tree_iter(out):
            if isinstance(value, Tensor):
                self._watch(value.untyped_storage(), given)
        return out

    def _watch(self, storage: Any, given: set[int]) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._known or key in given:  # views and results written in place
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size
