"""DeepCache: deep features are reused between neighbouring steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sfumato import acceleration
from sfumato.acceleration.caching import deep_modules
from sfumato.denoisers.features import network
from sfumato.recipes import Check, Findings, recipe
from sfumato.recipes import _plots as plots
from sfumato.recipes._emoji import Bench, Judge, bench, rms, seconds

STEPS, INTERVALS, N = 50, (2, 3, 5), 96
CITATION = """@inproceedings{ma2024deepcache,
  title = {DeepCache: Accelerating Diffusion Models for Free},
  author = {Ma, Xinyin and Fang, Gongfan and Wang, Xinchao},
  booktitle = {CVPR}, year = {2024}
}"""


def work(b: Bench, denoiser: Any, steps: int) -> int:
    """Operations of a run of one item."""
    cond = {k: v[:1] for k, v in b.cond.items()}
    return acceleration.operations(lambda: b.draw(denoiser, steps=steps, shape=(1, *b.shape[1:]), cond=cond))


def redundancy(b: Bench, items: int = 16) -> Tensor:
    """Cosine of the deep features of one step with those of the step before, an item's mean (STEPS - 1,)."""
    (path,), _ = deep_modules(network(b.pipeline.denoiser), 0)
    seen: list[Tensor] = []

    def look(ctx: Any, call: Any, *args: Any) -> Any:
        seen.append(call(*args).flatten(1))
        return call(*args)

    from sfumato.core import Context, Streams

    cond = {k: v[:items] for k, v in b.cond.items()}
    ctx = Context(cond=cond, rng=Streams.of(b.seed, items), batch=items, taps=((path, look),))
    b.draw(steps=STEPS, shape=(items, *b.shape[1:]), cond=None, batch=None, ctx=ctx)
    deep = torch.stack(seen)
    return torch.cosine_similarity(deep[1:], deep[:-1], dim=2).mean(1)


def picture(b: Bench, similar: Tensor, rows: dict[str, Tensor], curves: dict[str, list[tuple[float, float]]]) -> Any:
    """Redundancy, error against work, and what is drawn."""
    with plots.style():
        made = plots.figure(11, 5.4)
        left, right = made.subfigures(1, 2, width_ratios=(1, 1.5))
        top, below = left.subplots(2)
        top.plot(range(1, STEPS), similar.tolist(), color=plots.SECOND)
        top.axhline(0.9, color=plots.PALE, zorder=0)
        top.set(
            title="cosine of deep features, step to step", xlabel="step", ylim=(min(0.7, float(similar.min())), 1.005)
        )
        for name, points in curves.items():
            below.plot(*zip(*sorted(points), strict=True), "o-", label=name, ms=4)
        below.set(
            title="distance to 50 full steps", xlabel="share of the work of 50 full steps", ylabel="rms of the state"
        )
        below.legend()
        for axis, (name, x) in zip(right.subplots(len(rows)), rows.items(), strict=True):
            axis.imshow(plots.sheet(b.images(x[:14]), 14).numpy(), interpolation="lanczos")
            axis.set_title(name, loc="left", fontsize=9, fontweight="normal")
            axis.axis("off")
        return plots.image(made)


@recipe(
    "deepcache",
    kind="acceleration",
    claim="Deep features of neighbouring steps are nearly the same, so recomputing them at one step of N keeps the samples better than "
    "spending the same work on fewer full steps.",
    baseline="DDIM with as many full steps as the same work pays for; the output of the network repeated instead of its deep features",
    citation=CITATION,
)
def deepcache(seed: int) -> Findings:
    """Deep features kept over N steps, beside fewer full steps of the same work."""
    b, judge = bench("emoji-pixel", N, seed), Judge()
    plain = b.pipeline.denoiser
    full, whole = b.draw(steps=STEPS), work(b, plain, STEPS)
    share = {n: work(b, acceleration.deepcache(n)(plain), STEPS) / whole for n in INTERVALS}
    ours = {n: b.draw(acceleration.deepcache(n)(plain), steps=STEPS) for n in INTERVALS}
    fewer = {n: b.draw(steps=round(STEPS * share[n])) for n in INTERVALS}
    repeated = b.draw(acceleration.cached([""], full=lambda i, total: i % 3 == 0)(plain), steps=STEPS)
    fd = {
        n: (judge.frechet(b.images(ours[n]), b.drawings), judge.frechet(b.images(fewer[n]), b.drawings))
        for n in INTERVALS
    }
    error = {n: (rms(ours[n], full), rms(fewer[n], full)) for n in INTERVALS}
    similar = redundancy(b)
    part = {"shape": (16, *b.shape[1:]), "cond": {k: v[:16] for k, v in b.cond.items()}, "steps": 12}
    taken = seconds(
        {"full": lambda: b.draw(**part), "cached": lambda: b.draw(acceleration.deepcache(3)(plain), **part)}
    )
    same = b.draw(acceleration.deepcache(1)(plain), **part)
    around = b.draw(acceleration.deepcache(5, schedule="around", center=20.0)(plain), steps=STEPS)
    checks = [
        Check("interval 1 against the plain network, largest difference", float((same - b.draw(**part)).abs().max()), None, "ours <= 0"),
        Check("share of steps whose deep features have a cosine of 0.9 or more", float((similar >= 0.9).double().mean()), None, "ours >= 0.8"),
        Check("of 3 intervals, with a Fréchet distance within 1.02 of the same work", sum(a <= 1.02 * c for a, c in fd.values()), None, "ours >= 2"),
        Check("of 3 intervals, nearer to 50 full steps than the same work", sum(a <= c for a, c in error.values()), None, "ours >= 2"),
        Check("seconds, interval 3, over its share of the work", taken["cached"] / taken["full"] / (work(b, acceleration.deepcache(3)(plain), 12) / work(b, plain, 12)), None, "ours <= 1.15"),
        Check("rms with the output repeated, interval 3", error[3][0], rms(repeated, full), "ours < baseline"),
    ]  # fmt: skip
    lines = "; ".join(
        f"1 of {n}: {share[n]:.2f} of the work, Fréchet {fd[n][0]:.3f} (fewer steps {fd[n][1]:.3f})" for n in INTERVALS
    )
    rows = {"50 full steps": full, **{f"full every {n} steps: {share[n]:.0%} of the work": ours[n] for n in INTERVALS}}
    rows |= {
        f"{round(STEPS * share[5])} full steps: the same work as every 5": fewer[5],
        "output repeated, every 3": repeated,
    }
    return Findings(
        checks,
        nfe=STEPS,
        data=f"{N} captions of trained concepts, a drawing each; Fréchet distance in 32 components of the judge's features",
        model="emoji-pixel without guidance, DDIM",
        notes=f"{lines}. At interval 5 full steps closer together around step 20 have {judge.frechet(b.images(around), b.drawings):.3f}. "
        "Below the first resolution lies only half of this network's work (the paper's U-Nets have more), which bounds the saving; and "
        "DDIM on it changes little between 25 and 50 steps, so features of an earlier step cost more accuracy than the steps left out.",
        picture=picture(
            b, similar, rows,
            {"deep features kept": [(share[n], error[n][0]) for n in INTERVALS], "fewer full steps": [(share[n], error[n][1]) for n in INTERVALS]},
        ),
    )  # fmt: skip
