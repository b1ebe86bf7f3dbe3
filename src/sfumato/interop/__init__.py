"""At home with other libraries: diffusers pipelines and schedulers both ways, safetensors, ONNX, k-diffusion and ComfyUI.

Everything is imported when it is first used: ``import sfumato`` needs none of these libraries.
"""

from __future__ import annotations

import importlib
from typing import Any

_NAMES = {
    "from_diffusers": "importing", "Imported": "importing", "as_diffusers_scheduler": "scheduler",
    "SolverScheduler": "scheduler", "SfumatoPipeline": "pipelines", "to_diffusers": "pipelines", "Law": "law", "Schedule": "law",
    "export": "exporting", "FORMATS": "exporting", "k_sampler": "kdiffusion",
    "k_sigmas": "kdiffusion", "k_guidance": "kdiffusion",
}  # fmt: skip

__all__ = [*_NAMES]


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module(f"sfumato.interop.{_NAMES[name]}"), name)
    raise AttributeError(f"module 'sfumato.interop' has no attribute {name!r}")
