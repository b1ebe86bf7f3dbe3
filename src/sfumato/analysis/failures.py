"""Adversarial search for what a text-to-image model gets wrong: over its noise, its prompts and its tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.core import InputError, Streams
from sfumato.tuning.inputs import Generator, Values, optimise, random_search

Z99 = 2.5758


@dataclass(frozen=True, eq=False)
class Margin:
    """D_k = mean_j [l_jk - max_(c != k) l_jc]: how surely an ensemble of classifiers sees class k; (B,).

    members  data (B, *) -> logits (B, K), at least two different ones
    label    k, (B,) int64 or one number
    """

    members: Sequence[Callable[[Tensor], Tensor]]
    label: Any

    def __post_init__(self) -> None:
        if len(self.members) < 2 or any(_same(a, b) for i, a in enumerate(self.members) for b in self.members[:i]):
            raise InputError(
                "an ensemble has at least two different members: what fools one classifier is no failure of the generator"
            )

    def __call__(self, x: Tensor) -> Tensor:
        return torch.stack([_margin(member(x), self.label) for member in self.members]).mean(0)

    @torch.no_grad()
    def rejected(self, x: Tensor) -> Tensor:
        """Where every member sees another class, (B,) bool."""
        return torch.stack([_margin(member(x), self.label) < 0 for member in self.members]).all(0)


def _margin(logits: Tensor, label: Any) -> Tensor:
    """l_k - max_(c != k) l_c of each item, (B,)."""
    k = torch.as_tensor(label, device=logits.device).expand(len(logits))
    if bool(((k < 0) | (k >= logits.shape[1])).any()):
        raise InputError(f"label = {label}: a class from 0 to {logits.shape[1] - 1}")
    own = logits.gather(1, k[:, None])[:, 0]
    return own - logits.scatter(1, k[:, None], -math.inf).amax(1)


def _same(a: Any, b: Any) -> bool:
    """Whether two classifiers are one: the same object, or modules of equal tensors."""
    if a is b:
        return True
    if not (isinstance(a, nn.Module) and isinstance(b, nn.Module)):
        return False
    one, two = a.state_dict(), b.state_dict()
    return one.keys() == two.keys() and len(one) > 0 and all(torch.equal(v, two[k]) for k, v in one.items())


@dataclass(frozen=True, eq=False)
class Shell:
    """Where typical noise N(0, I) in R^d lies: on the sphere of radius sqrt(d), here within ``radius`` sqrt(d) of ``start``.

    start   (B, *) or None: anywhere on the sphere
    radius  of the chord, in (0, 2]
    """

    start: Tensor | None = None
    radius: float = 2.0

    def __post_init__(self) -> None:
        if not 0 < self.radius <= 2:
            raise InputError(
                f"radius = {self.radius}: above 0 and at most 2, the diameter of the sphere in units of sqrt(d)"
            )

    def project(self, z: Tensor) -> Tensor:
        """The nearest allowed point: on the sphere, and turned back on the great circle towards ``start``."""
        unit = _unit(z)
        length = math.sqrt(z[0].numel())
        if self.start is None:
            return unit * length
        centre, angle = _unit(self.start), 2 * math.asin(self.radius / 2)
        cos = (unit * centre).flatten(1).sum(1).clamp(-1, 1).view(-1, *[1] * (z.ndim - 1))
        side = _unit(unit - cos * centre)
        turned = math.cos(angle) * centre + math.sin(angle) * side
        return torch.where(cos < math.cos(angle) - 1e-12, turned, unit) * length

    def typical(self, z: Tensor) -> Tensor:
        """Whether the mean, variance and kurtosis of an item's entries lie in the 99 % bands of N(0, I), (B,) bool."""
        flat = z.flatten(1).double()
        d, off = flat.shape[1], flat - flat.mean(1, keepdim=True)
        variance = off.square().mean(1)
        kurtosis = off.pow(4).mean(1) / variance.square()
        bands = ((flat.mean(1), 0.0, 1.0), (variance, 1.0, 2.0), (kurtosis, 3.0 - 6.0 / (d + 1), 24.0))
        return torch.stack([(v - middle).abs() <= Z99 * math.sqrt(spread / d) for v, middle, spread in bands]).all(0)


def _unit(z: Tensor) -> Tensor:
    """Items (B, *) scaled to norm 1."""
    size = z.flatten(1).norm(dim=1).clamp(min=torch.finfo(z.dtype).tiny)
    return z / size.view(-1, *[1] * (z.ndim - 1))


@dataclass(frozen=True)
class Failures:
    """What a search found: noise (B, *), its score (the smaller the worse), samples, and whether all members reject them
    while the noise is typical. ``history`` (n, B) holds the scores."""

    x: Tensor
    score: Tensor
    samples: Tensor
    rejected: Tensor
    history: Tensor

    @torch.no_grad()
    def confirmed(self, judges: Sequence[Callable[[Tensor], Tensor]], label: Any) -> Tensor:
        """Those that every judge (data -> logits), none of which took part in the search, rejects too; (B,) bool."""
        against = [_margin(judge(self.samples), label) < 0 for judge in judges]
        return torch.stack([self.rejected, *against]).all(0)


def latent_search(
    generate: Generator,
    x: Tensor,
    cond: Mapping[str, Any],
    score: Margin,
    *,
    shell: Shell,
    steps: int = 40,
    lr: float = 0.05,
) -> Failures:
    """min_z score(G(z, cond)) over typical noise, by the gradient through the run; the best of each item is kept.

    x   (B, *) where it begins: noise whose samples are right, or success is inflated
    lr  how far each step goes along the normalised gradient, in units of sqrt(d)

    Source: Liu, Kortylewski, Bai, Bai, Yuille, 2024, "Discovering Failure Modes of Text-guided Diffusion Models via Adversarial
    Search".
    """

    def loss(given: Values) -> Tensor:
        return score(generate(given["x"], cond))

    found = optimise(
        {"x": shell.project(x)},
        loss,
        steps=steps,
        lr=lr,
        rule="normalised",
        project=lambda given: {"x": shell.project(given["x"])},
    )
    return _failures(generate, cond, score, shell, found)


def random_latents(
    generate: Generator,
    x: Tensor,
    cond: Mapping[str, Any],
    score: Margin,
    *,
    shell: Shell,
    tries: int = 120,
    seed: int = 0,
) -> Failures:
    """The worst of ``tries`` random noises in the shell: what :func:`latent_search` is compared with at equal cost."""
    streams = Streams.of(seed, len(x))

    def propose(i: int) -> Values:
        streams.at(i + 1)
        fresh = streams.normal(x)
        if shell.start is None:
            return {"x": shell.project(fresh)}
        return {"x": shell.project(_unit(shell.start) * math.sqrt(x[0].numel()) + shell.radius * fresh)}

    return _failures(
        generate, cond, score, shell, random_search(propose, lambda given: score(generate(given["x"], cond)), tries)
    )


@torch.no_grad()
def _failures(generate: Generator, cond: Mapping[str, Any], score: Margin, shell: Shell, found: Any) -> Failures:
    """A search's best noises with their samples, and whether these are failures of typical noise."""
    x = found.values["x"]
    samples = generate(x, cond)
    return Failures(x, found.loss, samples, score.rejected(samples) & shell.typical(x), found.history)


@torch.no_grad()
def stability(
    generate: Generator, x: Tensor, cond: Mapping[str, Any], failed: Callable[[Tensor], Tensor], *, delta: float = 0.05,
    tries: int = 8, seed: int = 0,
) -> Tensor:  # fmt: skip
    """The share of ``tries`` perturbations x + delta N(0, I), put back on the sphere, that fail as well, (B,): a failure is a
    region of the noise and no point."""
    streams, shell, share = Streams.of(seed, len(x)), Shell(), x.new_zeros(len(x), dtype=torch.float32)
    for i in range(tries):
        streams.at(i + 1)
        share += failed(generate(shell.project(x + delta * streams.normal(x)), cond)).float() / tries
    return share


@dataclass(frozen=True)
class Worded:
    """A prompt, its loss, the losses of every prompt that was tried, by prompt."""

    prompt: str
    loss: float
    tried: Mapping[str, float]


def prompt_search(
    loss: Callable[[Mapping[str, Any]], Tensor],
    conditions: Callable[[Sequence[str]], Mapping[str, Tensor]],
    template: str,
    slots: Sequence[Sequence[str]],
    start: Sequence[str],
    *,
    budget: int = 24,
    top: int = 3,
    guided: bool = True,
    seed: int = 0,
) -> Worded:
    """The prompt of a template whose pictures are worst, found word by word.

    For slot i in turn, with the gradient g of the loss by the conditions c of the present prompt, each word w of the slot is
    ranked by the first-order loss <c(w) - c, g>; the ``top`` untried ones are generated, and the best prompt is kept. The
    conditions of a candidate are those of the whole prompt, so contextual encoders need no gradient of their own.

    loss        conditions of one prompt (1, *) -> one number, differentiable, small where the pictures are wrong
    conditions  prompts -> what the model reads
    template    natural words with a "{}" a slot; slots: the words of each; start: one word of each
    budget      how many prompts may be generated; a gradient counts as two of them
    guided      False takes untried words by chance and spends nothing on gradients: the comparison

    Source: Liu, Kortylewski, Bai, Bai, Yuille, 2024, "Discovering Failure Modes of Text-guided Diffusion Models via Adversarial
    Search" (their policy asks a language model for natural words; here the words of the slots are natural by construction).
    """
    _worded(template, slots, start)
    draw, now, tried, spent, idle, turn = torch.Generator().manual_seed(seed), list(start), {}, 1.0, 0, 0

    def measured(words: Sequence[str]) -> float:
        with torch.no_grad():
            return float(loss(conditions([template.format(*words)])))

    tried[template.format(*now)] = measured(now)
    while spent < budget and idle < len(slots):
        slot = turn % len(slots)
        words = [[*now[:slot], w, *now[slot + 1 :]] for w in slots[slot]]
        words = [w for w in words if template.format(*w) not in tried]
        turn, idle = turn + 1, idle + 1
        if not words:
            continue
        if guided and len(words) > top:
            rank = _first_order(loss, conditions, template.format(*now), [template.format(*w) for w in words])
            spent += 2.0
        else:
            rank = torch.rand(len(words), generator=draw)
        for i in rank.argsort()[:top].tolist():
            if spent + 1 > budget:
                break
            spent, idle = spent + 1, 0
            tried[template.format(*words[i])] = value = measured(words[i])
            if value < tried[template.format(*now)]:
                now = words[i]
    return Worded(template.format(*now), tried[template.format(*now)], tried)


def _worded(template: str, slots: Sequence[Sequence[str]], start: Sequence[str]) -> None:
    """InputError unless there is a list of words for each slot, and a start among them."""
    fits = len(slots) == template.count("{}") == len(start)
    if not fits or any(w not in words for w, words in zip(start, slots, strict=True)):
        raise InputError(
            f"{template!r} needs one list of words a slot, and a start among them: got {len(slots)} lists, start {list(start)}"
        )


def _first_order(
    loss: Callable[[Mapping[str, Any]], Tensor],
    conditions: Callable[[Sequence[str]], Mapping[str, Tensor]],
    prompt: str,
    others: Sequence[str],
) -> Tensor:
    """<c(other) - c(prompt), d loss / d c> for each of the others, (N,)."""
    own = {k: v.detach() for k, v in conditions([prompt]).items()}
    leaves = {k: v.requires_grad_() for k, v in own.items() if v.is_floating_point()}
    with torch.enable_grad():
        slopes = torch.autograd.grad(loss({**own, **leaves}).sum(), list(leaves.values()), allow_unused=True)
    theirs = conditions(others)
    total = torch.zeros(len(others), device=next(iter(theirs.values())).device)
    for (name, value), slope in zip(leaves.items(), slopes, strict=True):
        if slope is not None:
            total += ((theirs[name] - value.detach()) * slope).flatten(1).sum(1)
    return total


__all__ = ["Failures", "Margin", "Shell", "Worded", "latent_search", "prompt_search", "random_latents", "stability"]
