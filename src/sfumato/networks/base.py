"""What every network shares: a name and a JSON configuration that rebuilds it."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import nn

from sfumato.core.errors import InputError
from sfumato.core.registry import Registry

Made = TypeVar("Made", bound=type[nn.Module])
registry = Registry("network", package="sfumato.networks")


def configured(cls: Made) -> Made:
    """Class decorator: each instance keeps its constructor arguments in `.config`, JSON-able.

    A network among them becomes its name and config, which `as_network` turns back.
    """
    signature, construct = inspect.signature(cls.__init__), cls.__init__
    rest = next((p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), "")

    @functools.wraps(construct)
    def __init__(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        given = dict(list(bound.arguments.items())[1:])
        given |= given.pop(rest, {})
        config = json.loads(json.dumps(given, default=_plain))
        construct(self, *args, **kwargs)
        if type(self) is cls:
            self.config = config

    cls.__init__ = __init__  # type: ignore[method-assign]
    return cls


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, nn.Module) and hasattr(value, "network_name"):
        return {"name": value.network_name, "config": value.config}
    raise InputError(f"an argument must be JSON-able or a registered network, {type(value).__name__} is not: {value!r}")


def register(name: str) -> Callable[[Made], Made]:
    """Class decorator: file the class under `name` (its `network_name`) and make its instances keep their `config`."""

    def decorate(cls: Made) -> Made:
        cls.network_name = name  # type: ignore[attr-defined]
        return registry.register(name)(configured(cls))

    return decorate


def names() -> list[str]:
    """The names that `build` knows."""
    return registry.names()


def build(name: str, config: Mapping[str, Any] | None = None) -> nn.Module:
    """The network `name` made with the arguments `config`: `build(net.network_name, net.config)` is built like `net`.

    Raises UnknownName for a name that is not registered, InputError for arguments that it does not take.
    """
    return registry.get(name, **(config or {}))


def as_network(value: nn.Module | Mapping[str, Any]) -> nn.Module:
    """The network itself, or the one that {"name": ..., "config": ...} describes."""
    if isinstance(value, nn.Module):
        return value
    if not isinstance(value, Mapping) or "name" not in value or set(value) - {"name", "config"}:
        raise InputError(f'a network is given as a module or as {{"name": ..., "config": {{...}}}}; got {value!r}')
    return build(value["name"], value.get("config"))
