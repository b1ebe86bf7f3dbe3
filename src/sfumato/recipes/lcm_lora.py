"""LCM-LoRA: a low-rank acceleration learnt on one model and added to others; and the transport acceleration of its abstract."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sfumato.analysis.transport import Slab
from sfumato.core import mix
from sfumato.denoisers import lora
from sfumato.objectives.distill import Consistency
from sfumato.processes import VP
from sfumato.recipes import Check, Findings, recipe
from sfumato.recipes import _plots as plots
from sfumato.recipes._distilling import DATA, GREY, Bed, student
from sfumato.recipes._small import Judge, digits, learn, pictures

SCALE, RANGE, STEPS, RANK, TUNING = 1.5, (1.25, 1.75), 2000, 16, 1500
INNER = r"blocks\."  # as published, the first and the last layer are left alone
TIMES = [1 - k / 20 for k in range(21)]
STYLES: dict[str, Any] = {
    "base": lambda x: x,
    "inverted": lambda x: -x,
    "turned": lambda x: x.reshape(-1, 8, 8).rot90(1, (1, 2)).flatten(1),
}
BACK: dict[str, Any] = {**STYLES, "turned": lambda x: x.reshape(-1, 8, 8).rot90(-1, (1, 2)).flatten(1)}
CITATION = """@article{luo2023lcmlora,
  title = {LCM-LoRA: A Universal Stable-Diffusion Acceleration Module},
  author = {Luo, Simian and Tan, Yiqin and Patil, Suraj and Gu, Daniel and von Platen, Patrick and Passos, Apolinário and
            Huang, Longbo and Li, Jian and Zhao, Hang},
  journal = {arXiv:2311.05556}, year = {2023}
}"""


def like(adapter: lora.Adapter, seed: int) -> lora.Adapter:
    """Random directions of the same ranks and, layer by layer, of the same norm."""
    draw, made = torch.Generator().manual_seed(seed), {}
    for path, layer in adapter.layers.items():
        new = layer._replace(
            down=torch.randn(layer.down.shape, generator=draw), up=torch.randn(layer.up.shape, generator=draw)
        )
        ratio = float(layer.difference().norm() / new.difference().norm())
        made[path] = new._replace(up=new.up * ratio)
    return lora.Adapter(made)


def picture(sheets: dict[str, dict[str, Tensor]], bars: dict[str, dict[str, float]]) -> Any:
    """Four-step samples of every style and their distances."""
    with plots.style():
        made = plots.figure(11, 4.6)
        left, right = made.subfigures(1, 2, width_ratios=(2, 1))
        axes = left.subplots(len(sheets), len(STYLES))
        for row, (name, styles) in zip(axes, sheets.items(), strict=True):
            for ax, (style, x) in zip(row, styles.items(), strict=True):
                plots.show(ax, 255 - pictures(x[:20]), 10)
                ax.set_title(f"{style}: {name}", loc="left", fontsize=8)
        ax = right.subplots()
        for k, (name, values) in enumerate(bars.items()):
            colour = (GREY, plots.THIRD, plots.ACCENT, plots.SECOND)[k]
            places = [i + 0.2 * (k - 1.5) for i in range(len(values))]
            ax.bar(places, list(values.values()), 0.18, color=colour, label=name)
        ax.set_xticks(range(len(STYLES)), list(STYLES))
        ax.set(title="Fréchet distance in 4 calls", yscale="log")
        ax.tick_params(length=0, which="both")
        ax.legend(fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.06))
        return plots.image(made)


def taught(bed: Bed, base: Any, learner: Any) -> Any:
    """A latent consistency student: sub-paths of a tenth of the time in two steps of the guided base."""
    objective = Consistency(
        learner, TIMES, base, guidance=RANGE, boundary="lcm", skip=2, substeps=2, target=0.9, weighting="variance"
    )
    fields = {"x": bed.x, "y": bed.labels}
    return learn(objective, fields, mix(bed.seed, 6), steps=STEPS, size=128, lr=1e-3, cond=("y",))


def four(bed: Bed, denoiser: Any) -> Tensor:
    """Four calls of a consistency model."""
    return bed.samples(denoiser, 4, solver="lcm")


def kept(drawn: dict[str, Tensor], fine: dict[str, Tensor], seed: int) -> list[Check]:
    """How often a classifier of styles reads the right one, of four calls and of fifty of the style's own model."""
    x, _, _ = digits()
    judged = x[torch.arange(len(x)) % 4 == 1]
    learnt = torch.cat([change(judged) for change in STYLES.values()])
    judge = Judge(learnt, torch.arange(len(STYLES)).repeat_interleave(len(judged)), seed)
    checks = []
    for k in ("inverted", "turned"):
        truth = torch.full((len(fine[k]),), list(STYLES).index(k))
        ours, own = judge.accuracy(drawn[k], truth), judge.accuracy(fine[k], truth)
        checks.append(Check(f"style kept, {k}", ours, own, "ours >= 0.9 * baseline"))
    return checks


def transport(seed: int) -> list[Check]:
    """Factors by which source iteration and its acceleration reduce the error of a slab, and both solutions."""
    slabs = {c: Slab(width=200.0, cells=100, ratio=c) for c in (0.9, 0.99)}
    plain = {c: slab.factor("none", 20, seed) for c, slab in slabs.items()}
    quick = max(slab.factor("consistent", 15, seed) for slab in slabs.values())
    small = Slab(width=30.0, cells=40, ratio=0.9)
    gap = float((small.solve(1.0, "none", 1e-12)[0] - small.solve(1.0, "consistent", 1e-12)[0]).abs().max())
    return [
        *(Check(f"source iteration, factor over c = {c:g}", plain[c] / c, None, "0.97 <= ours <= 1.03") for c in slabs),
        Check("diffusion synthetic acceleration, worst factor", quick, None, "ours <= 0.25"),
        Check("largest difference of the two solutions", gap, None, "ours <= 1e-8"),
    ]


@recipe(
    "lcm-lora",
    kind="objective",
    claim="Low-rank differences that make one model sample in 4 calls do the same for other fine-tunes of it, which they never "
    "saw, without costing them their style; and diffusion synthetic acceleration brings the factor c of source iteration "
    "down to at most 0.25 without changing the solution.",
    baseline="DDIM with guidance in 4 steps of the same model; a random low-rank difference of the same norm; source iteration",
    citation=CITATION,
)
def lcm_lora(seed: int) -> Findings:
    """One low-rank difference on fine-tunes it never saw; and source iteration sped up."""
    bed = Bed(seed)
    base = bed.teacher(VP(), "v")
    models = {
        k: base if k == "base" else bed.tuned(base, change(bed.x), TUNING, ends=True).requires_grad_(False)
        for k, change in STYLES.items()
    }
    tau = lora.extract(taught(bed, base, lora.inject(base, RANK, targets=INNER, seed=seed)))
    whole = bed.distance(four(bed, taught(bed, base, student(base))))
    noise = like(tau, mix(seed, 7) % 10**6)

    drawn: dict[str, dict[str, Tensor]] = {
        "DDIM, 4 calls": {k: bed.samples(m, 4, SCALE) for k, m in models.items()},
        "random low rank": {k: four(bed, lora.combine(m, {noise: 1.0})) for k, m in models.items()},
        "LCM-LoRA, 4 calls": {k: four(bed, lora.combine(m, {tau: 1.0})) for k, m in models.items()},
    }
    fine = {k: bed.samples(m, 50, SCALE) for k, m in models.items()}
    bars = {name: {k: bed.distance(x, BACK[k]) for k, x in row.items()} for name, row in drawn.items()}
    bars["DDIM, 50 calls"] = {k: bed.distance(x, BACK[k]) for k, x in fine.items()}
    ours, ddim, control = bars["LCM-LoRA, 4 calls"], bars["DDIM, 4 calls"], bars["random low rank"]
    share = lora.size(tau) / sum(p.numel() for p in base.parameters())
    seen = "random difference of the same norm, base"
    return Findings(
        [
            Check("FD in 4 calls, base", ours["base"], ddim["base"], "ours <= 0.7 * baseline"),
            *(
                Check(f"FD in 4 calls, {k}, never seen", ours[k], ddim[k], "ours <= 0.8 * baseline")
                for k in ("inverted", "turned")
            ),
            *kept(drawn["LCM-LoRA, 4 calls"], fine, seed),
            Check(f"FD in 4 calls, {seen}", control["base"], ddim["base"], "ours >= baseline"),
            Check("share of numbers that were trained", share, None, "ours <= 0.25"),
            *transport(seed),
        ],
        nfe={"LCM-LoRA": 4, "DDIM with guidance, rows": 8},
        data=f"{DATA}; styles: negatives, and digits turned by 90 degrees",
        model=f"MLP of 0.6 million parameters (v, VP), taught in this run for 2000 steps; styles: its first and last layers for {TUNING} "
        f"more; adapters of rank {RANK} in the layers between for {STEPS}",
        notes=f"All weights instead of adapters: FD {whole:.3g} on the base. Guidance {RANGE[0]:g} to {RANGE[1]:g} is in the adapter "
        f"(scales of cfg), DDIM has {SCALE:g}. Settings of adapters and styles were tried one by one on seed 100, this "
        "combination of them only here. On styles an adapter costs quality where "
        f"fine-tuning moved the states between the layers that it was learnt on, likely so for negatives. The slab is 200 free paths wide "
        "in 100 cells, with 8 directions.",
        picture=picture({k: drawn[k] for k in ("DDIM, 4 calls", "LCM-LoRA, 4 calls", "random low rank")}, bars),
    )
