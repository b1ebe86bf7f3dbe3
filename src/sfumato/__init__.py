"""sfumato: one algebra for diffusion models.

>>> import sfumato as sf
>>> mixture = sf.oracles.GaussianMixture(means=[[-2.0, 0.0], [2.0, 0.0]], stds=[0.3, 0.3])
>>> x = sf.sample(mixture.denoiser(sf.processes.VP()), steps=10, shape=(4, 2), seed=0)
"""

from __future__ import annotations

import importlib
import os
from typing import Any

# torch's threads spin while they wait: beside other work on the same cores that costs a hundred times what it saves
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__version__ = "0.1.0"

_MODULES = (
    "acceleration", "analysis", "codecs", "core", "denoisers", "editing", "evaluation", "gradients", "grids", "guidance", "networks", "objectives", "operators",
    "oracles", "processes", "recipes", "solvers", "training", "tuning", "zoo",
)  # fmt: skip
_NAMES = {
    "sample": "api", "trajectory": "api", "invert": "api", "load": "pipeline", "Pipeline": "pipeline",
    "from_diffusers": "interop", "as_diffusers_scheduler": "interop",
    "distill": "distillation", "edit": "editing.front", "tune": "tuning.tune", "SamplerCard": "tuning.card", "compare": "evaluation.compare", "cite": "recipes",
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
