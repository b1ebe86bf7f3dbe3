"""Solver to Solver: steerings choose, move or restart the states that a solver makes, and compose by nesting."""

from sfumato.steering.follow import Follow, follow
from sfumato.steering.svdd import SoftValueDecoding, svdd

__all__ = ["Follow", "SoftValueDecoding", "follow", "svdd"]
