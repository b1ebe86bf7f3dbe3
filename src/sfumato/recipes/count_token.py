"""Count token: a vector in the prompt, learnt through the sampler, that makes a careless model draw the number asked for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sfumato.codecs import to_uint8
from sfumato.core import Streams, mix
from sfumato.editing.tokens import CountLoss, Token, optimise_token
from sfumato.evaluation.measurement import bootstrap_interval
from sfumato.recipes import Check, Findings, recipe
from sfumato.recipes import _plots as plots
from sfumato.recipes import _scenes as S
from sfumato.tuning.inputs import Generator, random_search

ITERATIONS, WEIGHT, LR, NOISES = 25, 1.0, 0.3, 2
PROMPTS = [(k, ("small", "large")[(k + n) % 2], n) for k in range(4) for n in range(1, 7)]
ASKED = [item for item in PROMPTS for _ in range(NOISES)]
WANTED, KINDS = torch.tensor([n for *_, n in ASKED]), torch.tensor([k for k, *_ in ASKED])
LARGE = torch.tensor([size == "large" for _, size, _ in ASKED])
CITATION = """@article{zafar2024counttoken,
  title = {Iterative Object Count Optimization for Text-to-image Diffusion Models},
  author = {Zafar, Oz and Wolf, Lior and Schwartz, Idan},
  journal = {arXiv preprint arXiv:2408.11721}, year = {2024}
}"""


def noise(seed: int, part: int) -> Tensor:
    return Streams.of(mix(seed, part), len(ASKED)).normal(torch.empty(len(ASKED), 3, S.SIDE, S.SIDE))


def learnt(generate: Generator, x: Tensor, cond: Any, count: Any, helper: Any, rows: Tensor) -> Token:
    """A token for each prompt of these rows, from the states of "some", on both of its noises."""

    def loss(pictures: Tensor) -> Tensor:
        return count(pictures) + WEIGHT * (1 - helper(pictures)[1].softmax(1).gather(1, KINDS[rows][:, None])[:, 0])

    some = S.table()[[S.WORDS.index("some")]]
    return optimise_token(
        generate, x[rows], {k: v[rows] for k, v in cond.items()}, loss, init=some, shared=torch.arange(len(rows)) // NOISES,
        steps=ITERATIONS, lr=LR, decay=0.01, patience=None,
    ).token  # fmt: skip


def chance(generate: Generator, x: Tensor, cond: Any, seed: int) -> dict[str, Tensor]:
    """The best of as many noises, and of as many random tokens on the same noise, by the detector."""
    draw = torch.Generator().manual_seed(mix(seed, 3) % 2**31)

    def error(given: Any) -> Tensor:
        return (
            (S.components(generate(given["x"], Token(given["token"]).put(cond) if "token" in given else cond)) - WANTED)
            .abs()
            .float()
        )

    def fresh(i: int) -> Any:
        return {"x": noise(seed, 100 + i)}

    def tokens(i: int) -> Any:
        return {"x": x, "token": torch.randn(len(x), 1, S.CHANNELS, generator=draw)}

    noises, random = random_search(fresh, error, ITERATIONS).values, random_search(tokens, error, ITERATIONS).values
    with torch.no_grad():
        return {
            "best of random tokens": generate(x, Token(random["token"]).put(cond)),
            f"best of {ITERATIONS} noises": generate(noises["x"], cond),
        }


def picture(rows: dict[str, Tensor], bars: dict[str, Tensor]) -> Any:
    """Prompts with and without their tokens, and the mean errors of all arms."""
    shown = [i for i, (k, _, n) in enumerate(ASKED) if i % NOISES == 0 and (k, n) in SHOWN]
    with plots.style():
        made = plots.figure(11, 4.1)
        left, right = made.subfigures(1, 2, width_ratios=(1.75, 1))
        axes = left.subplots(len(rows), len(shown))
        for row, (title, images) in enumerate(rows.items()):
            for ax, i in zip(axes[row], shown, strict=True):
                k, size, n = ASKED[i]
                plots.show(ax, to_uint8(images[i][None]), 1, 0)
                ax.spines[:].set(visible=True, color=plots.PALE)
                if row == 0:
                    ax.set_title(f"{S.COUNTS[n - 1]} {size}\n{S.NOUNS[k]}", fontsize=8.5)
            axes[row, 0].set_ylabel(title, fontsize=8.5)
        ax = right.subplots()
        for offset, (name, rows_of, colour) in enumerate(
            (("small", ~LARGE, plots.SECOND), ("large", LARGE, plots.ACCENT))
        ):
            values = [float(v[rows_of.repeat(len(v) // len(rows_of))].mean()) for v in bars.values()]
            ax.barh(
                [i + 0.38 * (offset - 0.5) for i in range(len(bars))],
                values,
                0.36,
                color=colour,
                label=f"{name} drawings",
            )
        ax.set(yticks=range(len(bars)), yticklabels=list(bars), xlabel="mean error of the number drawn")
        ax.invert_yaxis()
        ax.legend(loc="lower right", fontsize=8)
        ax.tick_params(length=0)
        return plots.image(made)


SHOWN = ((0, 2), (1, 4), (2, 6), (3, 3), (0, 5), (1, 1))


@recipe(
    "count-token",
    kind="guidance",
    claim="One token beside the prompt, optimised through the sampler into a density counter whose scale a detector sets anew on "
    "every picture, gives the number of objects asked for, keeps the objects, and can be reused for other noise.",
    baseline="the prompt alone; the counter with its fixed scale; the best of as many noises or random tokens",
    citation=CITATION,
)
def count_token(seed: int) -> Findings:
    model, (counter, scale) = S.generator(seed), S.density(seed)
    helper, judge = S.reader(seed, 12, 120), S.reader(mix(seed, 1))  # the judge is not asked before the end
    cond = S.prompts([f"{S.COUNTS[n - 1]} {size} {S.NOUNS[k]}" for k, size, n in ASKED])
    generate, x, big = Generator(model, steps=6, grid="uniform"), noise(seed, 1), LARGE.nonzero()[:, 0]
    token = learnt(generate, x, cond, CountLoss(counter, WANTED, scale, S.components), helper, torch.arange(len(x)))
    fixed = learnt(generate, x, cond, CountLoss(counter, WANTED[big], scale), helper, big)
    with torch.no_grad():
        base, ours = generate(x, cond), generate(x, token.put(cond))
        static = generate(x[big], fixed.put({k: v[big] for k, v in cond.items()}))
        fresh = [noise(seed, part) for part in (50, 51)]
        alone, reused = ([generate(z, c) for z in fresh] for c in (cond, token.put(cond)))
    others = chance(generate, x, cond, seed)

    def errors(pictures: Tensor, wanted: Tensor = WANTED) -> Tensor:
        return (judge.count(pictures) - wanted).abs().float()

    mean = {name: float(errors(p).mean()) for name, p in {"base": base, "ours": ours, **others}.items()}
    before, after = (torch.cat([errors(p) for p in each]) for each in (alone, reused))
    gain = bootstrap_interval(lambda v: float(v.mean()), after - before, seed=seed)
    kept, kept_before = (float((judge.kind(p) == KINDS).float().mean()) for p in (ours, base))
    upscaled = [float((S.components(p, 2) - WANTED).abs().float().mean()) for p in (base, ours)]
    best = mean[f"best of {ITERATIONS} noises"]
    bars = {
        "prompt alone": errors(base),
        "token": errors(ours),
        "prompt alone, new noise": before,
        "token, new noise": after,
    }
    return Findings(
        [
            Check(
                "mean error of the number drawn, by an independent counter",
                mean["ours"],
                mean["base"],
                "ours <= 0.6 * baseline",
            ),
            Check(
                "mean error on sizes the counter never saw, against its fixed scale",
                float(errors(ours)[big].mean()),
                float(errors(static, WANTED[big]).mean()),
                "ours < baseline",
            ),
            Check("change of the error by a reused token, upper end of the 95 % interval", gain.high, None, "ours < 0"),
            Check("share of pictures of the right object", kept, kept_before, "ours >= 0.9 * baseline"),
            Check(
                f"mean error, against the best of {ITERATIONS} noises by the detector",
                mean["ours"],
                best,
                "ours <= baseline",
            ),
        ],
        nfe={"a picture": 6, "a token": 6 * 3 * ITERATIONS},
        data=f"scenes of one to six emoji of four kinds in two sizes, made here; {len(PROMPTS)} prompts with {NOISES} noises each, {2 * len(x)} pictures of new noise for reuse",
        model="U-Net (0.6 million weights, rectified flow, 24 x 24 pixels) taught here on careless captions; 6 steps in the place of a one-step model",
        notes=f"A token a prompt, learnt on {NOISES} noises; learning rate and the line of the number words were chosen on seeds 100 and 101. Error of the "
        f"prompt alone {mean['base']:.2f}, token {mean['ours']:.2f}, best of as many random tokens {mean['best of random tokens']:.2f}, best of as many noises {best:.2f}: "
        "noises chosen by the same detector are better than the token wherever chance draws the right number now and then; they cost "
        f"as much again for every picture. Reused on new noise: {float(before.mean()):.2f} to {float(after.mean()):.2f}; captions two off leave the model a broad "
        f"law of numbers whatever the token, so most of what a token gains belongs to the noises it was learnt on. Components on a doubled picture say {upscaled[0]:.2f} "
        f"to {upscaled[1]:.2f}. The density counter was taught on small drawings only.",
        picture=picture(
            {"prompt alone": base, "token": ours, "token,\nnew noise": reused[0]},
            bars | {k: errors(v) for k, v in others.items()},
        ),
    )
