"""Rectified Diffusion: matched pairs make a diffusion model first-order without straight paths, on digits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sfumato.core import mix
from sfumato.denoisers import converted
from sfumato.guidance import cfg
from sfumato.objectives.distill import Segments
from sfumato.processes import DDPM, Flow
from sfumato.recipes import Check, Findings, recipe
from sfumato.recipes import _plots as plots
from sfumato.recipes._distilling import DATA, GREY, Bed, student, trace
from sfumato.recipes._small import learn, pictures

SCALE, TEACHING, STEPS, PAIRS, PHASED = 1.5, 5000, 1500, 6000, 1000
LAW = DDPM("scaled_linear")  # of Stable Diffusion: alpha = 0.068 at its end
STRAIGHT = 0.93  # where the flow begins: the law has no noisier state
CITATION = """@article{wang2024rectified,
  title = {Rectified Diffusion: Straightness Is Not Your Need in Rectified Flow},
  author = {Wang, Fu-Yun and Yang, Ling and Huang, Zhaoyang and Wang, Mengdi and Li, Hongsheng},
  journal = {arXiv:2410.07303}, year = {2024}
}"""


def picture(rows: dict[str, Tensor], curves: dict[str, list[float]], bars: dict[str, tuple[float, float]]) -> Any:
    """One-step samples, distances by steps, and what is straight."""
    with plots.style():
        made = plots.figure(10.5, 4.6)
        left, right = made.subfigures(1, 2, width_ratios=(1.25, 1))
        for ax, (name, x) in zip(left.subplots(len(rows), 1), rows.items(), strict=True):
            plots.show(ax, 255 - pictures(x[:40]), 20)
            ax.set_title(name, loc="left", fontsize=9)
        top, low = right.subplots(2, 1, height_ratios=(1.3, 1))
        colours = {"teacher": GREY, "shuffled": plots.THIRD, "reflow": plots.SECOND, "rectified": plots.ACCENT}
        for name, values in curves.items():
            top.plot((1, 2, 4), values, marker="o", ms=4, color=colours[name], label=name)
        top.set(xscale="log", yscale="log", xlabel="calls", title="Fréchet distance to unseen digits")
        top.set_xticks((1, 2, 4), ("1", "2", "4"))
        top.minorticks_off()
        top.legend()
        for i, (name, (v, s)) in enumerate(bars.items()):
            low.scatter(s, v, s=46, color=colours[name], zorder=3)
            low.annotate(name, (s, v), (6, -3 if i else 4), textcoords="offset points", fontsize=8)
        low.set(
            xlabel="how curved the path is, |dx/dt - chord|²", ylabel="V, change of eps", xscale="log", yscale="log"
        )
        low.margins(x=0.25, y=0.25)
        return plots.image(made)


def retrained(bed: Bed, teacher: Any, pairs: dict[str, Tensor]) -> dict[str, Any]:
    """The teacher's weights retrained on its pairs: with shuffled noise, on straight paths as a flow, and as it is."""
    ends = pairs["states"]
    wrong = ends.clone()
    wrong[:, 0] = wrong[torch.randperm(PAIRS, generator=torch.Generator().manual_seed(bed.seed)), 0]
    x1, x0 = ends.unbind(1)
    straight = torch.stack([(1 - STRAIGHT) * x0 + STRAIGHT * x1 / LAW.coef(1.0).sigma, x0], 1)

    def taught(objective: Any, states: Tensor) -> Any:
        fields = {"states": states, "y": pairs["y"]}
        return learn(objective, fields, mix(bed.seed, 6), steps=STEPS, size=128, lr=1e-3, cond=("y",))

    def own() -> Segments:
        return Segments(student(teacher), [1.0, 0.0], inside=1.0, read="x0", metric="huber", dropout=0.05)

    flow = Segments(converted(student(teacher), Flow()), [STRAIGHT, 0.0], inside=1.0, read="flow", dropout=0.05)
    return {"shuffled": taught(own(), wrong), "reflow": taught(flow, straight), "rectified": taught(own(), ends)}


def phased(bed: Bed, teacher: Any) -> Any:
    """First-order within each of four phases, from noised data on."""
    phases = [1.0, 0.75, 0.5, 0.25, 0.0]
    objective = Segments(student(teacher), phases, cfg(SCALE)(teacher), substeps=10, inside=1.0, metric="huber")
    data = {"x": bed.x, "y": bed.labels}
    return learn(objective, data, mix(bed.seed, 7), steps=PHASED, size=128, lr=1e-3, cond=("y",))


@recipe(
    "rectified-diffusion",
    kind="objective",
    claim="Retrained on matched pairs in its own process and prediction, a diffusion model samples in one step as well as by "
    "reflow, while its paths stay curved; the same pairs with shuffled noise do not. In four phases four steps are enough.",
    baseline="the teacher's DDIM; the same pairs with shuffled noise; reflow of the same weights on straight paths",
    citation=CITATION,
)
def rectified_diffusion(seed: int) -> Findings:
    """A model retrained on matched pairs beside shuffled pairs and reflow."""
    bed = Bed(seed)
    teacher = bed.teacher(LAW, "eps", TEACHING)
    found = retrained(bed, teacher, bed.pairs(teacher, PAIRS, SCALE))
    models = {
        "teacher": (teacher, SCALE, 1.0),
        **{k: (m, 1.0, STRAIGHT if k == "reflow" else 1.0) for k, m in found.items()},
    }
    drawn = {k: {n: bed.samples(m, n, scale, start=t) for n in (1, 2, 4)} for k, (m, scale, t) in models.items()}
    curves = {k: [bed.distance(x) for x in v.values()] for k, v in drawn.items()}
    four = bed.distance(bed.samples(phased(bed, teacher), 4))
    noise = torch.randn(400, 64, generator=torch.Generator().manual_seed(seed))
    cond = {"y": torch.arange(400) % 10}
    lines = {
        k: trace(cfg(scale)(m) if scale != 1 else m, noise * m.process.coef(t).sigma, cond, start=t)
        for k, (m, scale, t) in models.items() if k != "shuffled"
    }  # fmt: skip
    one = {k: v[0] for k, v in curves.items()}
    checks = [
        Check("FD of one step, against the teacher", one["rectified"], one["teacher"], "ours <= 0.5 * baseline"),
        Check("FD of one step, against shuffled noise", one["rectified"], one["shuffled"], "ours <= 0.6 * baseline"),
        Check("FD of one step, against reflow", one["rectified"], one["reflow"], "ours <= 1.1 * baseline"),
        Check(
            "V, the change of eps along a path, against the teacher",
            lines["rectified"][0],
            lines["teacher"][0],
            "ours <= 0.3 * baseline",
        ),
        Check(
            "curvature of the path in x, against reflow",
            lines["rectified"][1],
            lines["reflow"][1],
            "ours >= 2 * baseline",
        ),
        Check("FD of four phases in four steps, against DDIM", four, curves["teacher"][2], "ours <= 0.8 * baseline"),
    ]
    return Findings(
        checks,
        nfe={"rectified, shuffled, reflow": 1, "phased": 4, "teacher of the pairs": 12},
        data=f"{DATA}; {PAIRS} pairs of the teacher, guidance {SCALE:g}",
        model=f"MLP of 0.6 million parameters (eps, the schedule of Stable Diffusion), taught in this run for {TEACHING} "
        f"steps; students for {STEPS}, phased for {PHASED}",
        notes=f"Distances of 1200 samples in 32 features of the judge. Reflow reads the same network as a flow from t = {STRAIGHT:g}, "
        "the noisiest state that the schedule has. The lengths of the teacher's and of the phased training were chosen on seed 100.",
        picture=picture({f"{k}, one call": v[1] for k, v in drawn.items()}, curves, lines),
    )
