"""Directions of one image: the leading singular vectors of the Jacobian of the belief in the features."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sfumato.core import Context, Denoiser, InputError, Streams
from sfumato.denoisers.features import bottleneck, changing, features


class Spectrum(NamedTuple):
    """J v_j = s_j u_j for each of B items.

    values (B, k), falling; right (B, k, *) orthonormal v_j; left (B, k, *) orthonormal u_j
    residual (B, k): |J^T J v_j - s_j^2 v_j| / s_1^2, what the iterations have left
    """

    values: Tensor
    right: Tensor
    left: Tensor
    residual: Tensor


def singular_vectors(
    jvp: Callable[[Tensor], Tensor], vjp: Callable[[Tensor], Tensor], start: Tensor, k: int, iterations: int
) -> Spectrum:
    """The k leading singular triples of a linear map J an item, known by its products only.

    jvp    (B, q, *) -> (B, q, *): J v, row by row; vjp: J^T u the other way
    start  (B, q, *) any q >= k vectors: what is beyond k makes it converge faster

    Subspace iteration: Q <- orth(J^T J Q), the power iteration of all vectors at once, so that clustered singular values
    do not stall it; then the small problem J Q = U S W^T turns the basis. The error of triple j falls like
    (s_(q+1) / s_j)^(2 iterations). The number of iterations is fixed: item i never depends on the batch.
    Source: Halko, Martinsson, Tropp, 2011, "Finding Structure with Randomness"; with one vector after another: Haas et al.
    2024, "Discovering Interpretable Directions in the Semantic Latent Space of Diffusion Models".
    """
    if not 1 <= k <= start.shape[1] or iterations < 1:
        raise InputError(f"k = {k} of {start.shape[1]} vectors, {iterations} iterations: 1 <= k <= vectors, at least 1")
    basis = _orthonormal(start)
    for _ in range(iterations):
        basis = _orthonormal(vjp(jvp(basis)))
    image = jvp(basis)
    left, values, turn = torch.linalg.svd(image.flatten(2).transpose(1, 2), full_matrices=False)
    right = (turn @ basis.flatten(2))[:, :k]
    left, values = left.transpose(1, 2)[:, :k], values[:, :k]
    sign = right.gather(2, right.abs().argmax(2, keepdim=True)).sign()  # the largest entry is positive
    right, left = (right * sign).reshape(basis[:, :k].shape), (left * sign).reshape(len(left), k, *image.shape[2:])
    square = values.square().reshape(*values.shape, *[1] * (right.ndim - 2))
    gap = vjp(jvp(_padded(right, basis)))[:, :k] - square * right
    largest = values[:, :1].square().clamp(min=torch.finfo(values.dtype).tiny)
    return Spectrum(values, right, left, gap.flatten(2).norm(dim=2) / largest)


def jacobian_directions(
    denoiser: Denoiser,
    x: Tensor,
    t: float,
    k: int = 3,
    *,
    cond: Mapping[str, Any] | None = None,
    path: str | None = None,
    mask: Tensor | None = None,
    reading: str = "x0",
    iterations: int = 12,
    extra: int = 3,
    seed: int = 0,
) -> Spectrum:
    """The directions of h (one submodule's output) that change the belief at (x, t) most: singular vectors of d f / d h.

    f is the reading ('x0', 'eps', ...) of the belief, times ``mask`` (B or 1, 1, *) in the space of the state if there is one: then
    what changes inside the mask counts only. Each iteration costs a forward-mode and a reverse-mode pass of k + extra rows
    an item. ``right`` are the directions in h; ``left`` what they do to the reading.

    Raises InputError for an empty mask. Source: Haas et al. 2024.
    """
    path = bottleneck(denoiser) if path is None else path
    if mask is not None and not bool((mask != 0).flatten(1).any(1).all()):
        raise InputError("a mask is empty: no direction can change anything inside it")
    q, n = k + extra, len(x)
    base = Context.of(n, None, cond=dict(cond or {}), dtype=x.dtype, device=x.device)
    with torch.no_grad():
        h = features(denoiser, x, t, base, [path])[1][path]
    q = min(q, h[0].numel())
    start = Streams.of(seed, n).normal(x.new_empty(n, q, *h.shape[1:]))
    many = {c: v.repeat_interleave(q, 0) if isinstance(v, Tensor) and len(v) == n else v for c, v in base.cond.items()}
    ctx = base.fork(cond=many, batch=n * q)
    rows = x.repeat_interleave(q, 0)
    window = None if mask is None else mask.expand(n, *mask.shape[1:]).repeat_interleave(q, 0)

    def believed(shift: Tensor) -> Tensor:
        told = denoiser(rows, t, ctx.fork(taps=[changing(path, lambda out: out + shift)])).view(reading)
        return told if window is None else told * window.to(told)

    def stacked(product: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda v: product(v.flatten(0, 1)).detach().unflatten(0, (n, q))

    still = torch.zeros_like(start).flatten(0, 1)
    with _Spelled():
        pull: Any = torch.func.vjp(believed, still)[1]
        return singular_vectors(
            stacked(lambda v: torch.func.jvp(believed, (still,), (v,))[1]), stacked(lambda u: pull(u)[0]),
            start, k, iterations,
        )  # fmt: skip


class _Spelled(TorchFunctionMode):
    """While it lasts, in this thread only, what has no forward-mode derivative as a fused kernel runs as its definition:
    attention, and group normalisation of channels-last maps.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return torch.ops.aten._scaled_dot_product_attention_math(*args, **(kwargs or {}))[0]
        if func is F.group_norm:
            return _group_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _group_norm(
    x: Tensor, groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """Group normalisation as its definition, which can be differentiated forward and in batches."""
    parts = x.reshape(len(x), groups, -1)
    variance, mean = torch.var_mean(parts, 2, correction=0, keepdim=True)
    y = ((parts - mean) * (variance + eps).rsqrt()).reshape(x.shape)
    shape = (1, -1, *[1] * (x.ndim - 2))
    y = y if weight is None else y * weight.view(shape)
    return y if bias is None else y + bias.view(shape)


def _orthonormal(vectors: Tensor) -> Tensor:
    """An orthonormal basis (B, q, *) of what q vectors span."""
    basis = torch.linalg.qr(vectors.flatten(2).transpose(1, 2)).Q
    return basis.transpose(1, 2).reshape(vectors.shape)


def _padded(right: Tensor, basis: Tensor) -> Tensor:
    """The k vectors beside others that only fill the rows that the products expect."""
    return torch.cat([right, basis[:, right.shape[1] :]], 1)


__all__ = ["Spectrum", "jacobian_directions", "singular_vectors"]
