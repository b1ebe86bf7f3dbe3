"""Denoisers: wrapped networks and exact oracles."""

from sfumato.denoisers.parametrized import Parametrized, parametrized

__all__ = ["Parametrized", "parametrized"]
