"""Real speed and quality of accelerated models: ``python -m benchmarks.acceleration``.

The same prompts and noise in one run; seconds are medians of runs taken in turns on a part of the prompts. The Fréchet distance
is to the training drawings of the prompts, in the judge's features.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch

from sfumato import acceleration
from sfumato.evaluation.metrics import frechet_distance
from sfumato.guidance import cfg
from sfumato.recipes._emoji import Judge, bench

ARMS: dict[str, Any] = {
    "plain": lambda d: d,
    "deepcache, 1 call of 2 in full": acceleration.deepcache(2),
    "deepcache, 1 of 3": acceleration.deepcache(3),
    "deepcache, 1 of 5": acceleration.deepcache(5),
}


def main() -> None:
    """Print one line an arm."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="emoji-latent")
    parser.add_argument("--n", type=int, default=200)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeat", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(max(1, torch.get_num_threads()))
    b, judge = bench(given.model, given.n, given.seed), Judge()
    scale = b.pipeline.guidance
    denoisers = {name: cfg(scale)(wrap(b.pipeline.denoiser)) for name, wrap in ARMS.items()}
    part: dict[str, Any] = {
        "shape": (8, *b.shape[1:]),
        "cond": {k: v[:8] for k, v in b.cond.items()},
        "steps": given.steps,
    }
    taken: dict[str, list[float]] = {name: [] for name in ARMS}
    for _ in range(given.repeat):
        for name, denoiser in denoisers.items():
            began = time.perf_counter()
            b.draw(denoiser, **part)
            taken[name].append(time.perf_counter() - began)
    real, base = judge(b.drawings).double(), None
    print(f"{given.model}, {given.n} prompts, {given.steps} steps of DDIM, guidance {scale:g}")
    for name, denoiser in denoisers.items():
        distance = frechet_distance(judge(b.images(b.draw(denoiser, steps=given.steps))).double(), real).value
        work = acceleration.operations(lambda d=denoiser: b.draw(d, **part))  # type: ignore[misc]
        seconds = statistics.median(taken[name])
        base = base or (seconds, work, distance)
        print(
            f"{name:32} {base[0] / seconds:5.2f} x the speed, {work / base[1]:5.2f} of the work, Fréchet {distance:.4f} "
            f"({distance / base[2] - 1:+.1%})",
            flush=True,
        )


if __name__ == "__main__":
    main()
