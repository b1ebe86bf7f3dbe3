"""The attentions of a network, and a fused attention that runs as its definition while it is being watched."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sfumato.core import InputError
from sfumato.networks.layers import Attention

PLAIN = ("AttnProcessor2_0", "FusedAttnProcessor2_0", "IPAdapterAttnProcessor2_0")


class Opened(TorchFunctionMode):
    """While it lasts, in this thread only, the first fused attention runs as its definition, edited on the way.

    edit  (what, value) -> value: "keys" are keys and values side by side (R, heads, L, 2 d), "maps" the probabilities
    maps  whether the probabilities are asked for; otherwise the kernel stays fused
    """

    def __init__(self, edit: Callable[[str, Tensor], Tensor], maps: bool) -> None:
        super().__init__()
        self.edit, self.maps, self.done = edit, maps, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention or self.done:
            return func(*args, **kwargs)
        self.done = True
        return self._attend(*args, **kwargs)

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        """softmax(scale q k^T + mask) v with the edits put in."""
        if dropout_p or is_causal or enable_gqa:
            raise InputError("attention with dropout, causal or grouped queries cannot be controlled: call net.eval()")
        both = self.edit("keys", torch.cat([key, value], -1))
        times = both.shape[-2] // key.shape[-2]
        key, value = both.split([key.shape[-1], value.shape[-1]], -1)
        mask = attn_mask if attn_mask is None or times == 1 else torch.cat([attn_mask] * times, -1)
        if not self.maps:
            return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
        scores = query @ key.transpose(-2, -1) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
        return self.edit("maps", scores.softmax(-1)) @ value


def sites(net: nn.Module) -> dict[str, nn.Module]:
    """The attentions of a network that can be controlled, by path. Raises InputError where there are none or one cannot."""
    found: dict[str, nn.Module] = {}
    for path, module in net.named_modules():
        if path.startswith("control."):
            continue
        if isinstance(module, Attention):
            found[path] = module
        elif hasattr(module, "processor") and any(c.__module__.startswith("diffusers.") for c in type(module).__mro__):
            name = type(module.processor).__name__
            if name not in PLAIN:
                raise InputError(
                    f"{path} attends with {name}, which cannot be controlled (joint, added-key and linear attention and "
                    f"older processors are not); these can: {', '.join(PLAIN)}"
                )
            found[path] = module
    if not found:
        raise InputError(f"a {type(net).__name__} has no attention that can be controlled")
    return found


__all__ = ["Opened", "sites"]
