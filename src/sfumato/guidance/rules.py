"""Which of several prompts conditions a step: by turns, by chance, or by what is believed so far."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from sfumato.core import Context, Guidance, InputError, Streams, mix
from sfumato.guidance._registry import register
from sfumato.guidance.prompts import Belief, selected

Scorer = Callable[[Tensor], Tensor]
"""x0 (B, *) -> (B, M): how well each item already shows each prompt."""


@dataclass(frozen=True)
class Alternating:
    """The prompts in turn, ``every`` so many steps."""

    every: int = 1

    def __post_init__(self) -> None:
        if self.every < 1:
            raise InputError(f"every = {self.every} steps: at least 1")

    def __call__(self, ctx: Context, last: Belief | None, prompts: int) -> Tensor:
        return torch.full((ctx.batch,), ctx.run.step // self.every % prompts)


@dataclass(frozen=True)
class Switched:
    """The prompts one after another: with two, the second after the share ``at`` of the steps; with more, equal parts."""

    at: float | None = None

    def __post_init__(self) -> None:
        if self.at is not None and not 0 <= self.at <= 1:
            raise InputError(f"at = {self.at}: a share of the steps, in [0, 1]")

    def __call__(self, ctx: Context, last: Belief | None, prompts: int) -> Tensor:
        if self.at is not None and prompts != 2:
            raise InputError(
                f"at = {self.at} switches between two prompts, not {prompts}: leave it out for equal parts"
            )
        done = ctx.run.step / (ctx.run.total or 1)
        now = int(done >= self.at) if self.at is not None else int(done * prompts)
        return torch.full((ctx.batch,), now)


@dataclass(frozen=True)
class Random:
    """A fair die an item and step, from streams beside those of the noise."""

    def __call__(self, ctx: Context, last: Belief | None, prompts: int) -> Tensor:
        if ctx.rng is None:
            raise InputError("this context may not draw (seed=None), but a random choice was asked for")
        own = Streams(tuple((mix(key, 0x5E1EC7), i) for key, i in ctx.rng.seeds), ctx.run.step)
        return (own.uniform(torch.empty(ctx.batch, 1, dtype=torch.float64))[:, 0] * prompts).long()


@dataclass(frozen=True)
class Lowest:
    """The prompt that the belief shows least, by the scorer; the first prompt at the first step."""

    scorer: Scorer

    def __call__(self, ctx: Context, last: Belief | None, prompts: int) -> Tensor:
        scores = scored(self.scorer, ctx, last, prompts)
        return torch.zeros(ctx.batch, dtype=torch.long) if scores is None else scores.argmin(1)


def scored(scorer: Scorer, ctx: Context, last: Belief | None, prompts: int) -> Tensor | None:
    """(B, M) float64 scores of the last belief, or None at the first step. InputError for another shape, or no memory."""
    if last is None:
        if ctx.run.step:
            raise InputError("this run begins in its middle: go on with the ctx= that holds its last belief")
        return None
    scores = scorer(last.x0)
    if scores.shape != (len(last.x0), prompts):
        raise InputError(f"the scorer gave {tuple(scores.shape)} for {len(last.x0)} items and {prompts} prompts")
    return scores.double().cpu()


@dataclass(frozen=True)
class Cosine:
    """scale (offset + cos(encode(decode(x0)), text)), a :data:`Scorer`.

    decode  state -> images in the range that ``encode`` reads; encode: images -> features (B, d)
    texts   (M, d), or (B, M, d) for prompts of their own an item
    offset  1 keeps scores positive for encoders whose cosines are not
    """

    decode: Callable[[Tensor], Tensor]
    encode: Callable[[Tensor], Tensor]
    texts: Tensor
    scale: float = 100.0
    offset: float = 0.0

    def __call__(self, x0: Tensor) -> Tensor:
        with torch.no_grad():
            seen = normalize(self.encode(self.decode(x0)), dim=-1)
            texts = normalize(self.texts.to(seen), dim=-1)
            return self.scale * (self.offset + (texts @ seen[..., None]).squeeze(-1))


def log_call_price(spot: Tensor, strike: Tensor | float, rate: float, volatility: float, maturity: float) -> Tensor:
    """log C of the Black-Scholes call C = Phi(d1) S - Phi(d2) K e^(-r tau), float64, without under- or overflow.

    d1 = (ln(S / K) + (r + v^2 / 2) tau) / (v sqrt tau), d2 = d1 - v sqrt tau. Below the strike it is evaluated as
    S e^(-d1^2 / 2) (erfcx(-d1 / sqrt 2) - erfcx(-d2 / sqrt 2)) / 2, since S e^(-d1^2 / 2) = K e^(-r tau) e^(-d2^2 / 2).
    """
    spot, strike = spot.double(), torch.as_tensor(strike, dtype=torch.float64)
    width = volatility * math.sqrt(maturity)
    d1 = ((spot / strike).log() + (rate + volatility**2 / 2) * maturity) / width
    d2 = d1 - width
    low, high = (d1.clamp(max=0), d2.clamp(max=-width)), (d1.clamp(min=0), d2.clamp(min=-width))
    gap = torch.special.erfcx(-low[0] / math.sqrt(2)) - torch.special.erfcx(-low[1] / math.sqrt(2))
    below = spot.log() - low[0] ** 2 / 2 + (gap / 2).log()
    phi = torch.special.ndtr(high[0]), torch.special.ndtr(high[1])
    above = (spot * phi[0] - strike * math.exp(-rate * maturity) * phi[1]).log()
    return torch.where(d1 < 0, below, above)


def gaussian_price(spot: Tensor, strike: Tensor | float, rate: float, volatility: float, maturity: float) -> Tensor:
    """The released code's price, with exp(-u^2 / 2) in the place of Phi: exactly 0 for every spot, up to rounding."""
    spot, strike = spot.double(), torch.as_tensor(strike, dtype=torch.float64)
    width = volatility * math.sqrt(maturity)
    d1 = ((spot / strike).log() + (rate + volatility**2 / 2) * maturity) / width
    d2 = d1 - width
    return (-(d1**2) / 2).exp() * spot - (-(d2**2) / 2).exp() * strike * math.exp(-rate * maturity)


@dataclass(frozen=True)
class BlackScholes:
    """The prompt whose option is cheapest: scores are spot prices, the remaining steps the maturity.

    scorer  positive scores (B, M), 100 cos of CLIP in the publication
    strike  one, or one a prompt; rate: a step's, by default 1 / steps
    unit    the interval of time whose posterior std is the volatility (1/1000: one step of the usual training schedules)
    kernel  'cdf': the call price. With equal strikes it grows with the spot price, so the choice is *identical* to
            :class:`Lowest`; other strikes weigh the prompts. 'pdf': what the published code computes; that is 0 whatever
            the scores, so rounding chooses (the last prompt where prices tie). Use it for comparison only.

    The first prompt conditions the first step. Source: Kothandaraman, Lin, Manocha, 2024, "Financial Models in Generative
    Art: Black-Scholes-Inspired Concept Blending in Text-to-Image Diffusion".
    """

    scorer: Scorer
    strike: float | Sequence[float] = 100.0
    rate: float | None = None
    kernel: str = "cdf"
    unit: float = 1e-3

    def __post_init__(self) -> None:
        if self.kernel not in ("cdf", "pdf"):
            raise InputError(f"kernel = {self.kernel!r}: 'cdf' (the call price) or 'pdf' (the published code)")
        if not (min(self._strikes()) > 0 and 0 < self.unit < 1):
            raise InputError(f"strike = {self.strike}, unit = {self.unit}: positive, and a unit of time below 1")

    def _strikes(self) -> list[float]:
        """The strike of each prompt, or the one of all."""
        return [self.strike] if isinstance(self.strike, (int, float)) else list(self.strike)

    def __call__(self, ctx: Context, last: Belief | None, prompts: int) -> Tensor:
        scores = scored(self.scorer, ctx, last, prompts)
        if scores is None or last is None:
            return torch.zeros(ctx.batch, dtype=torch.long)
        return self.choose(scores, ctx.run.total or ctx.run.step, ctx.run.step - 1, self.volatility(last))

    def volatility(self, last: Belief) -> float:
        """The posterior std of one unit of time down from the last step's time, at least 1e-4."""
        a, b = last.process.coef(last.t), last.process.coef(max(0.0, last.t - self.unit))
        variance = a.sigma**2 - (a.alpha / b.alpha * b.sigma) ** 2 if b.alpha else a.sigma**2
        return max(1e-4, b.sigma / a.sigma * math.sqrt(max(variance, 0.0))) if a.sigma else 1e-4

    def choose(self, scores: Tensor, steps: int, step: int, volatility: float) -> Tensor:
        """Indices (B,) for scores (B, M) after step ``step`` of ``steps``."""
        if not bool((scores > 0).all()):
            raise InputError(f"a spot price is positive, not {float(scores.min()):g}: give the scorer an offset")
        strikes = torch.tensor(self._strikes(), dtype=torch.float64)
        rate = 1 / steps if self.rate is None else self.rate
        if self.kernel == "cdf":
            price = log_call_price(scores, strikes, rate, volatility, steps - step)
            cheapest = price <= price.amin(1, keepdim=True)
            return scores.masked_fill(~cheapest, math.inf).argmin(1)  # ties: the lower score
        price = gaussian_price(scores, strikes, rate, volatility, steps - step)
        m = scores.shape[1]
        return m - 1 - price.flip(1).argmin(1)  # ties: the last prompt


@register("alternating")
def alternating(every: int = 1) -> Guidance:
    """:class:`Alternating` prompts."""
    return selected(Alternating(every))


@register("switched")
def switched(at: float | None = None) -> Guidance:
    """:class:`Switched` prompts."""
    return selected(Switched(at))


__all__ = [
    "Alternating", "BlackScholes", "Cosine", "Lowest", "Random", "Scorer", "Switched", "alternating", "gaussian_price",
    "log_call_price", "switched",
]  # fmt: skip
