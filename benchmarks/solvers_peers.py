"""diffusers' schedulers on the cases of :mod:`benchmarks.solvers_cases`: the same denoiser, start noise and schedule.

Where practice leaves a choice it is the one that helps the scheduler. The network is asked at the exact noise level of the
scheduler's own sigma, which diffusers rounds to an integer label under Karras and logSNR spacing. A scheduler that starts
a little after pure noise is handed the state there, and the schedule of a model trained in continuous time is tabulated
at 1000 points that are exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.solvers_cases import Case

TRAIN = 1000
Options = dict[str, Any]


def _eps() -> dict[str, tuple[str, Options]]:
    multistep = "DPMSolverMultistepScheduler"
    return {
        "DDIM": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": True, "timestep_spacing": "trailing"}),
        "PNDM": (
            "PNDMScheduler",
            {"skip_prk_steps": True, "set_alpha_to_one": True, "timestep_spacing": "trailing"},
        ),
        "DPM++ 2M": (multistep, {"timestep_spacing": "linspace", "solver_order": 2}),
        "DPM++ 2M logSNR": (multistep, {"use_lu_lambdas": True, "solver_order": 2}),
        "DPM++ 2M Karras": (multistep, {"use_karras_sigmas": True, "solver_order": 2}),
        "DPM++ 3M": (multistep, {"timestep_spacing": "linspace", "solver_order": 3}),
        "DPM++ 3M logSNR": (multistep, {"use_lu_lambdas": True, "solver_order": 3}),
        "DPM++ 2S": ("DPMSolverSinglestepScheduler", {"solver_order": 2, "lower_order_final": True}),
        "UniPC-3": ("UniPCMultistepScheduler", {"timestep_spacing": "linspace", "solver_order": 3}),
        "UniPC-3 Karras": ("UniPCMultistepScheduler", {"use_karras_sigmas": True, "solver_order": 3}),
        "DEIS-3": ("DEISMultistepScheduler", {"timestep_spacing": "linspace", "solver_order": 3}),
        "Heun Karras": ("HeunDiscreteScheduler", {"use_karras_sigmas": True}),
    }


def _flow() -> dict[str, tuple[str, Options]]:
    straight = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 1.0}
    multistep = "DPMSolverMultistepScheduler"
    return {
        "Euler": ("FlowMatchEulerDiscreteScheduler", {}),
        "Euler trailing": ("FlowMatchEulerDiscreteScheduler", {"sigmas": True}),
        "Heun": ("FlowMatchHeunDiscreteScheduler", {}),
        "DPM++ 2M": (multistep, {**straight, "solver_order": 2}),
        "DPM++ 3M": (multistep, {**straight, "solver_order": 3}),
        "DPM++ 2S": ("DPMSolverSinglestepScheduler", {**straight, "solver_order": 2, "lower_order_final": True}),
        "UniPC-2": ("UniPCMultistepScheduler", {**straight, "solver_order": 2}),
        "UniPC-3": ("UniPCMultistepScheduler", {**straight, "solver_order": 3}),
        "DEIS-3": ("DEISMultistepScheduler", {**straight, "solver_order": 3}),
    }


def names(case: Case) -> list[str]:
    """The schedulers that serve this case's prediction."""
    return list(_flow() if straight(case) else _eps())


def straight(case: Case) -> bool:
    """Whether the case is a flow model."""
    return type(case.denoiser.process).__name__ == "Flow"


def made(name: str, case: Case, calls: int) -> Any:
    """The scheduler with as many steps as ``calls`` allow."""
    import diffusers

    kind, options = (_flow() if straight(case) else _eps())[name]
    options = dict(options)
    spaced = options.pop("sigmas", False)
    if not straight(case):
        options["trained_betas"] = _betas(case.denoiser.process)
    scheduler = getattr(diffusers, kind)(num_train_timesteps=TRAIN, **options)
    steps = (
        (calls + 1) // 2 if "Heun" in kind else calls - 1 if kind == "PNDMScheduler" else calls
    )  # PNDM's first costs two
    if spaced:
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps))
    else:
        scheduler.set_timesteps(steps)
    return scheduler


def _betas(process: Any) -> list[float]:
    """The betas whose table has this process's alphas at t = 1/N, ..., 1."""
    kept = [process.coef(i / TRAIN).alpha ** 2 for i in range(TRAIN + 1)]
    return [1 - b / a for a, b in zip(kept, kept[1:], strict=False)]


@torch.no_grad()
def run(name: str, case: Case, calls: int) -> tuple[Tensor, int]:
    """(ends, calls made)."""
    scheduler, process, ctx = made(name, case, calls), case.denoiser.process, case.context()
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    time = _clock(scheduler, process, straight(case))
    scaled = float(getattr(scheduler, "init_noise_sigma", 1.0)) != 1.0  # its state is x / alpha
    x = case.x
    if straight(case) and time(0) < 1:
        u = process.coef(time(0)).sigma
        x = x + (u - 1.0) * case.denoiser(x, 1.0, ctx).view("flow")
    x = x / process.coef(time(0)).alpha if scaled else x
    reading = "flow" if straight(case) else "eps"
    for i, label in enumerate(scheduler.timesteps):
        state = scheduler.scale_model_input(x, label) if hasattr(scheduler, "scale_model_input") else x
        said = case.denoiser(state.float(), time(i), ctx).view(reading)
        x = scheduler.step(said, label, x).prev_sample
    return x, len(scheduler.timesteps)


def _clock(scheduler: Any, process: Any, flow: bool) -> Callable[[int], float]:
    """Call i -> the exact time of its noise level."""
    if not hasattr(scheduler, "sigmas"):
        return lambda i: (float(scheduler.timesteps[i]) + 1) / TRAIN
    if flow:
        return lambda i: float(scheduler.sigmas[i])
    # float32 sigmas may round to a time beyond 1
    return lambda i: min(process.time(-math.log(float(scheduler.sigmas[i]))), 1.0)
