"""Linear layers by oneDNN: the BLAS behind nn.Linear is fast on the processors of its own maker only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

LEAST = 1 << 21
"""Multiplications of a product below which the call of the kernel costs more than it saves."""
_KERNEL: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., I) weight^T (O, I) + bias (O,): ``F.linear`` to rounding, with the derivatives it has.

    Large products of float32 tokens (B, N, I) on a CPU run in oneDNN's kernel, everything else as always: vectors, other
    types and devices, autocast, torch.func's transforms, tracing and compiling. What it gains on a machine:
    ``python benchmarks/training_speed.py --network transformer``.
    """
    return _Product.apply(x, weight, bias) if _suits(x, weight) else F.linear(x, weight, bias)  # type: ignore[no-any-return, no-untyped-call]


class Linear(nn.Linear):
    """nn.Linear by :func:`linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


@contextmanager
def fast_products(network: nn.Module) -> Iterator[None]:
    """Every plain nn.Linear inside a network runs as :class:`Linear` meanwhile: same parameters, hooks and names."""
    plain = [module for module in network.modules() if type(module) is nn.Linear]
    for module in plain:
        module.__class__ = Linear
    try:
        yield
    finally:
        for module in plain:
            module.__class__ = nn.Linear


def _suits(x: Tensor, weight: Tensor) -> bool:
    return (
        x.ndim > 2
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() * weight.shape[0] >= LEAST
        and _KERNEL is not None
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._are_functorch_transforms_active()  # the kernel has no rules for them
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # type: ignore[no-untyped-call]
    )


def _times(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return _KERNEL(x, weight, bias, "none", [], "")  # type: ignore[no-any-return]


class _Product(torch.autograd.Function):
    """The kernel and its derivatives, which are products too and have derivatives again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.save_for_forward(x, weight)
        return _times(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (grad,), (x, weight) = grads, ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        rows = grad.flatten(0, -2)
        return (
            _Product.apply(grad, weight.t(), None) if for_x else None,  # type: ignore[no-untyped-call]
            _Product.apply(rows.t(), x.flatten(0, -2).t(), None) if for_weight else None,  # type: ignore[no-untyped-call]
            rows.sum(0) if for_bias else None,
        )

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        (x, weight), (along_x, along_weight, along_bias) = ctx.saved_tensors, tangents
        terms = [] if along_x is None else [F.linear(along_x, weight)]
        terms += [] if along_weight is None else [F.linear(x, along_weight)]
        terms += [] if along_bias is None else [along_bias.expand(*x.shape[:-1], -1)]
        return reduce(torch.add, terms)


def _operations(x: Sequence[int], weight: Sequence[int], *args: Any, out_shape: Sequence[int], **kwargs: Any) -> int:
    """What torch.utils.flop_counter is told of the kernel."""
    return 2 * prod(x) * weight[0]


if _KERNEL is not None:
    register_flop_formula(_KERNEL)(_operations)


__all__ = ["Linear", "fast_products", "linear"]
