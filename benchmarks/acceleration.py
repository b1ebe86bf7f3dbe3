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
from importlib.util import find_spec
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


def integers(backend: str) -> Arm:
    """Layers of 8-bit integers, their ranges from 64 guided runs of the model from other noise."""
    return lambda denoiser, guidance, b: guidance(
        acceleration.int8(denoiser, b.pipeline.calibration(64, 20, b.seed + 1), backend=backend)
    )


def absent(backend: str) -> str | None:
    """The package that an engine misses here, if it does."""
    wanted = {"onnxruntime": ("onnxruntime", "onnxscript"), "torchao": ("torchao",)}.get(backend, ())
    return next((name for name in wanted if find_spec(name) is None), None)


ARMS: dict[str, Arm] = {
    "plain": lambda denoiser, guidance, b: guidance(denoiser),
    "deepcache, 1 call of 2 in full": inside(acceleration.deepcache(2)),
    "deepcache, 1 of 3": inside(acceleration.deepcache(3)),
    "deepcache, 1 of 5": inside(acceleration.deepcache(5)),
    "8-bit integers": integers("onednn"),
    "8-bit integers by onnxruntime": integers("onnxruntime"),
    "8-bit integers by torchao, compiled": integers("torchao"),
    "token merging, 25 % but for the first blocks": inside(acceleration.token_merging(0.25)),
    "token merging, 25 % in attention": inside(acceleration.token_merging(0.25, spare=0)),
    "token merging, 50 % in attention": inside(acceleration.token_merging(0.5, spare=0)),
    "token merging, 50 % in all parts": inside(
        acceleration.token_merging(0.5, parts=("attention", "cross", "mlp"), spare=0)
    ),
    "region-adaptive, 50 % of the tokens": outside(acceleration.region_adaptive(0.5, 4, (12, 20), high=0.0)),
    "region-adaptive, 25 % of the tokens": outside(acceleration.region_adaptive(0.25, 4, (12, 20), high=0.0)),
}


def chosen(only: str) -> dict[str, Arm]:
    """The plain model and the arms whose name has ``only`` in it, without those whose engine is not installed, which is said."""
    missing = {name: absent(name.split()[3].strip(",")) for name in ARMS if "integers by" in name}
    for name, package in missing.items():
        if package:
            print(f"left out, {package} is not installed: {name}")
    return {name: arm for name, arm in ARMS.items() if (only in name or name == "plain") and not missing.get(name)}


def measure(model: str, n: int, steps: int, seed: int, repeat: int, only: str = "") -> dict[str, Any]:
    """Speed, work and Fréchet distance of each arm over the plain model, as JSON values."""
    b, judge, arms = bench(model, n, seed), Judge(), chosen(only)
    guidance = cfg(float(b.pipeline.guidance))
    denoisers = {name: arm(b.pipeline.denoiser, guidance, b) for name, arm in arms.items()}
    part: dict[str, Any] = {
        "shape": (8, *b.shape[1:]),
        "cond": {k: v[:8] for k, v in b.cond.items()},
        "steps": steps,
    }
    taken: dict[str, list[float]] = {name: [] for name in arms}
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
    parser.add_argument("--only", default="", help="arms with this in their name, beside the plain model: 'integers'")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    found = measure(given.model, given.n, given.steps, given.seed, given.repeat, given.only)
    print(f"{given.model}, {given.n} prompts, {given.steps} steps of DDIM, guidance {found['guidance']:g}")
    for row in found["rows"]:
        print(line(row))
    if given.json is not None:
        given.json.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    main()
