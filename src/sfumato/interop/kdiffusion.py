"""k-diffusion's conventions: ``sampler(model, x, sigmas)`` where ``model(x, sigma)`` is the denoised picture.

This is what k-diffusion, ComfyUI and the web UIs call a sampler. x = x0 + sigma eps; for a flow x = (1 - sigma) x0 +
sigma eps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from sfumato import core, grids, solvers
from sfumato.core import Context, Denoiser, Grid, Guidance, InputError, Posterior, Solver
from sfumato.processes import EDM, Flow


class _Denoised(Denoiser):
    """A k-diffusion model as a Denoiser; the last picture is kept for callbacks."""

    def __init__(self, model: Any, process: Any, extra: Mapping[str, Any]) -> None:
        super().__init__()
        self.process, self._call = process, lambda x, sigma: model(x, sigma, **extra)
        self.last: Any = None

    def forward(self, x: Tensor, t: float, ctx: Context) -> Posterior:
        coef = self.process.coef(t)
        self.last = self._call(x, x.new_full((len(x),), coef.sigma))
        ctx.run.nfe += len(x) / ctx.batch
        return Posterior(self.last, "x0", x, coef)


def k_sampler(solver: str | Solver, *, flow: bool = False) -> Callable[..., Tensor]:
    """One of our solvers as a k-diffusion sampler, ``sampler(model, x, sigmas, extra_args=None, callback=None,
    disable=None)``.

    ``flow`` says that the model is a flow. Noise comes from streams seeded by ``extra_args["seed"]``, one an item.
    Sigmas that rise run an inversion, for solvers that draw no noise; a single one leaves x as it is. Raises InputError
    for sigmas that are not monotone.
    """
    made: Solver = solvers.registry.make(solver) if isinstance(solver, str) else solver

    def sampler(
        model: Any,
        x: Tensor,
        sigmas: Tensor,
        extra_args: Mapping[str, Any] | None = None,
        callback: Callable[[dict[str, Any]], None] | None = None,
        disable: bool | None = None,
    ) -> Tensor:
        if len(sigmas) == 1:  # what is left where ComfyUI splits sigmas at their end
            return x
        extra = dict(extra_args or {})
        process, times = _times(sigmas, flow)
        denoiser = _Denoised(model, process, extra)
        ctx = Context.of(len(x), int(extra.get("seed") or 0), dtype=x.dtype, device=x.device)
        grid = grids.fixed(sorted(times, reverse=True))
        for st in core.trajectory(denoiser, made, grid, len(times) - 1, x=x, ctx=ctx, start=times[0], stop=times[-1]):
            if callback is not None and st.index:
                i = st.index - 1
                callback({"x": st.x, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": denoiser.last})
        out: Any = made.read(st)
        return out  # type: ignore[no-any-return]

    return sampler


def k_sigmas(
    grid: str | Grid, steps: int, sigma_min: float, sigma_max: float, *, flow: bool = False, stop: float = 0.0
) -> Tensor:
    """The sigmas (steps + 1,) of one of our grids, from sigma_max down to ``stop``: a SIGMAS of ComfyUI."""
    made: Grid = grids.registry.make(grid) if isinstance(grid, str) else grid
    process: Any = Flow() if flow else EDM(sigma_min, sigma_max)
    start = float(sigma_max) if flow else 1.0
    times = made(process, steps, start, _time(process, stop))
    return torch.tensor([process.coef(t).sigma for t in times.tolist()], dtype=torch.float32)


def k_guidance(guidance: Guidance, *, flow: bool = False) -> Callable[[Mapping[str, Any]], Tensor]:
    """A guidance of ours as ComfyUI's ``sampler_cfg_function``: from both denoised pictures to x minus the guided one.

    The guidance's own scale holds, not ComfyUI's. ``interval`` is in our time t; sigma_max is asked of the model. Raises
    InputError where ComfyUI read the model under no negative prompt: its picture would be zeros.
    """

    def guided(given: Mapping[str, Any]) -> Tensor:
        if given.get("input_uncond", ()) is None:
            raise InputError(
                "there is no negative prompt to lead away from: use a guider with one (CFGGuider, SamplerCustom)"
            )
        x, sigma = given["input"], float(torch.as_tensor(given["sigma"]).flatten()[0])
        highest = float(given["model"].model_sampling.sigma_max) if "model" in given else max(sigma, 80.0)
        process: Any = Flow() if flow else EDM(min(0.002, highest / 2), max(highest, sigma))
        pair = _Pair(process, given["cond_denoised"], given["uncond_denoised"])
        ctx = Context(cond={"branch": 1}, batch=len(x))
        post = guidance(pair)(x, _time(process, sigma), ctx)
        out: Tensor = x - post.mean
        return out

    return guided


class _Pair(Denoiser):
    """Two readings that are known already: branch 1 is the conditional one."""

    def __init__(self, process: Any, conditional: Tensor, unconditional: Tensor) -> None:
        super().__init__()
        self.process, self.null, self._readings = process, {"branch": 0}, (unconditional, conditional)

    def forward(self, x: Tensor, t: float, ctx: Context) -> Posterior:
        return Posterior(self._readings[ctx.cond["branch"]], "x0", x, self.process.coef(t))


def _time(process: Any, sigma: float) -> float:
    if isinstance(process, Flow) or sigma == 0:
        return float(sigma)
    return min((sigma / process.sigma_max) ** (1 / process.rho), 1.0)


def _times(sigmas: Tensor, flow: bool) -> tuple[Any, list[float]]:
    values = [float(s) for s in sigmas]
    falling = all(a > b for a, b in zip(values, values[1:], strict=False))
    if (
        len(values) < 2
        or min(values) < 0
        or not (falling or all(a < b for a, b in zip(values, values[1:], strict=False)))
    ):
        raise InputError(f"sigmas must fall (or, for an inversion, rise) strictly and not be negative: {values[:8]}")
    highest = max(values)
    process: Any = Flow() if flow else EDM(min(0.002, highest / 2), highest)
    return process, [_time(process, s) for s in values]
