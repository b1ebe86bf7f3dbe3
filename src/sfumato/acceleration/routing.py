"""A prompt decides which of a few small networks serves it: the router, its code book, and the denoiser of experts."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.acceleration.pruning import Structure, materialize
from sfumato.core import Context, Denoiser, InputError, Posterior

OFFSET, TEMPERATURE, EDGE = 3.0, 0.4, 1e-6
GAIN = 8.0  # of the code book: with an optimiser's steps of 0.03 a code crosses its range in tens of iterations
MEDIAN = 0.36651292  # of the Gumbel law, -ln(ln 2)
EXPERT = "expert"


def relaxed(logits: Tensor, structure: Structure, noise: Tensor | None = None, hard: bool = True) -> Tensor:
    """Gates (B, size) of logits (B, size), 0 or 1 in value with the gradients of their relaxation (straight through).

    widths  a = sigmoid((logit + G + 3) / 0.4), G the ``noise`` (Gumbel); each part keeps at least its best
    blocks  q = cumulative sums of softmax(logits) from the first removed to the last, a = sigmoid((ln(q / (1 - q)) + G + 3) /
            0.4): blocks close in one order, the middle ones first, and the softmax says how many

    hard=False gives a itself; without noise G is its median, so that a gate is what it is more often than not. Source: Ganjdanesh et al., 2024, "Not All Prompts Are Made Equal".
    """
    noise = torch.full_like(logits, MEDIAN) if noise is None else noise
    wide = structure.size - len(structure.widths)
    widths = torch.sigmoid((logits[:, :wide] + noise[:, :wide] + OFFSET) / TEMPERATURE)
    q = logits[:, wide:].softmax(-1).cumsum(-1).clamp(EDGE, 1 - EDGE)
    depth = torch.sigmoid((q.logit() + noise[:, wide:] + OFFSET) / TEMPERATURE)
    places = removal(len(structure.widths))
    depth = torch.empty_like(depth).scatter(1, torch.tensor(places).expand(len(depth), -1), depth)
    depth = torch.where(structure.whole, depth, 1.0)  # some blocks cannot be passed by
    soft = torch.cat([widths, depth], -1)
    if not hard:
        return soft
    closed = (soft >= 0.5).to(soft.dtype)
    blocks, _ = structure.split(soft)
    at = 0
    for block in blocks:
        for gates in block.values():
            n = gates.shape[-1]
            best = F.one_hot(gates.argmax(-1), n).to(soft.dtype)
            closed = torch.cat([closed[:, :at], torch.maximum(closed[:, at : at + n], best), closed[:, at + n :]], -1)
            at += n
    return closed + soft - soft.detach()


def removal(depth: int) -> list[int]:
    """The order in which blocks close: the middle first, the outermost last."""
    return sorted(range(depth), key=lambda i: (abs(i - (depth - 1) / 2), i))


def architecture(gates: Tensor, structure: Structure) -> Tensor:
    """Unit vectors (B, D) of gates: widths times the gate of their block over sqrt(n), which compare architectures."""
    blocks, depth = structure.split(gates)
    parts = [
        g * depth[..., i : i + 1] / g.shape[-1] ** 0.5 for i, block in enumerate(blocks) for g in block.values()
    ]  # fmt: skip
    return F.normalize(torch.cat(parts, -1), dim=-1, eps=1e-6)


@torch.no_grad()
def sinkhorn(scores: Tensor, temperature: float = 0.05, iterations: int = 3) -> Tensor:
    """The soft assignment (B, N) of B items to N codes of which each gets about its share: the iterates of optimal transport.

    Q = exp(scores / temperature), its columns scaled to 1/N and its rows to 1/B in turn. Raises InputError for fewer items
    than codes. Source: Cuturi, 2013, "Sinkhorn Distances"; its use: Caron et al., 2020, "SwAV".
    """
    b, n = scores.shape
    if b < n:
        raise InputError(f"{b} items for {n} codes: balanced shares need at least as many items")
    log = scores.double() / temperature
    for _ in range(iterations):
        log = log - log.logsumexp(0, keepdim=True) - torch.log(torch.tensor(float(n)))
        log = log - log.logsumexp(1, keepdim=True) - torch.log(torch.tensor(float(b)))
    return (log.exp() * b).to(scores.dtype)


class PromptRouter(nn.Module):
    """Embeddings of prompts (B, width) -> logits of gates, and the code book of ``experts`` architectures.

    forward gives the logits of the prompts' own architectures; :meth:`assign` the nearest code. One linear head a part of
    each block, and one for the blocks.
    """

    def __init__(self, width: int, structure: Structure, experts: int = 4, seed: int = 0) -> None:
        super().__init__()
        if experts < 1:
            raise InputError(f"experts = {experts}: at least one")
        self.structure, self.width = structure, width
        sizes = [n for block in structure.widths for n in block.values()] + [len(structure.widths)]
        draw = torch.Generator().manual_seed(seed)
        self.heads = nn.ModuleList(nn.Linear(width, n) for n in sizes)
        for head in self.heads:
            nn.init.normal_(head.weight, std=width**-0.5, generator=draw)  # type: ignore[arg-type]
            nn.init.zeros_(head.bias)  # type: ignore[arg-type]
        flat = torch.randn(max(structure.size, experts), experts, generator=draw)
        self.book = nn.Parameter(torch.linalg.qr(flat)[0].T[:, : structure.size].contiguous())

    @property
    def codes(self) -> Tensor:
        """The logits of the code book (N, size), orthogonal at the start."""
        return GAIN * self.book

    def forward(self, embedding: Tensor) -> Tensor:
        z = F.normalize(embedding, dim=-1, eps=1e-6) * self.width**0.5
        return torch.cat([head(z) for head in self.heads], -1)

    def scores(self, embedding: Tensor) -> Tensor:
        """Cosines (B, N) of the prompts' architectures with the codes'."""
        ours = architecture(relaxed(self(embedding), self.structure, hard=False), self.structure)
        theirs = architecture(relaxed(self.codes, self.structure, hard=False), self.structure)
        return ours @ theirs.T

    @torch.no_grad()
    def assign(self, embedding: Tensor) -> Tensor:
        """The expert of each prompt (B,) int64: the code of the greatest cosine. The zero vector is a prompt like others."""
        return self.scores(embedding).argmax(1)

    @torch.no_grad()
    def gather(self, embedding: Tensor, iterations: int = 12) -> None:
        """Put the codes where prompts are: the mean logits of groups of prompts that are alike and evenly shared.

        Groups are clusters on the unit sphere (spherical k-means) whose assignment is that of transport; they begin at prompts
        that are far from each other. InputError for fewer prompts than codes.
        """
        logits, n = self(embedding), len(self.book)
        ours = F.normalize(embedding, dim=-1, eps=1e-6)
        chosen = [int((ours @ ours.mean(0)).argmin())]
        while len(chosen) < n:
            chosen.append(int((ours @ ours[chosen].T).amax(1).argmin()))
        index = sinkhorn(ours @ ours[chosen].T).argmax(1)
        for _ in range(iterations):
            groups = F.one_hot(index, n).to(ours.dtype)
            middle = F.normalize(groups.T @ ours, dim=-1, eps=1e-6)
            index = sinkhorn(ours @ middle.T).argmax(1)
        groups = F.one_hot(index, n).to(logits.dtype)
        held = groups.sum(0) > 0
        mean = (groups.T @ logits) / groups.sum(0).clamp(min=1)[:, None]
        self.book.data = torch.where(held[:, None], mean / GAIN, self.book.data)

    @torch.no_grad()
    def gates(self) -> Tensor:
        """Hard gates (N, size) of the codes."""
        return relaxed(self.codes, self.structure)


class Routed(Denoiser):
    """Each item is denoised by its expert: the batch is split by the condition 'expert' (B,) int64, and put together again.

    ``told(cond)`` adds it, read from the prompt once a run: guidance changes the prompt but not the expert, since 'expert'
    has no null. Without it the prompt of the call decides. ``embedding`` is the condition that the router reads.
    """

    def __init__(self, experts: Sequence[Denoiser], router: PromptRouter, embedding: str = "vector") -> None:
        super().__init__()
        if len(experts) != len(router.codes):
            raise InputError(f"{len(experts)} experts for a router of {len(router.codes)} codes")
        self.experts, self.router, self.embedding = nn.ModuleList(experts), router, embedding
        self.process, self.null = experts[0].process, experts[0].null

    def told(self, cond: Mapping[str, Any]) -> dict[str, Any]:
        """The conditions and the expert of each item."""
        if self.embedding not in cond:
            raise InputError(f"the router reads {self.embedding!r}, the conditions are {sorted(cond)}")
        return {**cond, EXPERT: self.router.assign(cond[self.embedding])}

    def forward(self, x: Tensor, t: Any, ctx: Context) -> Posterior:
        cond = dict(ctx.cond if EXPERT in ctx.cond else self.told(ctx.cond))
        index = cond.pop(EXPERT)
        if index.shape != (len(x),) or not bool(((index >= 0) & (index < len(self.experts))).all()):
            raise InputError(f"expert is {tuple(index.shape)}: ({len(x)},) whole numbers below {len(self.experts)}")
        native: Any = None
        for e in index.unique().tolist():
            rows = (index == e).nonzero().flatten()
            clock = t[rows] if isinstance(t, Tensor) else t
            part = ctx.fork(f"expert {e}", cond={k: v[rows] for k, v in cond.items()})
            post = self.experts[e](x[rows], clock, part)
            native = torch.empty_like(x, dtype=post.native.dtype) if native is None else native
            native = native.index_copy(0, rows, post.native)
        return dataclasses.replace(post, native=native, x=x, coef=self.process.coef(t))

    @staticmethod
    def of(denoiser: Denoiser, router: PromptRouter, embedding: str = "vector") -> Routed:
        """Experts cut out of one denoiser by the router's codes, each with weights of its own."""
        experts = [copy.deepcopy(materialize(denoiser, router.structure, gates.round())) for gates in router.gates()]
        return Routed(experts, router, embedding)


__all__ = ["EXPERT", "PromptRouter", "Routed", "architecture", "relaxed", "removal", "sinkhorn"]
