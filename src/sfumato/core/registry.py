"""Names for things: registering one makes it appear in the commands, the docs, the law tests and the bench."""

from __future__ import annotations

import ast
import difflib
import importlib
import inspect
import pkgutil
from collections.abc import Callable
from typing import Any, TypeVar

from sfumato.core.errors import InputError, UnknownName

T = TypeVar("T", bound=Callable[..., Any])


class Registry:
    """Factories by name. ``package`` is imported whole at the first look-up, so a new file in it is enough."""

    def __init__(self, kind: str, package: str | None = None) -> None:
        self.kind, self.package = kind, package
        self._made: dict[str, Callable[..., Any]] = {}
        self._loaded = package is None

    def register(self, *names: str, **numbers: Any) -> Callable[[T], T]:
        """Register a class or function; ``numbers`` are preset arguments: published names are configurations."""

        def keep(make: T) -> T:
            for name in names:
                if name in self._made:
                    raise InputError(f"{self.kind} {name!r} is registered twice")
                self._made[name] = _preset(make, numbers) if numbers else make
            return make

        return keep

    def get(self, name: str, /, **numbers: Any) -> Any:
        """Make the named thing with these numbers."""
        make = self.find(name)
        try:
            inspect.signature(make).bind(**numbers)
        except TypeError as error:
            allowed = ", ".join(str(p) for p in inspect.signature(make).parameters.values())
            takes = f"it takes: {allowed}" if allowed else "it takes no numbers"
            raise InputError(f"{self.kind} {name!r}: {error}; {takes}") from None
        return make(**numbers)

    def make(self, spec: str) -> Any:
        """From ``"name"`` or ``"name(number=value, ...)"``, the form that cards and the command line use."""
        name, bracket, rest = spec.partition("(")
        try:
            call: Any = ast.parse(f"_({rest}" if bracket else "_()", mode="eval").body
            numbers = {k.arg: ast.literal_eval(k.value) for k in call.keywords}
            if call.func.id != "_" or call.args or None in numbers:
                raise ValueError(spec)
        except (SyntaxError, AttributeError, TypeError, ValueError):
            raise InputError(
                f"{spec!r} is no {self.kind}: write name or name(number=value, other='word', ...)"
            ) from None
        return self.get(name.strip(), **numbers)

    def find(self, name: str) -> Callable[..., Any]:
        """The factory itself."""
        self._load()
        if name not in self._made:
            near = difflib.get_close_matches(str(name), self._made, 1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise UnknownName(f"no {self.kind} named {name!r}{hint}; there are: {', '.join(self.names())}")
        return self._made[name]

    def names(self) -> list[str]:
        """All registered names, sorted."""
        self._load()
        return sorted(self._made)

    def _load(self) -> None:
        if not self._loaded and self.package is not None:
            package = importlib.import_module(self.package)
            for module in pkgutil.iter_modules(package.__path__):
                if not module.name.startswith("_"):
                    importlib.import_module(f"{self.package}.{module.name}")
            self._loaded = True


def _preset(make: Callable[..., Any], numbers: dict[str, Any]) -> Callable[..., Any]:
    def configured(**more: Any) -> Any:
        return make(**{**numbers, **more})

    signature = inspect.signature(make)
    parameters = [p.replace(default=numbers.get(p.name, p.default)) for p in signature.parameters.values()]
    configured.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    configured.__doc__ = make.__doc__
    return configured
