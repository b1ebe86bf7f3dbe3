"""Denoisers: wrapped networks and exact oracles."""

from sfumato.denoisers.converted import Converted, converted
from sfumato.denoisers.parametrized import Parametrized, parametrized
from sfumato.denoisers.potential import Potential

__all__ = ["Converted", "Parametrized", "Potential", "converted", "parametrized"]
