"""Equal things are equal: names with other numbers, textbook formulas, and every kind of prediction of one belief."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sweep import (
    CONFIGURED,
    PROCESSES,
    ClassMixture,
    every_process,
    every_solver,
    lam_times,
    make,
    mixture,
    normal,
    run,
    start,
    three_processes,
)
from torch import Tensor

from sfumato import grids, oracles
from sfumato.core import Context, Posterior, sample, trajectory
from sfumato.guidance import cfg
from sfumato.processes import DDPM, EDM, Flow, Table

GRID = grids.get("logsnr")
BLIND = ["arc", *(n for n in CONFIGURED if n.startswith("dpm-solver++") and "adaptive" not in n and "time" not in n)]
EXACT_FOR_A_POINT = [n for n in CONFIGURED if getattr(make(n), "form", "") == "data"]


@every_process
@pytest.mark.parametrize(
    ("one", "other"),
    [("ddpm(eta=0.0)", "ddim"), ("euler-maruyama(eta=0.0)", "ddim"), ("edm(churn=0.0)", "heun"), ("euler", "ddim")],
)
def test_named_special_cases_are_equal_bit_for_bit(one: str, other: str, law: str) -> None:
    denoiser = mixture().denoiser(PROCESSES[law])
    a, b = (run(denoiser, make(n), GRID, 6, shape=(5, 2), seed=3, dtype=torch.float64) for n in (one, other))
    assert torch.equal(a, b)


@every_process
def test_order_1_of_the_exponential_family_is_ddim(law: str) -> None:
    denoiser, x = mixture().denoiser(PROCESSES[law]), start(mixture(), PROCESSES[law], 5, 0.9)
    b = run(denoiser, make("ddim"), GRID, 6, x=x, start=0.9)
    for form in ("data", "noise"):
        for variable in ("lambda", "angle"):
            a = run(
                denoiser, make(f"dpm-solver++(order=1, form={form!r}, variable={variable!r})"), GRID, 6, x=x, start=0.9
            )
            assert torch.allclose(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("guided", [False, True])
@three_processes
@every_solver
def test_the_kind_of_prediction_never_matters(name: str, law: str, guided: bool) -> None:
    """Networks that say the same belief as x0, eps, v, flow or score give the same run, guided or not."""
    process, results = PROCESSES[law], {}
    x = start(mixture(), process, 3, 0.95)
    for kind in ("x0", "eps", "v", "flow", "score"):
        denoiser = ClassMixture(process, kind)
        wrapped = cfg(2.5)(denoiser) if guided else denoiser
        cond = {"label": torch.tensor([0, 1, 2])}
        results[kind] = run(wrapped, make(name), GRID, 5, x=x, start=0.95, stop=0.05, cond=cond, seed=2)
    for kind, y in results.items():
        assert torch.allclose(y, results["v"], rtol=1e-7, atol=1e-7), kind


def textbook(x: Tensor, x0: Tensor, now: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of q(x_before | x_now, x0) in the notation of Ho et al. 2020, from the two alpha-bars."""
    alpha = now / before
    beta = 1 - alpha
    mean = before.sqrt() * beta / (1 - now) * x0 + alpha.sqrt() * (1 - before) / (1 - now) * x
    return mean, (1 - before) / (1 - now) * beta


@pytest.mark.parametrize("stride", [1, 50])
@pytest.mark.parametrize("betas", ["linear", "scaled_linear", "cosine"])
def test_ancestral_kernel_is_the_textbook_posterior(betas: str, stride: int) -> None:
    """beta-tilde at every index of the table; on a respaced table from the alpha-bars that are kept."""
    process, x, x0 = DDPM(betas), normal(3, 2, seed=1), normal(3, 2, seed=2)
    bars = torch.tensor([math.cos(angle) ** 2 for angle in process.angles[1:]], dtype=torch.float64)
    for i in range(stride, process.steps, 83):
        t, s = (i + 1) / process.steps, (i + 1 - stride) / process.steps
        c = process.coef(t)
        if c.alpha == 0:
            continue
        kernel = process.kernel(x, Posterior(x0, "x0", x, c), t, s)
        mean, variance = textbook(x, x0, bars[i], bars[i - stride])
        assert torch.allclose(kernel.mean, mean, rtol=1e-9, atol=1e-9)
        assert kernel.std**2 == pytest.approx(float(variance), rel=1e-9)


def test_ddpm_sampling_is_the_textbook_loop() -> None:
    """x0 from eps, the posterior mean, sqrt(beta-tilde) z; a run over ten retained steps with recomputed variances."""
    process, n = DDPM("linear"), 10
    zs = [normal(4, 2, seed=20 + k) for k in range(n)]
    denoiser = mixture().denoiser(process)
    bars = [1.0, *(math.cos(a) ** 2 for a in process.angles[1:])]
    kept = [1000 * (n - k) // n for k in range(n + 1)]
    x = first = normal(4, 2, seed=1)
    for k, (i, j) in enumerate(zip(kept, kept[1:], strict=False)):
        eps = denoiser(x, i / 1000, Context.of(4, None)).view("eps")
        x0 = (x - math.sqrt(1 - bars[i]) * eps) / math.sqrt(bars[i])
        mean, variance = textbook(x, x0, torch.tensor(bars[i]).double(), torch.tensor(bars[j]).double())
        x = mean + variance.clamp(min=0).sqrt() * zs[k]
    draws = iter(zs)
    ctx = Context.of(4, 0, dtype=torch.float64, source=lambda ctx, fresh: next(draws))
    y = run(denoiser, make("ddpm"), grids.get("trailing"), n, x=first, ctx=ctx)
    assert torch.allclose(y, x, rtol=1e-6, atol=1e-6)


def test_ddim_is_eulers_method_on_straight_paths() -> None:
    flow, edm = Flow(), EDM()
    x = normal(4, 2)
    there = mixture().denoiser(flow)(x, 0.7, Context.of(4, None)).view("flow")
    (_, st) = trajectory(mixture().denoiser(flow), make("ddim"), grids.get("uniform"), 1, x=x, start=0.7, stop=0.4)
    assert torch.allclose(st.x, x + (0.4 - 0.7) * there)
    post = mixture().denoiser(edm)(x, 0.7, Context.of(4, None))
    (_, st) = trajectory(mixture().denoiser(edm), make("ddim"), grids.get("uniform"), 1, x=x, start=0.7, stop=0.4)
    a, b = edm.coef(0.7).sigma, edm.coef(0.4).sigma
    assert torch.allclose(st.x, x + (b - a) * (x - post.mean) / a)


def karras(D: Callable[[Tensor, float], Tensor], x: Tensor, sigmas: list[float], churn: Any, zs: Any) -> Tensor:
    """Algorithm 2 of Karras et al. 2022, line by line; churn = (S_churn, S_tmin, S_tmax, S_noise)."""
    amount, low, high, noise = churn
    n = len(sigmas) - 1
    for i, (t, s) in enumerate(zip(sigmas, sigmas[1:], strict=False)):
        gamma = min(amount / n, math.sqrt(2) - 1) if low <= t <= high else 0.0
        hat = t + gamma * t
        if gamma:
            x = x + math.sqrt(hat**2 - t**2) * noise * zs[i]
        d = (x - D(x, hat)) / hat
        y = x + (s - hat) * d
        if s:
            y = x + (s - hat) * (d / 2 + (y - D(y, s)) / s / 2)
        x = y
    return x


@pytest.mark.parametrize("churn", [(0.0, 0.05, 50.0, 1.003), (40.0, 0.05, 50.0, 1.003), (3.0, 0.5, 8.0, 1.0)])
def test_edm_is_karras_algorithm_2(churn: tuple[float, ...]) -> None:
    process, n = EDM(), 12
    times = grids.get("karras")(process, n, 1.0, 0.0)
    sigmas = [process.coef(float(t)).sigma for t in times]
    expected = [(80 ** (1 / 7) + i / (n - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(n)]
    assert sigmas == pytest.approx([*expected, 0.0], rel=1e-9)
    denoiser, x, zs = mixture().denoiser(process), 80 * normal(5, 2), [normal(5, 2, seed=9 + k) for k in range(n)]

    def D(x: Tensor, sigma: float) -> Tensor:
        return denoiser(x, process.time(-math.log(sigma)), Context.of(5, None)).mean

    ctx = Context.of(5, 0, dtype=torch.float64, source=lambda ctx, fresh: zs[ctx.run.step])
    y = sample(
        denoiser, make("edm(churn={}, low={}, high={}, noise={})".format(*churn)), grids.get("karras"), n, x=x, ctx=ctx
    )
    assert torch.allclose(y, karras(D, x, sigmas, churn, zs), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", BLIND)
def test_exponential_integrators_never_see_the_schedule(name: str) -> None:
    """On equal lambdas the states of VP, EDM and Flow differ by alpha alone."""
    ends = {}
    z = normal(6, 2)
    for law in ("edm", "vp", "flow"):
        process = PROCESSES[law]
        times = lam_times(process, 10, 2.0, -2.0)
        c, d = process.coef(float(times[0])), process.coef(float(times[-1]))
        y = run(
            mixture().denoiser(process), make(name), grids.fixed(times), 10,
            x=z * c.sigma, start=float(times[0]), stop=float(times[-1]),
        )  # fmt: skip
        ends[law] = y / d.alpha
    assert torch.allclose(ends["vp"], ends["edm"], rtol=1e-9, atol=1e-9)
    assert torch.allclose(ends["flow"], ends["edm"], rtol=1e-9, atol=1e-9)


@every_process
@pytest.mark.parametrize("name", ["ddim", "heun", *EXACT_FOR_A_POINT])
def test_a_point_mass_is_reached_exactly(name: str, law: str) -> None:
    """Where the belief is the same at every state and time nothing is left to discretise, in a single step too."""
    process, mean = PROCESSES[law], torch.tensor([0.7, -1.3]).double()
    denoiser = oracles.Gaussian(mean, torch.zeros(2)).denoiser(process)
    for steps in (1, 6):
        y = run(denoiser, make(name), GRID, steps, shape=(3, 2), dtype=torch.float64)
        assert torch.allclose(y, mean.expand(3, 2), rtol=1e-7, atol=1e-7)


def test_a_table_built_from_the_textbook_betas_has_the_textbook_alphas() -> None:
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    bars = torch.cumprod(1 - betas, 0)
    for process in (DDPM(), DDPM(betas), Table.of(bars)):
        for i in (0, 1, 17, 500, 999):
            c = process.coef((i + 1) / 1000)
            assert c.alpha**2 == pytest.approx(float(bars[i]), rel=1e-12)
            assert c.sigma**2 == pytest.approx(float(1 - bars[i]), rel=1e-10)
