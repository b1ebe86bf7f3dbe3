"""sfumato: one algebra for diffusion models.

>>> import sfumato as sf
>>> mixture = sf.oracles.GaussianMixture(means=[[-2.0, 0.0], [2.0, 0.0]], stds=[0.3, 0.3])
>>> x = sf.sample(mixture.denoiser(sf.processes.VP()), steps=10, shape=(4, 2), seed=0)
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_MODULES = (
    "codecs", "core", "denoisers", "evaluation", "grids", "guidance", "networks", "objectives", "oracles", "processes",
    "recipes", "solvers", "training", "zoo",
)  # fmt: skip
_NAMES = {
    "sample": "api", "trajectory": "api", "invert": "api", "load": "pipeline", "Pipeline": "pipeline",
    "parametrized": "denoisers", "Context": "core", "Step": "core", "SfumatoError": "core",
}  # fmt: skip

__all__ = ["__version__", *_MODULES, *_NAMES]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"sfumato.{name}")
    if name in _NAMES:
        return getattr(importlib.import_module(f"sfumato.{_NAMES[name]}"), name)
    raise AttributeError(f"module 'sfumato' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
