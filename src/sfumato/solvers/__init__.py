"""How a state moves between times. A new file in this folder that registers a solver is all there is to adding one."""

from sfumato.solvers._budget import calls, steps_within
from sfumato.solvers._registry import get, names, register, registry

__all__ = ["calls", "get", "names", "register", "registry", "steps_within"]
