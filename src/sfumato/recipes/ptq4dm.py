"""Post-training quantisation: 8 bits without training, with ranges fitted to what the network meets while it samples."""

from __future__ import annotations

import statistics
from typing import Any

import torch
from torch import Tensor

import sfumato as sf
from sfumato.acceleration import quantization
from sfumato.acceleration.ranges import search
from sfumato.core import Context
from sfumato.denoisers.features import changing
from sfumato.recipes import Check, Findings, recipe
from sfumato.recipes import _plots as plots
from sfumato.recipes._digits import Distance
from sfumato.recipes._quantised import EVEN, ITEMS, NOISE, OURS, RAW, SEEDS, STEPS, Bed, N, sizes, widths
from sfumato.recipes._small import pictures

SETTINGS = ((8, 8), (8, 6), (6, 6), (4, 8))
CITATION = """@inproceedings{shang2023post,
  title = {Post-training Quantization on Diffusion Models},
  author = {Shang, Yuzhang and Yuan, Zhihang and Xie, Bin and Wu, Bingzhe and Yan, Yan},
  booktitle = {CVPR}, year = {2023}
}"""


def picture(
    spans: dict[str, list[tuple[float, float]]], errors: dict[str, list[float]], where: str, rows: dict[str, Tensor]
) -> Any:
    """Ranges over time, errors by calibration set and search, and digits."""
    with plots.style():
        made = plots.figure(11.5, 4.8)
        left, right = made.subfigures(1, 2, width_ratios=(1, 1.25))
        top, low = left.subplots(2, 1, height_ratios=(1, 1.25))
        for name, points in spans.items():
            top.plot(*zip(*points, strict=True), "o-", ms=3, label=name)
        top.set(title="widths of activations over the run", xlabel="t (0 data, 1 noise)", ylim=(0, None))
        top.legend(fontsize=8)
        names = list(errors)[::-1]
        for i, name in enumerate(names):
            colour = plots.ACCENT if name == OURS else plots.SECOND if name in (EVEN, NOISE, RAW) else plots.THIRD
            low.barh(i, statistics.mean(errors[name]), color=colour, height=0.62)
            low.plot(errors[name], [i] * len(errors[name]), ".", color=plots.INK, ms=4)
        low.set_yticks(range(len(names)), names)
        low.set(title=f"rms error of the samples, {where}")
        low.tick_params(length=0, which="both")
        for axis, (name, x) in zip(right.subplots(len(rows)), rows.items(), strict=True):
            plots.show(axis, 255 - pictures(x[:40].flatten(1)), 20, 1)
            axis.set_title(name, loc="left", fontsize=9, fontweight="normal")
        return plots.image(made)


@recipe(
    "ptq4dm",
    kind="acceleration",
    claim="A diffusion network keeps its samples in 8 bits without training when the ranges of activations come from its own runs, at times "
    "that lean towards clean images; ranges from noise or from images do worse, and so do other criteria than the error.",
    baseline="the same quantiser with other calibration sets (pure noise, images, uniform times) and other searches (whole range, cosine, KL)",
    citation=CITATION,
)
def ptq4dm(seed: int) -> Findings:
    """Networks in 8 bits whose ranges come from several calibration sets and searches."""
    bed, distance = Bed(seed), Distance()
    sets = {(name, k): bed.calibration(name, k) for name in (OURS, EVEN, NOISE, RAW) for k in range(SEEDS)}
    first: dict[tuple[int, int], dict[str, float]] = {}
    drawn: dict[str, Tensor] = {"full precision": bed.full}
    for bits in SETTINGS:
        runs = {name: bed.run(bed.quantised(bits, sets[name, 0])) for name in (OURS, EVEN, NOISE, RAW)}
        first[bits] = {name: bed.error(x) for name, x in runs.items()}
        drawn |= {f"{bits[0]} bits for weights, {bits[1]} for activations: {name}": runs[name] for name in ((OURS,) if bits == (8, 8) else (OURS, NOISE, RAW))}  # fmt: skip
        spread = max(first[bits].values()) / min(first[bits].values()) - 1
        if bits != (8, 8) and spread > 0.2:
            break
    errors = {name: [first[bits][name], *(bed.error(bed.run(bed.quantised(bits, sets[name, k]))) for k in range(1, SEEDS))] for name in first[bits]}  # fmt: skip
    for kind, said in (("minmax", "search: whole range"), ("cosine", "search: cosine"), ("kl", "search: KL")):
        errors[said] = [bed.error(bed.run(bed.quantised(bits, sets[OURS, k], search=kind))) for k in range(SEEDS)]
    mean = {name: statistics.mean(values) for name, values in errors.items()}
    eight = bed.quantised((8, 8), sets[OURS, 0])
    span = search(sets[OURS, 0].x, 8, "minmax")
    answers = search(torch.cat([bed.denoiser(b.x, b.t, Context(cond=b.cond, batch=len(b.x))).native.detach() for b in sets[OURS, 0].batches()]), 8, "minmax")  # fmt: skip
    rounded = bed.error(bed.run(solver=quantization.Rounded(sf.solvers.get("ddim"), span)))
    output = bed.error(bed.run(taps=[changing("", answers.__call__)]))
    again = [distance(bed.run(seed=s)) for s in (2, 3)]
    fd = distance(bed.full), distance(drawn[f"8 bits for weights, 8 for activations: {OURS}"])
    noise = max(abs(a - fd[0]) for a in again)
    where = f"{bits[0]} bits for weights, {bits[1]} for activations"
    checks = [
        Check("Fréchet distance, 8 and 8 bits, less 5 % and the spread of full runs", fd[1] - 0.05 * fd[0] - noise, fd[0], "ours <= baseline"),
        Check(f"spread of the error over calibration sets, {where}", spread, None, "ours >= 0.2"),
        Check("rms, own runs, against the better of noise and images", mean[OURS], min(mean[NOISE], mean[RAW]), "ours <= 0.9 * baseline"),
        Check("rms, normal times, against uniform times", mean[OURS], mean[EVEN], "ours <= 1.02 * baseline"),
        *(Check(f"rms, least L2.4 error, against {said}", mean[OURS], mean[said], "ours <= baseline") for said in errors if "search" in said),
        Check("rms with 8-bit states, against 8-bit predictions", rounded, output, "ours >= 2 * baseline"),
        Check("packed file over the float32 file", sizes(eight, bed.denoiser), None, "ours <= 0.3"),
    ]  # fmt: skip
    shown = dict(list(drawn.items())[:2]) | dict(list(drawn.items())[-3:])
    lines = "; ".join(f"{a}/{b} bits: " + ", ".join(f"{name} {v:.3g}" for name, v in each.items()) for (a, b), each in first.items())  # fmt: skip
    return Findings(
        checks,
        nfe=STEPS,
        data=f"scikit-learn digits; {N} samples, {ITEMS} calibration items, {SEEDS} calibration sets a kind; Fréchet distance in 16 principal components to 297 unseen digits",
        model="digits (U-Net, eps), DDIM without guidance; simulated integers, the layers next to the state and the prediction exact",
        notes=f"rms of the first sets: {lines}. Spread over {SEEDS} sets of our error {max(errors[OURS]) / min(errors[OURS]) - 1:.0%}. With 8 bits in the two outer layers as well "
        f"the rms at 8 and 8 bits is {bed.error(bed.run(bed.quantised((8, 8), sets[OURS, 0], edges=8))):.3g} instead of {first[8, 8][OURS]:.3g}: the tail of a Gaussian state is clipped there. "
        "Where a check fails: this network's activations are nearly as wide at all times (left in the picture), so which times of its own runs are taken, and cosine or L2.4 error, "
        "differ by no more than the sets do; and an eps prediction in 8 bits errs by as much at t near 1, where its part in x0 is divided by alpha, while a state that is rounded is "
        "denoised by the next steps. Left out: reconstruction of roundings, ImageNet and CIFAR.",
        picture=picture(
            {p: widths(bed, sets[EVEN, 0], q) for p, q in (("first block", "level.down.stages.0.residual"), ("bottleneck", "level.deep.deep"), ("last block", "level.up"))},
            errors, f"{bits[0]} and {bits[1]} bits", shown,
        ),
    )  # fmt: skip
