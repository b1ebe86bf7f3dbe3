"""Guidance by a loss of the clean sample: the one idea behind classifier, measurement and feature guidance."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from sfumato.core import Context, Denoiser, Guidance, InputError, Posterior, Wrapper, column, linear

Cost: TypeAlias = Callable[..., Tensor]
"""(x0, cond) -> (B,): see :func:`loss`."""

THROUGH = ("network", "belief", "state")
WEIGHTS = ("tweedie", "spread", "constant")
KEEPS = ("x", "eps", "flow", "v")


def belief_variance(coef: Any, data_std: float) -> Any:
    """sigma^2 / (alpha^2 + sigma^2 / data_std^2): of x0 given x_t where x0 ~ N(., data_std^2 I); infinite if both are blind."""
    if data_std == 0:
        return 0.0
    total = coef.alpha**2 + (0.0 if math.isinf(data_std) else coef.sigma**2 / data_std**2)
    if not isinstance(total, Tensor) and total == 0:
        return math.inf
    return coef.sigma**2 / total


def tweedie(coef: Any, spread: Any) -> Any:
    """sigma^2 / alpha, which takes a gradient of log p(y | x_t) in x_t to E[x0 | x_t, y] - E[x0 | x_t]; ``spread`` where alpha = 0."""
    if isinstance(coef.alpha, Tensor):
        return torch.where(coef.alpha == 0, spread, coef.sigma**2 / coef.alpha)
    return coef.sigma**2 / coef.alpha if coef.alpha else spread


def through_network(
    inner: Denoiser, x: Tensor, t: Any, ctx: Context, say: Callable[[Tensor], tuple[Tensor, Tensor | None]]
) -> tuple[Posterior, Tensor, Tensor]:
    """(belief, slope in x, slope in x0) of what is said of E[x0 | x], by one backward pass through the network.

    say  E[x0 | x] -> (outputs, cotangents); the cotangents of a scalar are None

    Where the caller itself differentiates in x the graph is kept, otherwise nothing of it comes back.
    """
    keep = torch.is_grad_enabled() and x.requires_grad
    with torch.enable_grad():
        at = x if keep else x.detach().requires_grad_()
        post = inner(at, t, ctx)
        mean = _gaussian(post).mean
        outputs, pull = say(mean)
        pull = pull if keep or pull is None else pull.detach()
        slope, away = _slopes(outputs, (at, mean), pull, keep)
    return post if keep else detached(post), slope, away


def detached(post: Posterior) -> Posterior:
    """The belief without its graph."""
    aux = {k: v.detach() if isinstance(v, Tensor) else v for k, v in post.aux.items()}
    return replace(post, native=post.native.detach(), x=post.x.detach(), aux=aux)


class LossGuided(Wrapper):
    """See :func:`loss`. A subclass that moves x0 otherwise overrides ``move``."""

    def __init__(
        self,
        inner: Denoiser,
        cost: Cost,
        scale: Any = 1.0,
        through: str = "network",
        interval: tuple[float, float] | None = None,
        weight: Any = None,
        keep: str = "x",
        codec: Any = None,
        features: Sequence[str] = (),
        normalise: bool = False,
        limit: float = math.inf,
        data_std: float = 0.5,
    ) -> None:
        super().__init__(inner)
        weight = ("spread" if through == "belief" else "tweedie") if weight is None else weight
        for name, value, known in (("through", through, THROUGH), ("weight", weight, WEIGHTS), ("keep", keep, KEEPS)):
            if value not in known and not (name == "weight" and callable(value)):
                raise InputError(f"{name} = {value!r}: one of {', '.join(known)}")
        if interval is not None and not 0 <= interval[0] < interval[1] <= 1:
            raise InputError(f"interval = {interval}: (low, high) with 0 <= low < high <= 1 in time t")
        if features and through != "network":
            raise InputError(f"features of the network have gradients only with through='network', not {through!r}")
        if not (limit > 0 and data_std > 0):
            raise InputError(f"limit = {limit} and data_std = {data_std}: both positive")
        self.cost, self.scale, self.through, self.interval = cost, scale, through, interval
        self.weight, self.keep, self.codec, self.features = weight, keep, codec, tuple(features)
        self.normalise, self.limit, self.data_std = normalise, limit, data_std

    def forward(self, x: Tensor, t: Any, ctx: Context) -> Posterior:
        coef, scale = self.process.coef(t), self.strength(t)
        if _zero(scale) or _zero(coef.sigma):  # at sigma = 0 the state is the data: nothing is believed
            return self.inner(x, t, ctx)  # type: ignore[no-any-return]
        if self.through == "belief":
            post = _gaussian(self.inner(x, t, ctx))
            return self._with(post, self.move(post.mean, scale, coef, ctx))
        if self.through == "state":
            post, slope = _gaussian(self.inner(x, t, ctx)), gradient(lambda u: self.value(u, ctx.cond, t), x)
            return self._with(post, self.moved(slope, scale, coef))
        seen: dict[str, Any] = {}
        taps = [(path, _reader(path, seen)) for path in self.features]
        said = (seen,) if self.features else ()
        post, slope, away = through_network(
            self.inner, x, t, ctx.fork(taps=taps), lambda x0: (self.value(x0, ctx.cond, *said).sum(), None)
        )
        # where nothing of x0 is left in x, the slope in x0 itself is all there is
        slope = where_blind(coef, away, slope)
        return self._with(post, self.moved(slope, scale, coef))

    def value(self, x: Tensor, cond: Mapping[str, Any], *more: Any) -> Tensor:
        """The cost of each item, (B,), of x0 (or of the state), decoded where there is a codec."""
        value = self.cost(x if self.codec is None else self.codec.decode(x), cond, *more)
        if not isinstance(value, Tensor) or value.shape != (len(x),):
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise InputError(
                f"a cost gives one number an item, ({len(x)},), not {got}: sum over all but the first axis"
            )
        return value

    def strength(self, t: Any) -> Any:
        """The scale at t: 0 outside the interval, row by row with a clock an item."""
        scale = self.scale(t) if callable(self.scale) else self.scale
        if self.interval is None:
            return scale
        low, high = self.interval
        if isinstance(t, Tensor):
            return torch.where((low <= t) & (t <= high), scale, 0.0)
        return scale if low <= t <= high else 0.0

    def move(self, x0: Tensor, scale: Any, coef: Any, ctx: Context) -> Tensor:
        """How far x0 goes where the network is skipped: one gradient step."""
        return self.moved(gradient(lambda u: self.value(u, ctx.cond), x0), scale, coef)

    def moved(self, slope: Tensor, scale: Any, coef: Any) -> Tensor:
        """- scale weight slope, normalised and limited item by item."""
        if self.normalise:
            size = rms(slope)
            slope = slope / torch.where(size > 0, size, 1.0)
        move = linear(-1.0, linear(scale, linear(self._weight(coef), slope)))
        if math.isinf(self.limit):
            return move  # type: ignore[no-any-return]
        return move * (self.limit / rms(move).clamp(min=self.limit))  # type: ignore[no-any-return]

    def _weight(self, coef: Any) -> Any:
        """The weight of the gradient at these coefficients."""
        if callable(self.weight):
            return self.weight(coef)
        if self.weight == "constant":
            return 1.0
        spread = belief_variance(coef, self.data_std)
        if self.weight == "spread":
            return spread
        return tweedie(coef, spread)

    def _with(self, post: Posterior, move: Tensor) -> Posterior:
        """The belief with x0 moved while what ``keep`` names stays."""
        keep = () if self.keep == "x" else (self.keep,)
        try:
            return post.but(keep=keep, x0=linear(1.0, post.mean, 1.0, move))
        except InputError as error:
            raise InputError(
                f"where alpha = {post.coef.alpha:g} the {self.keep} of this process says x0 itself, so x0 cannot move while it stays: "
                "guide below that time (interval=, strength=), or keep='x'"
            ) from error


def where_blind(coef: Any, one: Tensor, other: Tensor) -> Tensor:
    """``one`` for items whose alpha is 0 (a state that says nothing of x0), ``other`` for the rest."""
    if not isinstance(coef.alpha, Tensor):
        return one if coef.alpha == 0 else other
    return torch.where(column(coef.alpha == 0, one).bool(), one, other)


def gradient(fn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The gradient at x of fn (B, *) -> (B,), item by item; under an outer derivative in x it keeps its graph."""
    keep = torch.is_grad_enabled() and x.requires_grad
    with torch.enable_grad():
        at = x if keep else x.detach().requires_grad_()
        return _slopes(fn(at).sum(), (at,), None, keep)[0]


def rms(x: Tensor) -> Tensor:
    """The root mean square of each item, (B, 1, ...)."""
    return x.flatten(1).square().mean(1).sqrt().view(-1, *[1] * (x.ndim - 1))


def _slopes(outputs: Tensor, at: tuple[Tensor, ...], pull: Tensor | None, keep: bool) -> tuple[Tensor, ...]:
    """The gradients of the outputs in each of ``at``, 0 where one does not reach them."""
    if not outputs.requires_grad:
        raise InputError(
            "the cost has no gradient: write it in differentiable tensor operations, or steer by a black box with svdd"
        )
    found = torch.autograd.grad(outputs, at, pull, create_graph=keep, allow_unused=True)
    return tuple(torch.zeros_like(x) if g is None else g for g, x in zip(found, at, strict=True))


def _reader(path: str, seen: dict[str, Any]) -> Callable[..., Any]:
    """A tap that puts what its submodule says into ``seen``."""

    def around(ctx: Context, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        seen[path] = call(*args, **kwargs)
        return seen[path]

    return around


def _gaussian(post: Any) -> Posterior:
    """The belief itself; InputError where it is none about numbers."""
    if not isinstance(post, Posterior):
        raise InputError(f"a {type(post).__name__} belief has no gradient to move it by: steer its kernel with svdd")
    return post


def _zero(value: Any) -> bool:
    """Whether it is the number 0; tensors are not looked at, which would wait for a device."""
    return not isinstance(value, Tensor) and value == 0


def loss(
    cost: Cost,
    scale: float | Tensor | Callable[[Any], Any] = 1.0,
    *,
    through: str = "network",
    interval: tuple[float, float] | None = None,
    weight: str | Callable[[Any], Any] | None = None,
    keep: str = "x",
    codec: Any = None,
    features: Sequence[str] = (),
    normalise: bool = False,
    limit: float = math.inf,
    data_std: float = 0.5,
) -> Guidance:
    """Lower a cost of the clean sample while it is drawn: x0 <- x0 - scale weight(t) gradient, at every call.

    If exp(-scale cost) is read as the likelihood p(y | x_t), Tweedie's formula for the conditional score is this with the
    weight sigma^2 / alpha and the gradient in x_t.

    cost       (x0, cond) -> (B,), one number an item that depends on that item alone; x0 (B, *) in the space of the process,
               or what ``codec`` makes of it; cond the conditions of the run. -log p(y | x0) makes ``scale`` = 1 exact
    scale      a number, one an item (B,), or a function of the time t
    through    'network'  gradient in x_t of cost(E[x0 | x_t]), by a backward pass through the network (Chung et al. 2023)
               'belief'   gradient in x0 itself: the network's Jacobian is skipped, no backward pass (Bansal et al. 2023)
               'state'    gradient in x_t of cost(x_t, cond, t): a time-dependent model of noisy states (Dhariwal, Nichol 2021)
    interval   (low, high): guide only while low <= t <= high
    weight     'tweedie' sigma^2 / alpha (the spread where alpha = 0), 'spread' sigma^2 / (alpha^2 + sigma^2 / data_std^2), the
               variance of x0 given x_t, 'constant' 1, or a function of the coefficients (``.alpha``, ``.sigma``).
               None: 'spread' with through='belief', else 'tweedie'
    keep       what stays while x0 moves: 'x' (eps follows), or 'eps', 'v', 'flow' (the state follows: it is moved itself, as
               'ddim' and 'ddpm' see; ``steering.follow`` makes any solver see it)
    features   paths of submodules of the network: their outputs come as a third argument, cost(x0, cond, {path: output}),
               with the rows of that call (under an inner cfg the conditional ones, then the unconditional)
    normalise  divide the gradient of each item by its root mean square: scale weight is how far x0 moves
    limit      the largest root mean square of a move

    Put it outside of guidance that stacks rows, ``loss(...)(cfg(3.0)(denoiser))``, where the cost holds tensors of one row an
    item. At sigma = 0 nothing moves. Raises InputError for a cost without gradient or of another shape.
    Sources: Dhariwal, Nichol, 2021, "Diffusion Models Beat GANs on Image Synthesis"; Chung, Kim, McCann, Klasky, Ye, 2023,
    "Diffusion Posterior Sampling"; Bansal et al. 2023, "Universal Guidance for Diffusion Models".
    """
    return lambda inner: LossGuided(
        inner, cost, scale, through, interval, weight, keep, codec, features, normalise, limit, data_std
    )


__all__ = [
    "LossGuided",
    "belief_variance",
    "detached",
    "gradient",
    "loss",
    "rms",
    "through_network",
    "tweedie",
    "where_blind",
]
