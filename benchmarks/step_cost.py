"""Microseconds a sampling step costs outside the network, ours and diffusers', on a (4, 3, 32, 32) float32 tensor.

The network is a function that returns its input, so all that is left is the solver. Every sampler runs 100 steps; rounds are
interleaved and the figure is the median over rounds of CPU time on one thread, which other programs do not change. Drawing
noise is shown apart, beside torch.randn. For the bundled models: the share of a run's time that is the network's own.

    python benchmarks/step_cost.py [--rounds 15]
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
from torch import Tensor, nn

import sfumato as sf
from sfumato.core import Streams

STEPS, SHAPE, BUDGET, SHARE = 100, (4, 3, 32, 32), 60.0, 0.95
PAIRS = {"ddim": "DDIM", "dpm-solver++": "DPM++ 2M", "heun": "Heun", "ddpm": "DDPM"}


class Echo(nn.Module):
    """Predicts its input."""

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        return x


def ours(name: str) -> Callable[[], float]:
    """Microseconds a step of one of our solvers."""
    denoiser = sf.parametrized(Echo(), sf.processes.DDPM("linear"), "eps")
    x = torch.randn(SHAPE)
    return timed(lambda: sf.sample(denoiser, solver=name, grid="uniform", steps=STEPS, x=x), STEPS)


def timed(
    run: Callable[[], Any], units: int, repeats: int = 1, before: Callable[[], Any] = lambda: None
) -> Callable[[], float]:
    """Microseconds of CPU time a unit, of which a run has so many; ``before`` is called off the clock."""

    def measured() -> float:
        before()
        start = time.process_time()
        for _ in range(repeats):
            run()
        return (time.process_time() - start) / (units * repeats) * 1e6

    return measured


def peers() -> dict[str, Callable[[], float]]:
    """The same of diffusers' schedulers."""
    import diffusers

    made: dict[str, Any] = {
        "DDIM": diffusers.DDIMScheduler(clip_sample=False),
        "Euler": diffusers.EulerDiscreteScheduler(),
        "DPM++ 2M": diffusers.DPMSolverMultistepScheduler(),
        "UniPC": diffusers.UniPCMultistepScheduler(),
        "Heun": diffusers.HeunDiscreteScheduler(),
        "DDPM": diffusers.DDPMScheduler(clip_sample=False),
    }
    return {name: _peer(scheduler) for name, scheduler in made.items()}


def _peer(scheduler: Any) -> Callable[[], float]:
    net, x0 = Echo(), torch.randn(SHAPE)

    @torch.no_grad()
    def run() -> None:
        x = x0
        for t in scheduler.timesteps:
            x = scheduler.step(net(scheduler.scale_model_input(x, t), t), t, x).prev_sample

    return timed(run, STEPS, before=lambda: scheduler.set_timesteps(STEPS))


def drawing(n: int = 64) -> dict[str, Callable[[], float]]:
    """Microseconds an item of drawing (n, 3, 32, 32): our per-item streams and torch.randn."""
    like, streams = torch.empty(n, 3, 32, 32), Streams.of(0, n)

    def drawn(draw: Callable[[], Any]) -> Callable[[], float]:
        return timed(draw, n, repeats=10, before=draw)  # what ran before has left other things in the caches

    return {
        "drawing, ours": drawn(lambda: streams.normal(like)),
        "drawing, torch.randn": drawn(lambda: torch.randn(like.shape)),
    }


def share(name: str, n: int = 16, steps: int = 20, rounds: int = 5) -> float:
    """The share of its CPU time that a guided run of 16 pictures of a bundled model spends inside its network, median over rounds."""
    model = sf.load(name)
    net, inside = model.denoiser.net, 0.0
    cond, denoiser = model.conditions(n, model.conditioner.in_turn(n, 0)), model.guided()
    shape, forward = (n, *model.codec.shape(*model.size)), net.forward

    def timed(*args: Any, **kwargs: Any) -> Any:
        nonlocal inside
        start = time.process_time()
        out = forward(*args, **kwargs)
        inside += time.process_time() - start
        return out

    net.forward, shares = timed, []
    for _ in range(rounds):
        inside, start = 0.0, time.process_time()
        sf.sample(denoiser, solver=model.solver, grid=model.grid, steps=steps, shape=shape, cond=cond)
        shares.append(inside / (time.process_time() - start))
    return round(statistics.median(shares), 4)


def measure(rounds: int = 15) -> dict[str, Any]:
    """Medians over interleaved rounds, and whether the budget holds: 60 us, less than every peer's twin, and 95 % in the network."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    runs = {f"sfumato {name}": ours(name) for name in PAIRS}
    runs |= {f"diffusers {name}": run for name, run in peers().items()} | drawing()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(run())
    figures = {name: round(statistics.median(v), 2) for name, v in times.items()}
    ratios = {name: round(figures[f"sfumato {name}"] / figures[f"diffusers {peer}"], 3) for name, peer in PAIRS.items()}
    extra = figures["drawing, ours"] - figures["drawing, torch.randn"]
    shares = {name: share(name) for name in ("digits", "emoji-latent", "emoji-pixel")}
    deterministic = all(figures[f"sfumato {name}"] <= BUDGET for name in ("ddim", "dpm-solver++", "heun"))
    holds = deterministic and max(ratios.values()) < 1 and extra <= 2 and min(shares.values()) >= SHARE
    return {
        "microseconds": figures,
        "ours over diffusers": ratios,
        "drawing over randn, us an item": round(extra, 2),
        "share of a run inside the network": shares,
        "holds": holds,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    print(json.dumps(measure(parser.parse_args().rounds), indent=1))
