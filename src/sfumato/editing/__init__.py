"""Edits with a frozen model: invert, mix, steer, drag and fill. ``edit`` is the one front door."""

from sfumato.editing.base import INPUTS, Method, Task, get, names, register, registry
from sfumato.editing.enlarging import enlarge
from sfumato.editing.front import Edited, edit, perform
from sfumato.editing.inversion import Inverted, invert
from sfumato.editing.methods.magicmix import mix
from sfumato.editing.recorded import NoiseMaps, record

__all__ = [
    "INPUTS", "Edited", "Inverted", "Method", "NoiseMaps", "Task", "edit", "enlarge", "get", "invert", "mix", "names", "perform", "record",
    "register", "registry",
]  # fmt: skip
