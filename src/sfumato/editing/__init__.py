"""Edits with a frozen model: invert, mix, steer, drag and fill. ``edit`` is the one front door."""

from sfumato.editing.base import INPUTS, Method, Task, get, names, register, registry
from sfumato.editing.enlarging import enlarge
from sfumato.editing.front import Edited, edit, perform

__all__ = ["INPUTS", "Edited", "Method", "Task", "edit", "enlarge", "get", "names", "perform", "register", "registry"]
