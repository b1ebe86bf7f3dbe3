"""Cyclic one-way diffusion: half a face is kept and the model draws the other half, against one descent and against resampling."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sfumato import editing, load
from sfumato.recipes import Check, Findings, recipe
from sfumato.recipes import _plots as plots
from sfumato.recipes._emoji import Judge
from sfumato.recipes._pairs import interval
from sfumato.zoo import emoji

N, STEPS, HALF = 16, 20, 32
WAYS = {
    "COW": ("cow(cycles=6)", STEPS),
    "overwriting only": ("cow(cycles=0)", 35),
    "RePaint": ("cow(cycles=8, known='noised')", STEPS),
}
CITATION = """@inproceedings{wang2024cow,
  title = {Diffusion in Diffusion: Cyclic One-Way Diffusion for Text-Vision-Conditioned Generation},
  author = {Wang, Ruoyu and Yang, Yongqi and Qian, Zhihao and Zhu, Ye and Wu, Yu},
  booktitle = {International Conference on Learning Representations}, year = {2024}
}"""


def seam(images: Tensor) -> float:
    """The mean absolute step of a channel across the border of the two halves."""
    return float((images[..., HALF].float() - images[..., HALF - 1].float()).abs().mean())


def picture(given: Tensor, made: dict[str, Tensor], captions: list[str]) -> Any:
    """What is kept, what each way makes of it, and the real picture."""
    kept = given.clone()
    kept[..., HALF:] = 127
    rows = {"kept": kept, **made, "real": given}
    with plots.style():
        fig = plots.figure(9.5, 5.9)
        axes = fig.subplots(len(rows), 1)
        for ax, (name, u) in zip(axes, rows.items(), strict=True):
            plots.show(ax, u[:9], 9, 8)
            ax.set_ylabel(name.replace(" ", "\n"), rotation=0, ha="right", va="center")
        names = ["\n".join(c.split()[i] for i in range(min(3, len(c.split())))) for c in captions[:9]]
        axes[-1].set_xticks([72 * (i + 0.5) - 4 for i in range(9)], names, fontsize=7)
        axes[-1].tick_params(length=0)
        return plots.image(fig)


@recipe(
    "cow",
    kind="editing",
    claim="Cycles of noising and denoising with the kept part overwritten by its own inversion join it to the rest better than "
    "overwriting alone at equal calls, keep it as well and follow the prompt as well; information flows out of it and not into it.",
    baseline="the same overwriting in one descent of as many calls; as many calls of RePaint-style cycles, which overwrite with the noised kept part",
    citation=CITATION,
)
def cow(seed: int) -> Findings:
    """Cycles around the kept part beside a single descent and RePaint's cycles of as many calls."""
    pipeline, judge = load("emoji-latent"), Judge()
    unseen = emoji.load(64, split="unseen", skin_tones=False)
    faces = [
        i
        for i, k in enumerate(unseen.category.tolist())
        if unseen.categories[k] in ("Smileys & Emotion", "Animals & Nature")
    ]
    order = torch.randperm(len(faces), generator=torch.Generator().manual_seed(seed))[:N].tolist()
    chosen = unseen.select([faces[i] for i in order])
    given, vendors = chosen.images, [emoji.VENDORS[v] for v in chosen.vendor.tolist()]
    vector = pipeline.conditions(N, chosen.captions)["vector"]
    mask = torch.zeros(64, 64)
    mask[:, HALF:] = 1

    def run(images: Tensor, method: str, steps: int) -> Any:
        n = len(images)
        return editing.perform(
            pipeline, images, chosen.captions[:n], method=method, source=chosen.captions[:n], cond={"vendor": vendors[:n]}, mask=mask,
            steps=steps, solver="ddim", grid="uniform", seed=seed,
        )  # fmt: skip

    found = {name: run(given, *way) for name, way in WAYS.items()}
    made = {k: v.images for k, v in found.items()}
    off = {k: abs(seam(u) / seam(given) - 1) for k, u in made.items()}
    kept = {
        k: float((u[..., :HALF].float() - given[..., :HALF].float()).square().mean().sqrt()) for k, u in made.items()
    }
    agreement = {k: 100 * judge.agreement(u, vector).double() for k, u in made.items()}
    low, high = interval(agreement["COW"] - agreement["overwriting only"], seed)
    base, known, rest = given[:8], given[:8].clone(), given[:8].clone()
    known[..., :HALF], rest[..., HALF:] = given[8:, ..., :HALF], given[8:, ..., HALF:]
    one, *others = (run(u, "cow(cycles=6, canvas=None)", STEPS).images.float() for u in (base, known, rest))
    outside, inside = (
        float((others[0] - one)[..., HALF:].abs().mean()),
        float((others[1] - one)[..., :HALF].abs().mean()),
    )
    return Findings(
        [
            Check("step across the seam over the real one, off 1", off["COW"], off["overwriting only"], "ours <= 0.8 * baseline"),
            Check("RMSE of the kept half, of 255", kept["COW"], kept["overwriting only"], "ours <= 1.25 * baseline"),
            Check("agreement with the caption over overwriting only: high end of the 95 % interval", high, None, "ours >= 0"),
            Check("RMSE of the kept half, against RePaint-style cycles", kept["COW"], kept["RePaint"], "ours <= 0.9 * baseline"),
            Check("change of the rest by another kept half, over that of the kept half by another rest", outside, inside, "ours >= 3 * baseline"),
        ],
        nfe={k: v.nfe for k, v in found.items()},
        data=f"{N} unseen smileys and animals, the left half kept",
        model=f"emoji-latent, scale 3, DDIM on uniform steps ({', '.join(f'{k} {n}' for k, (_, n) in WAYS.items())} a whole run)",
        notes="Seam off 1: " + ", ".join(f"{k} {v:.3f}" for k, v in off.items()) + "; RMSE of the kept half: "
        + ", ".join(f"{k} {v:.1f}" for k, v in kept.items()) + "; cosine to the caption x 100: "
        + ", ".join(f"{k} {v.mean():.1f}" for k, v in agreement.items()) + f"; COW minus overwriting only {low:.2f} to {high:.2f} (95 % paired bootstrap). "
        "One way: with the rest's own picture as the canvas, 8 of the pictures. Left out for the budget: SDEdit of the canvas, the curve over cycles, and the "
        "Fréchet distance.",
        picture=picture(given, made, chosen.captions),
    )  # fmt: skip
