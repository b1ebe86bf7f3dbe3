"""How much work a run is: the operations of its matrix products and convolutions, of floats and of integers alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from math import prod
from typing import Any

import torch

counting: ContextVar[bool] = ContextVar("counting", default=False)
"""Whether operations are being counted: then what runs on an engine that torch does not see runs in torch."""


def operations(run: Callable[[], Any]) -> int:
    """Floating-point operations of everything that ``run()`` computes with matrix products and convolutions (torch's count).

    Products of 8-bit integers count as those of floats: a layer is the same work in either (its speed is not). Attention
    runs as its two products meanwhile, since torch does not count the fused kernel of every processor, and a network that
    another engine computes (``int8(backend=...)``) runs in torch.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    token = counting.set(True)
    try:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=_formulas()) as counter:
            run()
    finally:
        counting.reset(token)
    return int(counter.get_total_flops())


def _formulas() -> dict[Any, Callable[..., int]]:
    """Torch's kernels of 8-bit integers, which its counter does not know, and the operations of their shapes."""
    kernels: dict[Any, Callable[..., int]] = {torch.ops.aten._int_mm: _product}
    if hasattr(torch.ops.onednn, "qlinear_pointwise"):
        kernels |= {torch.ops.onednn.qlinear_pointwise: _linear, torch.ops.onednn.qconv2d_pointwise: _convolution}
    return kernels


def _product(left: Sequence[int], right: Sequence[int], *args: Any, out_shape: Sequence[int], **kwargs: Any) -> int:
    """Of (M, K) and (K, N)."""
    return 2 * prod(left) * right[1]


def _linear(x: Sequence[int], scale: Any, zero: Any, weight: Sequence[int], *args: Any, out_shape: Sequence[int], **kwargs: Any) -> int:  # fmt: skip
    """Of tokens (..., I) and a packed weight (I, O)."""
    return 2 * prod(x) * out_shape[-1]


def _convolution(x: Sequence[int], scale: Any, zero: Any, weight: Sequence[int], *args: Any, out_shape: Sequence[int], **kwargs: Any) -> int:  # fmt: skip
    """Of maps (B, C, H, W) and a weight (O, C / groups, h, w)."""
    return 2 * prod(out_shape) * prod(weight[1:])


__all__ = ["counting", "operations"]
