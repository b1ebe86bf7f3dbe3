"""x_t to a belief about x0. Networks, oracles, renderers and every guidance are Denoisers."""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeAlias

from torch import nn

from sfumato.core.context import Context
from sfumato.core.errors import InputError


class Denoiser(nn.Module):
    """Maps a state to a belief about its clean origin.

    process   the noising law the state follows
    null      what "no condition" is, by condition name: read by condition dropout and by guidance
    """

    process: Any
    null: Mapping[str, Any] = {}

    def forward(self, x: Any, t: Any, ctx: Context) -> Any:
        """The belief at state x (B, *) and time t."""
        raise NotImplementedError(f"{type(self).__name__} must say what it believes: write forward(x, t, ctx)")


class Wrapper(Denoiser):
    """Base of every guidance, cache and composition: a Denoiser made of another one."""

    def __init__(self, inner: Denoiser) -> None:
        super().__init__()
        self.inner = inner

    @property
    def process(self) -> Any:  # type: ignore[override]
        return self.inner.process

    @property
    def null(self) -> Mapping[str, Any]:  # type: ignore[override]
        return self.inner.null


Guidance: TypeAlias = Callable[[Denoiser], Denoiser]

_active: ContextVar[Mapping[nn.Module, Callable[..., Any]]] = ContextVar("taps", default={})  # noqa: B039
_lock = threading.Lock()


class _Tapped:
    """Mixed into the class of a module the first time it is tapped: looks for a tap at each call."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        around = _active.get().get(self)  # type: ignore[call-overload]
        call = super().__call__  # type: ignore[misc]
        return call(*args, **kwargs) if around is None else around(call, *args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copied and pickled as of the class it had before."""
        return object.__new__, (type(self).__bases__[1],), self.__getstate__()


@contextmanager
def tapped(net: nn.Module, ctx: Context) -> Iterator[None]:
    """Activate the taps of ``ctx`` on the named submodules of ``net`` while its call lasts.

    A tap is ``around(ctx, call, *args, **kwargs)``: read, edit, replace or skip the call. Where two name one submodule
    the later is outermost. Activity is per thread and per call, so concurrent runs share a network safely.
    """
    if not ctx.taps:
        yield
        return
    table: dict[nn.Module, Callable[..., Any]] = {}
    for path, tap in ctx.taps:
        try:
            module = net.get_submodule(path)
        except AttributeError as error:
            near = ", ".join(name for name, _ in net.named_modules() if name.count(".") <= path.count(".") and name)
            raise InputError(f"no submodule {path!r} to tap; there are: {near}") from error
        if not isinstance(module, _Tapped):
            with _lock:
                if not isinstance(module, _Tapped):
                    module.__class__ = type(type(module).__name__, (_Tapped, type(module)), {})
        inner = table.get(module)
        table[module] = functools.partial(tap, ctx) if inner is None else _nested(functools.partial(tap, ctx), inner)
    token = _active.set({**_active.get(), **table})
    try:
        yield
    finally:
        _active.reset(token)


def _nested(outer: Callable[..., Any], inner: Callable[..., Any]) -> Callable[..., Any]:
    return lambda call, *args, **kwargs: outer(functools.partial(inner, call), *args, **kwargs)


def rebuild(net: nn.Module, swap: Callable[[str, nn.Module], nn.Module | None]) -> nn.Module:
    """A new module tree that shares every tensor with ``net``, with the submodules ``swap(path, module)`` returns in it.

    LoRA, quantisation and freezing are this; the original is untouched.
    """
    shared: dict[int, Any] = {id(p): p for p in (*net.parameters(), *net.buffers())}
    new: nn.Module = copy.deepcopy(net, shared)
    for path, module in list(new.named_modules()):
        other = swap(path, module) if path else None
        if other is not None:
            parent, _, leaf = path.rpartition(".")
            setattr(new.get_submodule(parent), leaf, other)
    return new
