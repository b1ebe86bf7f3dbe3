"""The same model in less work: caches, token selection, pruning, quantisation. Each is a wrapper or a new network."""

from sfumato.acceleration._registry import get, names, register, registry
from sfumato.acceleration.caching import Cached, around, cached, deepcache, every
from sfumato.acceleration.calibration import Calibration, denoised, noised
from sfumato.acceleration.counting import operations
from sfumato.acceleration.integers import int8
from sfumato.acceleration.kernels import onednn
from sfumato.acceleration.merging import Merged, token_merging
from sfumato.acceleration.quantization import quantized
from sfumato.acceleration.regions import RegionAdaptive, region_adaptive

__all__ = [
    "Cached",
    "Calibration",
    "Merged",
    "RegionAdaptive",
    "around",
    "cached",
    "deepcache",
    "denoised",
    "every",
    "get",
    "int8",
    "names",
    "noised",
    "onednn",
    "operations",
    "quantized",
    "region_adaptive",
    "register",
    "registry",
    "token_merging",
]
