"""Region-adaptive sampling: the transformer runs on the regions in focus, the others keep what was last said of them."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

import sfumato as sf
from sfumato.acceleration import operations, region_adaptive
from sfumato.core import Context, Streams
from sfumato.guidance import cfg
from sfumato.recipes import Check, Findings, recipe
from sfumato.recipes import _plots as plots
from sfumato.recipes._emoji import Bench, Judge, bench, rms, seconds

STEPS, N, RATIOS = 28, 40, (0.5, 0.25)
RUN: dict[str, Any] = {"solver": "euler", "grid": "uniform", "steps": STEPS}
FULL: dict[str, Any] = {"start": 4, "resets": (12, 20)}
CITATION = """@article{liu2025regionadaptive,
  title = {Region-Adaptive Sampling for Diffusion Transformers},
  author = {Liu, Ziming and Yang, Yifan and Zhang, Chengruidong and Zhang, Yiqi and Qiu, Lili and You, Yang and Yang, Yuqing},
  journal = {arXiv:2502.10389}, year = {2025}
}"""


def part(b: Bench, n: int, side: int = 8) -> dict[str, Any]:
    """Options of a run of the first n prompts on latents of that side."""
    return {**RUN, "shape": (n, b.shape[1], side, side), "cond": {k: v[:n] for k, v in b.cond.items()}}


def followed(b: Bench, denoiser: Any, n: int) -> Tensor:
    """Importance of the tokens after each step of a run, (STEPS, n, tokens)."""
    options = part(b, n)
    ctx = Context(cond=options.pop("cond"), rng=Streams.of(b.seed, n), batch=n)
    with torch.no_grad():
        states = sf.trajectory(denoiser, **options, ctx=ctx)
        return torch.stack([ctx.memory["regions"]["focus"] for st in states if st.index])


def continuity(importance: Tensor) -> float:
    """Rank correlation (Spearman) of the importance of tokens, step to step from step 4 on: mean over items and steps."""
    ranks = importance.argsort(2).argsort(2).double()
    ranks = ranks - ranks.mean(2, keepdim=True)
    return float(torch.cosine_similarity(ranks[5:], ranks[4:-1], dim=2).mean())


def shaded(values: Tensor) -> Tensor:
    """Maps (n, 64) of 8 x 8 tokens as pictures of 64 x 64 pixels, each on its own scale."""
    from matplotlib import colormaps

    scaled = (values - values.amin(1, keepdim=True)) / (values.amax(1, keepdim=True) - values.amin(1, keepdim=True))
    colours = torch.tensor(colormaps["magma"](scaled.numpy())[..., :3] * 255).to(torch.uint8)
    return colours.view(-1, 8, 8, 3).permute(0, 3, 1, 2).repeat_interleave(8, 2).repeat_interleave(8, 3)


def picture(rows: dict[str, Tensor], curves: dict[str, list[tuple[float, float]]]) -> Any:
    """What is drawn and where it changes, and error against work."""
    with plots.style():
        made = plots.figure(11, 4.6)
        left, right = made.subfigures(1, 2, width_ratios=(1.75, 1))
        for axis, (name, images) in zip(left.subplots(len(rows)), rows.items(), strict=True):
            axis.imshow(plots.sheet(images, 10).numpy(), interpolation="lanczos")
            axis.set_title(name, loc="left", fontsize=9, fontweight="normal")
            axis.axis("off")
        axis = right.subplots()
        for name, points in curves.items():
            axis.plot(*zip(*sorted(points), strict=True), "o-", label=name, ms=4)
        axis.set(title="distance to 28 dense steps", ylabel="rms of the latent", ylim=(0, None))
        axis.set_xlabel("share of the work of 28 dense steps")
        axis.legend(loc="lower left")
        return plots.image(made)


@recipe(
    "ras",
    kind="acceleration",
    claim="What a diffusion transformer changes at a step is concentrated in regions that stay the same from step to step; running it "
    "on those, with kept keys, values and predictions for the rest, costs less quality than the same saving in steps.",
    baseline="fewer dense steps for the same work; random regions of the same size under the same rule against starvation; attention "
    "without the kept keys and values",
    citation=CITATION,
)
def ras(seed: int) -> Findings:
    """Steps on the regions that change, beside fewer dense steps and random regions."""
    b, judge = bench("emoji-latent", N, seed), Judge()
    d = cfg(b.pipeline.guidance)(b.pipeline.denoiser)

    def fast(ratio: float, **options: Any) -> Any:
        return region_adaptive(ratio, **FULL, **{"high": 0.0, **options})(d)

    def work(denoiser: Any) -> int:
        return operations(lambda: b.draw(denoiser, **part(b, 1)))

    share = {r: work(fast(r)) / work(d) for r in RATIOS}
    dense = b.draw(d, **RUN)
    ours = {r: b.draw(fast(r), **RUN) for r in RATIOS}
    fewer = {r: b.draw(d, **RUN | {"steps": round(STEPS * share[r])}) for r in RATIOS}
    chance = {r: b.draw(fast(r, metric="random"), **RUN) for r in RATIOS}
    others: tuple[dict[str, Any], ...] = {"high": 0.3}, {"high": 1.0}, {"keys": False}
    published, reverse, blind = (b.draw(fast(0.5, **options), **RUN) for options in others)
    fd = {r: [judge.frechet(b.images(x[r]), b.drawings) for x in (ours, fewer)] for r in RATIOS}
    error = {r: [rms(x[r], dense) for x in (ours, fewer, chance)] for r in RATIOS}
    focused, chance_error = (sum(error[r][i] for r in RATIOS) / len(RATIOS) for i in (0, 2))
    importance = followed(b, fast(1.0), 16)
    arms = {"dense": d, "ras": fast(0.25)}
    taken = {
        n: seconds({name: partial(b.draw, model, **part(b, n, side)) for name, model in arms.items()}, 3)
        for n, side in ((8, 8), (2, 16))
    }
    checks = [
        Check("everything active against dense, largest difference", float((b.draw(fast(1.0), **part(b, 4)) - b.draw(d, **part(b, 4))).abs().max()), None, "ours <= 1e-6"),
        *(Check(f"rms to dense, {r:.0%} active, and as many dense steps as the same work", error[r][0], error[r][1], "ours <= baseline") for r in RATIOS),
        *(Check(f"Fréchet distance, {r:.0%} active, and the same work", fd[r][0], fd[r][1], "ours <= 1.03 * baseline") for r in RATIOS),
        Check("rms to dense, mean of both shares, and of random regions", focused, chance_error, "ours <= 0.9 * baseline"),
        Check("rank correlation of the focus, step to step", continuity(importance), None, "ours >= 0.6"),
        Check("seconds over dense, 25% of 64 tokens active", taken[8]["ras"] / taken[8]["dense"], None, "ours <= 0.6"),
        Check("seconds over dense, 25% of 256 tokens active", taken[2]["ras"] / taken[2]["dense"], None, "ours <= 0.6"),
        Check("rms to dense, 50% active, and without kept keys", error[0.5][0], rms(blind, dense), "ours < baseline"),
    ]  # fmt: skip
    drawn = {"28 dense steps": dense} | {f"{r:.0%} of the tokens active: {share[r]:.0%} of the work": x for r, x in ours.items()}  # fmt: skip
    drawn[f"{round(STEPS * share[0.25])} dense steps: the same work as 25%"] = fewer[0.25]
    rows = {name: b.images(x[:10]) for name, x in drawn.items()}
    rows["how much each token changes at step 14: bright is much"] = shaded(importance[13, :10])
    return Findings(
        checks,
        nfe=STEPS,
        data=f"{N} captions of trained concepts, a drawing each; Fréchet distance in 32 components of the judge's features",
        model="emoji-latent with its guidance, Euler on a uniform grid, steps 0-3, 12 and 20 dense; 64 tokens a picture",
        notes=f"Skipped are the tokens of least change, chosen on seed 100: rms {error[0.5][0]:.3f} with half of them active, with 30% "
        f"of the skipped from the top as published for SD3 {rms(published, dense):.3f}, the reverse {rms(reverse, dense):.3f}. Against "
        "fewer steps it loses in distance: on this flow as many Euler steps as the work pays for are already close to 28, closer than a "
        "prediction that is several steps old (likely: a small network on small pictures has little that later steps refine). The picture of the "
        "focus hardly shows the drawing, because a flow's prediction holds the noise too and the latents have 4 channels to average "
        "over. 256 tokens are 16 x 16 latents, for the time only: the network was not taught that size and draws no emoji there.",
        picture=picture(rows, {
            "regions in focus": [(share[r], error[r][0]) for r in RATIOS], "fewer dense steps": [(share[r], error[r][1]) for r in RATIOS],
            "random regions": [(share[r], error[r][2]) for r in RATIOS],
        }),
    )  # fmt: skip
