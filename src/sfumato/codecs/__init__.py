"""Codecs: data <-> the space the process runs in."""

from __future__ import annotations

from sfumato.codecs.base import Codec, build, names, register, to_float, to_uint8
from sfumato.codecs.kl import KL
from sfumato.codecs.pixels import Identity

__all__ = ["KL", "Codec", "Identity", "build", "names", "register", "to_float", "to_uint8"]
