"""Real speed and quality of accelerated models: ``python -m benchmarks.acceleration [--json docs/acceleration.json]``.

The same prompts and noise in one run; seconds are medians of runs taken in turns on a part of the prompts. The Fréchet distance
is to the training drawings of the prompts, in the judge's features.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sfumato import acceleration
from sfumato.core import Denoiser, Guidance
from sfumato.evaluation.metrics import frechet_distance
from sfumato.guidance import cfg
from sfumato.recipes._emoji import Bench, Judge, bench

Arm = Callable[[Denoiser, Guidance, Bench], Denoiser]


def inside(wrap: Guidance) -> Arm:
    """An acceleration of each reading of the network."""
    return lambda denoiser, guidance, b: guidance(wrap(denoiser))


def outside(wrap: Guidance) -> Arm:
    """An acceleration of the guided prediction."""
    return lambda denoiser, guidance, b: wrap(guidance(denoiser))


def integers(denoiser: Denoiser, guidance: Guidance, b: Bench) -> Denoiser:
    """Layers of 8-bit integers, their ranges from 64 guided runs of the model from other noise."""
    n = min(64, len(b.captions))
    cond = {k: v[:n] for k, v in b.cond.items()}
    given: dict[str, Any] = {"grid": b.pipeline.grid, "steps": 20, "dropout": 0.3, "seed": b.seed + 1}
    return guidance(
        acceleration.int8(denoiser, acceleration.denoised(guidance(denoiser), n, b.shape[1:], cond=cond, **given))
    )


ARMS: dict[str, Arm] = {
    "plain": lambda denoiser, guidance, b: guidance(denoiser),
    "deepcache, 1 call of 2 in full": inside(acceleration.deepcache(2)),
    "deepcache, 1 of 3": inside(acceleration.deepcache(3)),
    "deepcache, 1 of 5": inside(acceleration.deepcache(5)),
    "8-bit integers (work: what is left in floats)": integers,
    "token merging, 25 % in attention": inside(acceleration.token_merging(0.25)),
    "token merging, 50 % in attention": inside(acceleration.token_merging(0.5)),
    "token merging, 50 % in all parts": inside(acceleration.token_merging(0.5, parts=("attention", "cross", "mlp"))),
    "region-adaptive, 50 % of the tokens": outside(acceleration.region_adaptive(0.5, 4, (12, 20), high=0.0)),
    "region-adaptive, 25 % of the tokens": outside(acceleration.region_adaptive(0.25, 4, (12, 20), high=0.0)),
}


def measure(model: str, n: int, steps: int, seed: int, repeat: int) -> dict[str, Any]:
    """Speed, work and Fréchet distance of each arm over the plain model, as JSON values."""
    b, judge = bench(model, n, seed), Judge()
    guidance = cfg(float(b.pipeline.guidance))
    denoisers = {name: arm(b.pipeline.denoiser, guidance, b) for name, arm in ARMS.items()}
    part: dict[str, Any] = {
        "shape": (8, *b.shape[1:]),
        "cond": {k: v[:8] for k, v in b.cond.items()},
        "steps": steps,
    }
    taken: dict[str, list[float]] = {name: [] for name in ARMS}
    for turn in range(repeat + 1):
        for name, denoiser in denoisers.items():
            began = time.perf_counter()
            b.draw(denoiser, **part)
            if turn:  # the first warms up
                taken[name].append(time.perf_counter() - began)
    real, rows, base = judge(b.drawings).double(), list[dict[str, Any]](), dict[str, Any]()
    for name, denoiser in denoisers.items():
        found = frechet_distance(judge(b.images(b.draw(denoiser, steps=steps))).double(), real)
        row: dict[str, Any] = {
            "arm": name,
            "seconds": statistics.median(taken[name]),
            "operations": acceleration.operations(lambda d=denoiser: b.draw(d, **part)),  # type: ignore[misc]
            "frechet": found.value,
            "interval": [found.low, found.high],
        }
        base = base or row
        row |= {"speed": base["seconds"] / row["seconds"], "work": row["operations"] / base["operations"]}
        row["change"] = row["frechet"] / base["frechet"] - 1
        rows.append(row)
    about = {"model": model, "n": n, "steps": steps, "guidance": b.pipeline.guidance, "seed": seed}
    return {**about, "threads": torch.get_num_threads(), "torch": torch.__version__.split("+")[0], "rows": rows}


def line(row: dict[str, Any]) -> str:
    """One arm as text."""
    low, high = row["interval"]
    return (
        f"{row['arm']:40} {row['speed']:5.2f} x the speed, {row['work']:5.2f} of the work, Fréchet {row['frechet']:.4f} "
        f"({row['change']:+.1%}; {low:.4f} to {high:.4f})"
    )


def main() -> None:
    """Print one line an arm, and keep all figures where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="emoji-latent")
    parser.add_argument("--n", type=int, default=200)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    found = measure(given.model, given.n, given.steps, given.seed, given.repeat)
    print(f"{given.model}, {given.n} prompts, {given.steps} steps of DDIM, guidance {found['guidance']:g}")
    for row in found["rows"]:
        print(line(row))
    if given.json is not None:
        given.json.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    main()
