"""Prompt-tailored pruning: the architectures of a few experts and the router to them, learnt under a budget of work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.acceleration.pruning import gating
from sfumato.acceleration.routing import MEDIAN, PromptRouter, architecture, relaxed, sinkhorn
from sfumato.core import Context, Denoiser, Frozen, InputError, Loss, Objective
from sfumato.objectives.denoising import drop
from sfumato.objectives.distill._common import streams
from sfumato.objectives.times import Times, Uniform
from sfumato.objectives.weights import weight


class PromptPruning(Objective):
    """Learn a router and a code book of architectures so that a pruned network denoises well at a mean cost of ``target``.

        L = min-SNR denoising loss + 0.2 |prediction - full prediction|^2 + 2 |ln(mean r / p)| + contrast L_con
            + 0.1 (1 - max r - std r)

    with r the share of the gated work that an item's architecture keeps and p what ``target`` leaves of it. L_con is the cross
    entropy between row softmaxes of the similarities, over 0.03, of architectures and of prompts in a batch: similar prompts
    get similar architectures. For ``warmup`` iterations each item uses its own architecture; then the code it is assigned to,
    by the balanced shares of optimal transport (``transport``; without it, the nearest). The noise of the gates falls to
    nothing over a training of known length, so that what was learnt is what is cut.

    denoiser   any that ``structure`` knows; player 'student' where ``tune`` (its weights adapt meanwhile), else frozen
    router     player 'router'; its ``structure`` says what can be closed
    embedding  the condition that is a prompt's vector (B, width)
    target     share of the full network's multiplications
    contrast   weight of L_con, a mean over pairs of a batch: the larger the batch, the larger it must be (100 as published)
    items      how many of a batch go through the networks, (in the warm-up, after it); None: all. The other terms need no
               network and are cheap, so that many prompts can be compared where few are denoised
    begin      "prompts": the codes begin, at the end of the warm-up, at the middle of the architectures of groups of a batch's prompts
               that transport shares evenly; "book": where the router's book has them (orthogonal, as published)

    A batch is {"x", "cond"}. The loss compares items: a batch must not be split. The paper's noise does not fall, and
    it adds a distance of block outputs, which is left out. Raises InputError for a target that the gates cannot reach. Source: Ganjdanesh, Kang, Shirkavand,
    Zhang, Wu, Liu, Huang, 2024, "Not All Prompts Are Made Equal: Prompt-based Pruning of Text-to-Image Diffusion Models".
    """

    couples = True

    def __init__(
        self,
        denoiser: Denoiser,
        router: PromptRouter,
        *,
        target: float = 0.6,
        embedding: str = "vector",
        warmup: int = 100,
        transport: bool = True,
        tune: bool = False,
        contrast: float = 1.0,
        items: tuple[int, int] | None = None,
        begin: str = "book",
        dropout: float = 0.1,
        times: Times | None = None,
    ) -> None:
        super().__init__()
        shape = router.structure
        floor = shape.base / shape.total
        if not floor < target <= 1:
            raise InputError(f"target = {target}: more than {floor:.3f}, which is in no gate, and at most 1")
        if begin not in ("book", "prompts") or (items is not None and min(items) < 0):
            raise InputError(f"begin = {begin!r}, items = {items}: 'book' or 'prompts', and two numbers of items")
        self.share = (target - floor) / (1 - floor)
        if begin == "prompts" and not transport:
            raise InputError(
                "begin = 'prompts' shares the prompts by transport: without it the codes begin in the book"
            )
        self.items, self.begin = items, begin
        self.router, self.full, self.tune = router, Frozen(denoiser), tune
        self.student: Any = denoiser if tune else Frozen(denoiser)
        self.embedding, self.warmup, self.transport = embedding, warmup, transport
        self.contrast, self.dropout, self.times = contrast, dropout, Uniform() if times is None else times

    def players(self) -> Mapping[str, nn.Module]:
        return {"router": self.router, **({"student": self.student} if self.tune else {})}

    def turns(self, it: int) -> list[list[str]]:
        return [list(self.players())]

    def forward(self, batch: Mapping[str, Any], ctx: Context, player: str = "router") -> Loss:
        cond = batch.get("cond", {})
        if self.embedding not in cond:
            raise InputError(f"the router reads the condition {self.embedding!r}; the batch has {sorted(cond)}")
        z, shape = cond[self.embedding], self.router.structure
        if self.begin == "prompts" and ctx.run.step == self.warmup:
            self.router.gather(z)
        gates, own = self._gates(z, ctx)
        n = len(z) if self.items is None else min(len(z), self.items[ctx.run.step >= self.warmup])
        denoising, imitation = self._denoised(batch["x"][:n], {k: v[:n] for k, v in cond.items()}, gates[:n], ctx)
        kept = shape.gated(gates)
        budget = (kept.mean() / self.share).log().abs()
        alike = likeness(architecture(own, shape), z)
        spread = 1 - kept.max() - (kept.std(correction=0) if bool(kept.detach().std(correction=0) > 0) else 0.0)
        total = denoising + 0.2 * imitation + 2 * budget + self.contrast * alike + 0.1 * spread
        terms = {"denoising": denoising, "imitation": imitation, "kept": kept.mean(), "alike": alike}
        return Loss(total.float(), {k: v.detach() for k, v in terms.items()})

    def _denoised(self, x0: Tensor, cond: Mapping[str, Any], gates: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        """Denoising loss of these items under their gates, and distance from what the full network says."""
        if not len(x0):
            return gates.new_zeros(()), gates.new_zeros(())
        n, process = len(x0), self.router_process()
        ctx = replace(ctx, batch=n, rng=None if ctx.rng is None else ctx.rng.select(slice(0, n)))
        t, importance = self.times(process, streams(ctx))
        noise = ctx.draw(process.space, x0)
        x, _ = process.corrupt(x0, t, ctx, noise=noise)
        told = drop(cond, self._null(), self.dropout, ctx)
        post = self.student(x, t, ctx.fork("student", cond=told, taps=gating(self.router.structure, gates)))
        with torch.no_grad():
            full = self.full(x, t, ctx.fork("full", cond=told)).native
        error = (post.native - process.target(post.kind, x0, noise, t)).square().flatten(1).mean(1)
        denoising = (error * weight("min-snr", post.kind, post.coef) * importance).mean()
        return denoising, (post.native - full).square().mean()

    def router_process(self) -> Any:
        """The noising law of the network."""
        return (self.student if self.tune else self.student.__dict__["module"]).process

    def _null(self) -> Mapping[str, Any]:
        return (self.student if self.tune else self.student.__dict__["module"]).null  # type: ignore[no-any-return]

    def _gates(self, z: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        """Hard gates of the items, and the relaxed gates of the prompts' own architectures."""
        shape, logits = self.router.structure, self.router(z)
        uniform = streams(ctx).uniform(torch.empty(len(z), shape.size)).to(logits.dtype).clamp(1e-6, 1 - 1e-6)
        quiet = 0.0 if ctx.run.total is None else ctx.run.step / ctx.run.total  # at the end a gate is what it will be
        noise = MEDIAN + (1 - quiet) * (-(-uniform.log()).log() - MEDIAN)
        own = relaxed(logits, shape, hard=False)
        if ctx.run.step < self.warmup:
            return relaxed(logits, shape, noise), own
        scores = self.router.scores(z)
        index = (sinkhorn(scores) if self.transport else scores).argmax(1)
        return relaxed(self.router.codes[index], shape, noise), own


def likeness(ours: Tensor, prompts: Tensor, temperature: float = 0.03) -> Tensor:
    """Mean binary cross entropy of softmax(u u^T / temperature) with softmax(z z^T / temperature), z normalised."""
    z = F.normalize(prompts.detach(), dim=-1, eps=1e-6)
    wanted = (z @ z.T / temperature).softmax(-1)
    found = (ours @ ours.T / temperature).softmax(-1).clamp(1e-6, 1 - 1e-6)
    return F.binary_cross_entropy(found, wanted.to(found.dtype))


__all__ = ["PromptPruning", "likeness"]
