"""Time and memory of the same Stable-Diffusion-class pipeline through diffusers' loop and through ours, as ratios in one run.

Same random weights, noise, schedule, steps and guidance; the U-Net is large enough that its cost dominates, as in use. Rounds
are interleaved; the time is the median CPU time of one thread, the memory the peak of what torch allocates beyond the model.
"transformer" is a DiT (4 heads of 64, 4 layers, 256 tokens, two classes), also with ``accelerated("onednn")``.

    python -m benchmarks.diffusers_pipelines [--rounds 5] [--steps 10]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch

import sfumato as sf
from sfumato.core import Streams
from sfumato.interop import tiny

PROMPTS = ["a red heart", "blue sky"]
CLASSES = [1, 2]
DEEP = {"sample_size": 32, "num_layers": 4, "attention_head_dim": 64, "num_attention_heads": 4}
WIDE = {"block_out_channels": (32, 64), "norm_num_groups": 8, "attention_head_dim": 8, "sample_size": 16}


def runs(steps: int) -> dict[str, dict[str, Callable[[], Any]]]:
    """Per pipeline, the loops: {"ddim": {"diffusers": run, "ours": run}, ...}."""
    import diffusers

    out = {}
    schedulers = {
        "ddim": diffusers.DDIMScheduler(clip_sample=False),
        "dpm-solver++": diffusers.DPMSolverMultistepScheduler(),
        "unipc": diffusers.UniPCMultistepScheduler(),
    }
    for name, scheduler in schedulers.items():
        pipe = tiny.pipeline("sd", scheduler, **WIDE)
        model = sf.from_diffusers(pipe)
        out[name] = {"diffusers": _theirs(pipe, model, steps), "ours": _ours(model, steps, prompts=PROMPTS)}
    pipe = tiny.pipeline("dit", **DEEP)
    model = sf.from_diffusers(pipe)
    out["transformer"] = {
        "diffusers": lambda: pipe(CLASSES, num_inference_steps=steps, guidance_scale=5.0, output_type="pt").images,
        "ours": _ours(model, steps, prompts=2, cond={"label": CLASSES}),
        "onednn": _ours(model.accelerated("onednn"), steps, prompts=2, cond={"label": CLASSES}),
    }
    return out


def _theirs(pipe: Any, model: Any, steps: int) -> Callable[[], Any]:
    noise = Streams.of(0, 2).normal(torch.empty(2, *model.codec.shape(*model.size)))

    def run() -> Any:
        return pipe(PROMPTS, latents=noise, num_inference_steps=steps, guidance_scale=5.0, output_type="pt").images

    return run


def _ours(model: Any, steps: int, **asked: Any) -> Callable[[], Any]:
    return lambda: model.generate(**asked, steps=steps, guidance=5.0, seed=0)


def seconds(run: Callable[[], Any]) -> float:
    """CPU seconds of one run."""
    begin = time.process_time()
    run()
    return time.process_time() - begin


def megabytes(run: Callable[[], Any]) -> float:
    """The peak of what torch holds during a run, over what it held before."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    held = peak = 0
    events = (e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]")
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak / 1e6


def measure(rounds: int = 5, steps: int = 10) -> dict[str, Any]:
    """{pipeline: {"seconds": over diffusers', "memory": over diffusers', and the figures themselves}}."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    out = {}
    for name, loops in runs(steps).items():
        for run in loops.values():
            run()
        times: dict[str, list[float]] = {who: [] for who in loops}
        for _ in range(rounds):
            for who, run in loops.items():
                times[who].append(seconds(run))
        median = {who: statistics.median(v) for who, v in times.items()}
        peaks = {who: megabytes(run) for who, run in loops.items()}
        mine = [who for who in loops if who != "diffusers"]
        out[name] = {
            "seconds": {who: round(median[who] / median["diffusers"], 3) for who in mine},
            "memory": {who: round(peaks[who] / peaks["diffusers"], 3) for who in mine},
            "seconds of each": {who: round(v, 3) for who, v in median.items()},
            "megabytes of each": {who: round(v, 2) for who, v in peaks.items()},
        }
    return out


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10)
    given = parser.parse_args()
    print(json.dumps(measure(given.rounds, given.steps), indent=1))


if __name__ == "__main__":
    main()
