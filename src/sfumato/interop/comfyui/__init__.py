"""sfumato in ComfyUI: put this folder into ``custom_nodes`` and install sfumato in ComfyUI's environment.

Three nodes: a sampler, its sigmas, and a guidance that replaces the model's.
"""

from __future__ import annotations

try:
    from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
except ImportError as error:  # ComfyUI shows the reason and goes on without this pack
    raise ImportError(f"the sfumato nodes need sfumato: pip install sfumato ({error})") from error

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
