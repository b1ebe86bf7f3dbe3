"""The same model in less work: caches, token selection, pruning, quantisation. Each is a wrapper or a new network."""

from sfumato.acceleration.caching import Cached, around, cached, deepcache, every, operations

__all__ = ["Cached", "around", "cached", "deepcache", "every", "operations"]
