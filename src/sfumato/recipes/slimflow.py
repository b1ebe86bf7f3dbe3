"""SlimFlow: a small one-step flow from a large one, by annealed reflow and distillation guided by the flow itself, on digits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sfumato.core import mix
from sfumato.denoisers import parametrized
from sfumato.networks import MLP
from sfumato.objectives.distill import AnnealingReflow, FlowGuided
from sfumato.processes import Flow
from sfumato.recipes import Check, Findings, recipe
from sfumato.recipes import _plots as plots
from sfumato.recipes._distilling import DATA, GREY, Bed, student
from sfumato.recipes._small import learn, pictures

PAIRS, FEW, STEPS, WARMUP, LAST = 4000, 500, 2500, 1500, 1200
CITATION = """@inproceedings{zhu2024slimflow,
  title = {SlimFlow: Training Smaller One-Step Diffusion Models with Rectified Flow},
  author = {Zhu, Yuanzhi and Liu, Xingchao and Liu, Qiang},
  booktitle = {European Conference on Computer Vision}, year = {2024}
}"""
ARMS: dict[str, dict[str, Any]] = {
    "reflow from scratch": {"schedule": "constant", "level": 0.0},
    "random pairs": {"schedule": "constant", "level": 1.0},
    "annealing reflow": {"schedule": "linear", "warmup": WARMUP},
}


def picture(rows: dict[str, Tensor], flows: dict[str, list[float]], last: dict[str, float], large: list[float]) -> Any:
    """One-step digits, distances of the flows, and of the one-step models."""
    with plots.style():
        made = plots.figure(10.5, 4.4)
        left, right = made.subfigures(1, 2, width_ratios=(1.2, 1))
        for ax, (name, x) in zip(left.subplots(len(rows), 1), rows.items(), strict=True):
            plots.show(ax, 255 - pictures(x[:40]), 20)
            ax.set_title(name, loc="left", fontsize=9)
        top, low = right.subplots(2, 1, height_ratios=(1.4, 1))
        for (name, values), colour in zip(flows.items(), (plots.THIRD, plots.SECOND, plots.ACCENT), strict=True):
            top.plot((1, 2, 10), values, marker="o", ms=4, color=colour, label=name)
        top.plot((1, 2, 10), large, marker="o", ms=4, color=GREY, ls="--", label="large flow")
        top.set(xscale="log", yscale="log", title="Fréchet distance of small flows, by Euler steps")
        top.set_xticks((1, 2, 10), ("1", "2", "10"))
        top.minorticks_off()
        top.legend(fontsize=8)
        names = list(last)
        low.barh(names[::-1], [last[k] for k in names[::-1]], color=[plots.SECOND, plots.ACCENT] * 2, height=0.6)
        low.set(title="one call, after distillation")
        low.tick_params(length=0)
        return plots.image(made)


@recipe(
    "slimflow",
    kind="objective",
    claim="A small network that anneals from random to the teacher's pairs is a better one-step flow than one that begins with "
    "those pairs; with few pairs, targets from the flow itself improve its distillation; the result beats two steps of a "
    "teacher of at least 8 times its size.",
    baseline="reflow of the small network from scratch; distillation of the same pairs without guidance by the flow; the large "
    "flow's Euler in two steps",
    citation=CITATION,
)
def slimflow(seed: int) -> Findings:
    """A small one-step flow, annealed and distilled, beside plain reflow and plain distillation."""
    bed = Bed(seed)
    large = bed.teacher(Flow(), "flow", width=256)
    pairs = bed.pairs(large, PAIRS)
    few = {k: v[:FEW] for k, v in pairs.items()}

    def small() -> Any:
        torch.manual_seed(mix(seed, 6) % 10**6)
        return parametrized(MLP(64, width=64, depth=3, embeddings={"y": 10}), Flow(), "flow", null={"y": 10})

    def taught(objective: Any, fields: dict[str, Tensor], steps: int, lr: float) -> Any:
        return learn(objective, fields, mix(seed, 7), steps=steps, size=128, lr=lr, cond=("y",))

    flows = {k: taught(AnnealingReflow(small(), **options), pairs, STEPS, 3e-3) for k, options in ARMS.items()}
    best = flows["annealing reflow"]
    last = {
        f"{n} pairs{' + flow' if guided else ''}": taught(FlowGuided(student(best), best, guided=guided), fields, LAST, 1e-3)
        for n, fields in ((FEW, few), (PAIRS, pairs)) for guided in (0.0, 1.0)
    }  # fmt: skip

    curves = {k: [bed.distance(bed.samples(m, n)) for n in (1, 2, 10)] for k, m in flows.items()}
    whole = [bed.distance(bed.samples(large, n)) for n in (1, 2, 10)]
    draws = {k: bed.samples(m, 1) for k, m in last.items()}
    distances = {k: bed.distance(x) for k, x in draws.items()}
    sizes = [sum(p.numel() for p in m.parameters()) for m in (large, best)]
    names = list(last)
    rows = {
        "large flow, two calls": bed.samples(large, 2), "reflow from scratch, one call": bed.samples(flows["reflow from scratch"], 1),
        "annealing reflow, one call": bed.samples(best, 1), f"distilled from {names[1]}, one call": draws[names[1]],
        f"distilled from {names[3]}, one call": draws[names[3]],
    }  # fmt: skip
    return Findings(
        [
            Check(
                "FD of one step, annealing against reflow from scratch",
                curves["annealing reflow"][0],
                curves["reflow from scratch"][0],
                "ours <= 0.9 * baseline",
            ),
            Check(
                f"FD of one step after {FEW} pairs, with against without the flow's targets",
                distances[names[1]],
                distances[names[0]],
                "ours <= 0.9 * baseline",
            ),
            Check(
                "FD of the small one-step model, against two steps of the large flow",
                distances[names[3]],
                whole[1],
                "ours <= baseline",
            ),
            Check("parameters of the large flow over the small one's", sizes[0] / sizes[1], None, "ours >= 8"),
        ],
        nfe={"small": 1, "large": 2},
        data=f"{DATA}; {PAIRS} pairs of the large flow, the first {FEW} for the test of few",
        model=f"MLP flows of {sizes[0] / 1e6:.2f} and {sizes[1] / 1e6:.3f} million parameters, taught in this run: 2000 updates, {STEPS} of "
        f"reflow (annealed over {WARMUP}) and {LAST} of distillation",
        notes=f"FD of the one-step models: {', '.join(f'{k} {v:.3g}' for k, v in distances.items())}; small flow of random pairs "
        f"{curves['random pairs'][0]:.3g}. The distance trained on is the squared one of pixels.",
        picture=picture(rows, curves, distances, whole),
    )
