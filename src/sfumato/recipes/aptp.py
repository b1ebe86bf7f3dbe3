"""APTP: a prompt chooses one of a few pruned networks, all learnt together under a budget of work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sfumato.acceleration.pruning import by_magnitude, gating, materialize
from sfumato.acceleration.routing import PromptRouter
from sfumato.core import Context, mix
from sfumato.evaluation import PCAFeatures
from sfumato.evaluation.metrics import frechet_distance
from sfumato.recipes import Check, Findings, recipe
from sfumato.recipes import _plots as plots
from sfumato.recipes._pruned import (
    BATCH,
    DRAWN,
    EXPERTS,
    KNOWN,
    PRUNE,
    SIDE,
    TARGET,
    TUNE,
    Bed,
    alike,
    entropy,
    seconds,
    small,
)
from sfumato.zoo import emoji

CITATION = """@inproceedings{ganjdanesh2025not,
  title = {Not All Prompts Are Made Equal: Prompt-based Pruning of Text-to-Image Diffusion Models},
  author = {Ganjdanesh, Alireza and Kang, Yan and Shirkavand, Reza and Zhang, Zhe and Wu, Shangqian and Liu, Heng and Huang, Heng},
  booktitle = {ICLR}, year = {2025}
}"""
OURS, ONE = "prompt-tailored", "one architecture"


def picture(
    bed: Bed, gates: Tensor, costs: list[float], index: Tensor, rows: dict[str, Tensor], losses: dict[str, float]
) -> Any:
    """Codes, what each expert is asked for, losses, and emoji."""
    names = emoji.categories()
    with plots.style():
        made = plots.figure(12, 5.6)
        left, right = made.subfigures(1, 2, width_ratios=(1.25, 1))
        grid = left.subplots(2, 2, width_ratios=(1.5, 1))
        blocks, depth = bed.structure.split(gates)
        kept = torch.stack([sum(g.sum(1) for g in b.values()) / sum(g.shape[1] for g in b.values()) * depth[:, i] for i, b in enumerate(blocks)], 1)  # fmt: skip
        grid[0, 0].imshow(kept.numpy(), cmap="Blues", vmin=0, vmax=1, aspect="auto")
        grid[0, 0].set(title="share of heads and groups kept", xlabel="block", yticks=range(len(gates)))
        grid[0, 0].set_yticklabels([f"expert {e + 1}: {c:.0%}" for e, c in enumerate(costs)])
        for e in range(len(gates)):
            for i in range(kept.shape[1]):
                grid[0, 0].text(i, e, f"{kept[e, i]:.0%}", ha="center", va="center", fontsize=7, color="white" if kept[e, i] > 0.6 else plots.INK)  # fmt: skip
        grid[0, 1].barh(list(losses)[::-1], list(losses.values())[::-1], color=plots.SECOND, height=0.6)
        low = min(losses.values())
        grid[0, 1].set(title="loss on unseen emoji", xlim=(0.97 * low, 1.01 * max(losses.values())))
        table = torch.stack([torch.bincount(bed.train.category[index == e], minlength=len(names)) for e in range(len(gates))]).double()  # fmt: skip
        table, bottom = table / table.sum(0).clamp(min=1), torch.zeros(len(names), dtype=torch.float64)
        for e in range(len(gates)):
            grid[1, 0].bar(range(len(names)), table[e].numpy(), bottom=bottom.numpy(), width=0.75, label=f"expert {e + 1}", color=[plots.SECOND, plots.ACCENT, plots.THIRD, plots.INK][e % 4])  # fmt: skip
            bottom += table[e]
        grid[1, 0].set_xticks(
            range(len(names)), [n.split(" ")[0].split("&")[0] for n in names], rotation=40, ha="right", fontsize=7
        )
        grid[1, 0].set(title="who serves which category")
        grid[1, 1].bar(
            range(1, len(gates) + 1), torch.bincount(index, minlength=len(gates)).numpy(), color=plots.SECOND, width=0.6
        )
        grid[1, 1].set(title="prompts an expert serves", xticks=range(1, len(gates) + 1))
        for axis, (name, x) in zip(right.subplots(len(rows)), rows.items(), strict=True):
            plots.show(axis, x[:36], 18, 1)
            axis.set_title(name, loc="left", fontsize=9, fontweight="normal")
        return plots.image(made)


@dataclass(frozen=True)
class Measured:
    """Work, loss on unseen emoji, drawings and their Fréchet distance, of the full network and of every arm."""

    work: dict[str, float]
    losses: dict[str, float]
    drawings: dict[str, Tensor]
    distances: dict[str, float]


def measured(bed: Bed, arms: dict[str, tuple[Tensor, PromptRouter]]) -> Measured:
    """Each arm, a network a row of gates, cut out of the teacher and taught alike on the prompts it is sent."""
    work = {k: float(bed.structure.cost(g)[r.assign(bed.vectors)].mean()) for k, (g, r) in arms.items()}
    models = {"full": bed.teacher, **{k: bed.tuned(*arm) for k, arm in arms.items()}}
    losses = {k: bed.loss(model) for k, model in models.items()}
    drawings = {k: bed.drawn(model) for k, model in models.items()}
    features = PCAFeatures(bed.train.images, 16)
    unseen = features(bed.unseen.images)
    distances = {k: frechet_distance(features(small(x)), unseen).value for k, x in drawings.items()}
    return Measured(work, losses, drawings, distances)


def informed(bed: Bed, index: Tensor) -> list[float]:
    """What experts tell of an emoji's category: ours, the same shuffled, and as many clusters of the prompts by k-means."""
    from sklearn.cluster import KMeans
    from sklearn.metrics import normalized_mutual_info_score as information

    draw = torch.Generator().manual_seed(mix(bed.seed, 9) % 10**9)
    shuffled = index[torch.randperm(len(index), generator=draw)].numpy()
    near = KMeans(EXPERTS, n_init=4, random_state=mix(bed.seed, 10) % 10**6).fit_predict(bed.vectors.numpy())
    return [float(information(bed.train.category.numpy(), labels)) for labels in (index.numpy(), shuffled, near)]


@torch.no_grad()
def cut_out(bed: Bed, gates: Tensor) -> tuple[float, float]:
    """An expert cut out, beside the network under its gates: the largest difference, and its seconds over the full network's."""
    cut, part = materialize(bed.teacher, bed.structure, gates), Context(cond={k: v[:64] for k, v in bed.told.items()}, batch=64)  # fmt: skip
    gated = part.fork(taps=gating(bed.structure, gates.expand(64, -1)))
    gap = float((cut(bed.y[:64], 0.5, part).native - bed.teacher(bed.y[:64], 0.5, gated).native).abs().max())
    spent = seconds({"full": lambda: bed.teacher(bed.y[:64], 0.5, part), "cut": lambda: cut(bed.y[:64], 0.5, part)})
    return gap, spent["cut"] / spent["full"]


def rules(
    found: Measured, use: tuple[float, float], mutual: list[float], off: float, cut: tuple[float, float], cost: float
) -> list[Check]:
    """The clauses of the claim."""
    losses, distances = found.losses, found.distances
    return [
        Check("loss on unseen emoji, against one architecture", losses[OURS], losses[ONE], "ours <= 0.99 * baseline"),
        *(Check(f"loss on unseen emoji, against {k}", losses[OURS], losses[k], "ours <= baseline") for k in ("magnitude", "random")),
        *(Check(f"Fréchet distance, against {k}", distances[OURS], distances[k], "ours <= baseline") for k in (ONE, "magnitude", "random")),
        Check("entropy of the use of experts, over its greatest", use[0], None, "ours >= 0.8"),
        Check("entropy with transport, less without", use[0] - use[1], None, "ours >= 0.15"),
        Check("information on the category, less that of shuffled experts", mutual[0] - mutual[1], None, "ours >= 0.1"),
        Check("information on the category, against k-means of prompts less 0.05", mutual[0], mutual[2] - 0.05, "ours >= baseline"),
        Check("mean cost, off its target", off, None, "ours <= 0.03"),
        Check("cut network against the gated one, largest difference", cut[0], None, "ours <= 1e-5"),
        Check("seconds of the busiest expert over the full network's, less its cost", cut[1] - cost, None, "ours <= 0.2"),
    ]  # fmt: skip


@recipe(
    "aptp",
    kind="acceleration",
    claim="Prompts routed to a few pruned networks, learnt together with optimal transport, denoise better at the same work than one pruned "
    "network; the experts are all used and stand for kinds of prompts.",
    baseline="one learnt architecture for all prompts, magnitude pruning, and random architectures of the same costs, with the same fine-tuning",
    citation=CITATION,
)
def aptp(seed: int) -> Findings:
    """Router and codes learnt together; what they cut out beside one architecture, magnitude and chance at the same work."""
    bed = Bed(seed)
    router, alone, free = bed.router(EXPERTS), bed.router(1), bed.router(EXPERTS, transport=False)
    gates, index = router.gates().round(), router.assign(bed.vectors)
    costs = bed.structure.cost(gates)
    mean = float(costs[index].mean())
    magnitude, random = by_magnitude(bed.teacher, bed.structure, mean)[None], alike(gates, bed, mix(seed, 8) % 10**6)
    arms = {
        OURS: (gates, router), ONE: (alone.gates().round(), alone),
        "magnitude": (magnitude, PromptRouter(384, bed.structure, 1)), "random": (random, router),
    }  # fmt: skip
    found, mutual = measured(bed, arms), informed(bed, index)
    use = entropy(index), entropy(free.assign(bed.vectors))
    busiest = int(torch.bincount(index, minlength=EXPERTS).argmax())
    cut = cut_out(bed, gates[busiest])
    rows = {f"{k}: {found.work.get(k, 1.0):.0%} of the work": x for k, x in found.drawings.items()}
    return Findings(
        rules(found, use, mutual, abs(mean - TARGET), cut, float(costs[busiest])),
        nfe=10,
        data=f"names of {len(bed.vectors)} emoji as 384-d sentence vectors, {KNOWN} of the drawings to learn from and {len(bed.y)} unseen; Fréchet distance of {DRAWN} drawings of {SIDE} pixels in 16 principal components",
        model=f"emoji-latent (8 blocks, 3 heads of attention and of cross-attention, 12 MLP groups); {PRUNE} steps for router and codes, with 512 prompts and 12 drawings each, {TUNE} of {BATCH} drawings for the experts, which learn what the full network says",
        notes=f"Mean costs: {', '.join(f'{k} {v:.3f}' for k, v in found.work.items())}; experts {', '.join(f'{c:.2f}' for c in costs.tolist())}. Losses: "
        f"{', '.join(f'{k} {v:.4f}' for k, v in found.losses.items())}. Fréchet: {', '.join(f'{k} {v:.3f}' for k, v in found.distances.items())}. Information with categories {mutual[0]:.3f}, "
        f"shuffled {mutual[1]:.3f}, k-means {mutual[2]:.3f}. Codes begin at evenly shared groups of prompts, without transport in the book; the weight of the contrast is the published 100; both "
        "and the rates were chosen on seed 100, then steps (and with them the experts' rate) cut to the time of a recipe without another look. Left out: the distance of block outputs, three seeds of the run without transport, longer trainings. Where a check fails: an expert meets a quarter of the "
        "drawings that the one network meets, a few of each kind in all, which is too little to become better at its kind; and the contrast at a temperature of 0.03 tells each prompt from all others "
        "rather than kinds of prompts from each other, so that experts follow the categories less than k-means of the prompts does.",
        picture=picture(bed, gates, costs.tolist(), index, rows, found.losses),
    )  # fmt: skip
