"""Measurements, their adjoints and their proximal maps; compositions and stacks of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from sfumato.core import Context, InputError, State, linear, tree_map


def inner(a: State, b: State) -> Tensor:
    """Re <a, b> of each item, (B,): over all entries and all parts of a tree; complex entries count as two reals."""
    if isinstance(a, Mapping):
        assert isinstance(b, Mapping)
        return torch.stack([inner(a[k], b[k]) for k in a]).sum(0)
    assert isinstance(b, Tensor)
    if a.is_complex():
        a, b = torch.view_as_real(a), torch.view_as_real(b)
    return (a * b).flatten(1).sum(1)


def conjugate_gradient(apply: Callable[[Tensor], Tensor], b: Tensor, iterations: int = 50) -> Tensor:
    """x with apply(x) = b, for a symmetric positive (semi-)definite ``apply`` of (B, *), each item on its own.

    From 0, so a singular consistent system gets its solution of least norm. A fixed number of iterations and no look at the
    values: an item whose residual has reached round-off stays where it is. Source: Hestenes & Stiefel, 1952, "Methods of
    Conjugate Gradients for Solving Linear Systems".
    """
    if iterations < 1:
        raise InputError(f"iterations = {iterations}: at least 1")
    x, r = torch.zeros_like(b), b
    p, size = b, inner(b, b)
    least = size * torch.finfo(b.dtype).eps ** 2
    for _ in range(iterations):
        moved = apply(p)
        curvature = inner(p, moved)
        going = (size > least) & (curvature > 0)
        step = torch.where(going, size / torch.where(going, curvature, 1.0), 0.0)
        x, r = linear(1.0, x, step, p), linear(1.0, r, -step, moved)
        before, size = size, torch.where(going, inner(r, r), size)
        p = linear(1.0, r, torch.where(going, size / torch.where(going, before, 1.0), 0.0), p)
    return x


class Operator:
    """y = A(x) + noise N(0, I) for states x (B, *).

    linear      whether A is: the rest of this list needs it
    noise       std of the noise in each real number of y; 0 is an exact measurement
    parameters  names of what ``__call__`` takes beside x (a gain, a kernel that is estimated)
    tight       c where A A* = c I on the range of A (orthonormal rows scaled): then ``pinv`` and ``prox`` are closed forms
    iterations  of the conjugate gradients that serve where there is none

    A linear operator gives ``apply`` and ``adjoint``; a non-linear one ``apply`` alone. Where x is real and y complex, the
    inner product of y is the real part, so the adjoint is real.
    """

    linear: bool = True
    noise: float = 0.0
    parameters: tuple[str, ...] = ()
    tight: float | None = None
    iterations: int = 50

    def apply(self, x: Any, **phi: Any) -> Any:
        """A(x)."""
        raise NotImplementedError(f"{type(self).__name__} must say what it measures: write apply(x)")

    def adjoint(self, y: Any) -> Any:
        """A* y: Re <A x, y> = <x, A* y>."""
        if not self.linear:
            raise InputError(f"{type(self).__name__} is not linear, so it has no adjoint: use its gradient")
        raise NotImplementedError(f"{type(self).__name__} is linear: write its adjoint(y)")

    def __call__(self, x: Any, **phi: Any) -> Any:
        """A(x), without noise."""
        if unknown := set(phi) - set(self.parameters):
            raise InputError(
                f"{type(self).__name__} takes no {sorted(unknown)}; it takes {list(self.parameters) or 'none'}"
            )
        return self.apply(x, **phi)

    def measure(self, x: Any, ctx: Context, **phi: Any) -> Any:
        """A(x) + noise, drawn from the streams of the context."""
        y = self(x, **phi)
        return y if self.noise == 0 else self.restrict(_noisy(y, self.noise, ctx))

    def restrict(self, y: Any) -> Any:
        """y without what is not measured: entries that a mask leaves out are 0."""
        return y

    def misfit(self, x: Any, y: Any, **phi: Any) -> Tensor:
        """|A(x) - y|^2 of each item, (B,), over what is measured."""
        gap = self.restrict(linear(1.0, self(x, **phi), -1.0, y))
        return inner(gap, gap)

    def residual(self, x: Any, y: Any, **phi: Any) -> Tensor:
        """-log p(y | x) up to a constant, (B,): |A(x) - y|^2 / (2 noise^2). Raises InputError for an exact measurement."""
        if self.noise == 0:
            raise InputError(f"{type(self).__name__} has noise = 0, so its likelihood is no density: use misfit()")
        return self.misfit(x, y, **phi) / (2 * self.noise**2)

    def pull(self, y: Any) -> Any:
        """A* y / noise^2 (A* y for an exact measurement): what a gap in y says about x."""
        return linear(1.0 if self.noise == 0 else self.noise**-2, self.adjoint(y))

    def pinv(self, y: Any) -> Any:
        """The x of least norm among those that fit y best (Moore-Penrose); by conjugate gradients unless ``tight``."""
        back = self.adjoint(y)
        if self.tight is not None:
            return linear(1.0 / self.tight, back)
        return conjugate_gradient(lambda u: self.adjoint(self(u)), back, self.iterations)

    def prox(self, x: Any, y: Any, variance: float | Tensor) -> Any:
        """argmin_u -log p(y | u) + |u - x|^2 / (2 variance): the posterior mean where u ~ N(x, variance I).

        variance  a number, or (B,), one an item; infinite or with ``noise`` = 0 it is the projection x + pinv(y - A x)
        """
        if isinstance(variance, (int, float)) and variance == 0:
            return x
        gap = linear(1.0, y, -1.0, self(x))
        if self.noise == 0 or (isinstance(variance, float) and math.isinf(variance)):
            return linear(1.0, x, 1.0, self.pinv(gap))
        return linear(1.0, x, 1.0, self._correction(gap, variance))

    def _correction(self, gap: Any, variance: float | Tensor) -> Any:
        """(1 / variance + A* A / noise^2)^-1 A* gap / noise^2."""
        if self.tight is not None:
            return linear(variance / (variance * self.tight + self.noise**2), self.adjoint(gap))
        pulled = linear(variance, self.pull(gap))
        return conjugate_gradient(lambda u: linear(1.0, u, variance, self.pull(self(u))), pulled, self.iterations)

    def __matmul__(self, other: Operator) -> Compose:
        return Compose(self, other)


class Compose(Operator):
    """``outer @ inner``: y = outer(inner(x)) + noise of the outer one. Raises InputError where the inner one has noise."""

    def __init__(self, outer: Operator, inner: Operator) -> None:
        if inner.noise:
            raise InputError(
                f"noise = {inner.noise} inside a composition is not noise of y: give it to the outer operator"
            )
        self.outer, self.inner, self.noise = outer, inner, outer.noise
        self.linear = outer.linear and inner.linear
        self.parameters = (*outer.parameters, *inner.parameters)
        self.iterations = max(outer.iterations, inner.iterations)

    def apply(self, x: Any, **phi: Any) -> Any:
        inside = self.inner(x, **{k: v for k, v in phi.items() if k in self.inner.parameters})
        return self.outer(inside, **{k: v for k, v in phi.items() if k in self.outer.parameters})

    def adjoint(self, y: Any) -> Any:
        return self.inner.adjoint(self.outer.adjoint(y))

    def restrict(self, y: Any) -> Any:
        return self.outer.restrict(y)


class Stack(Operator):
    """Several measurements of one x: y is the mapping {name: A_name(x)}, and each part has its own noise."""

    def __init__(self, parts: Mapping[str, Operator]) -> None:
        if not parts:
            raise InputError("a stack has at least one operator: stack(name=operator, ...)")
        noises = [part.noise for part in parts.values()]
        if any(noises) != all(noises):
            raise InputError(f"noises {noises}: either every part of a stack is exact, or none is")
        self.parts = dict(parts)
        self.linear = all(part.linear for part in parts.values())
        self.noise = max(noises)  # says whether there is any; each part is weighted by its own
        self.parameters = tuple({name: None for part in parts.values() for name in part.parameters})
        self.iterations = max(part.iterations for part in parts.values())

    def apply(self, x: Any, **phi: Any) -> dict[str, Any]:
        return {k: part(x, **{n: v for n, v in phi.items() if n in part.parameters}) for k, part in self.parts.items()}

    def adjoint(self, y: Any) -> Any:
        return linear(*(v for k, part in self.parts.items() for v in (1.0, part.adjoint(y[k]))))

    def restrict(self, y: Any) -> Any:
        return {k: part.restrict(y[k]) for k, part in self.parts.items()}

    def pull(self, y: Any) -> Any:
        return linear(*(v for k, part in self.parts.items() for v in (1.0, part.pull(y[k]))))

    def residual(self, x: Any, y: Any, **phi: Any) -> Tensor:
        each = [
            part.residual(x, y[k], **{n: v for n, v in phi.items() if n in part.parameters})
            for k, part in self.parts.items()
        ]
        return torch.stack(each).sum(0)

    def measure(self, x: Any, ctx: Context, **phi: Any) -> Any:
        return {
            k: part.measure(x, ctx, **{n: v for n, v in phi.items() if n in part.parameters})
            for k, part in self.parts.items()
        }


def stack(**parts: Operator) -> Stack:
    """The operators under these names as one, see :class:`Stack`."""
    return Stack(parts)


class Function(Operator):
    """Any differentiable function of x (and of named parameters) as a non-linear operator."""

    linear = False

    def __init__(self, fn: Callable[..., Any], noise: float = 0.0, parameters: tuple[str, ...] = ()) -> None:
        self.fn, self.noise, self.parameters = fn, check_noise(noise), parameters

    def apply(self, x: Any, **phi: Any) -> Any:
        return self.fn(x, **phi)

    def pinv(self, y: Any) -> Any:
        raise InputError("a non-linear operator has no pseudo-inverse: use guidance by its gradient")

    def prox(self, x: Any, y: Any, variance: float | Tensor) -> Any:
        raise InputError("a non-linear operator has no closed proximal map: use guidance by its gradient")


def check_noise(noise: float) -> float:
    """The noise as a float, if it is one and not negative."""
    if not (isinstance(noise, (int, float)) and noise >= 0):
        raise InputError(f"noise = {noise!r}: the standard deviation, a number and not negative")
    return float(noise)


def _noisy(y: Any, noise: float, ctx: Context) -> Any:
    if ctx.rng is None:
        raise InputError("this context may not draw (seed=None), but the measurement has noise")
    rng = ctx.rng

    def one(part: Tensor) -> Tensor:
        if not part.is_complex():
            return part + noise * rng.normal(part)
        real = torch.view_as_real(part)
        return torch.view_as_complex((real + noise * rng.normal(real)).contiguous())

    return tree_map(one, y)
