"""alpha = 0 and sigma = 0 are times like any other, and a clock an item says row by row what one clock says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sweep import (
    DETERMINISTIC,
    PROCESSES,
    ClassMixture,
    every_process,
    every_solver,
    keeps_grid,
    make,
    mixture,
    normal,
    run,
    start,
)

from sfumato import grids
from sfumato.core import Context, InputError, Posterior, Step, linear, sample
from sfumato.guidance import cfg


@every_process
@every_solver
def test_every_solver_runs_from_pure_noise_to_clean_data(name: str, law: str) -> None:
    """start = 1 (alpha = 0 on Flow, Cosine and cosine betas), stop = 0 (sigma = 0), down to a single step."""
    process = PROCESSES[law]
    for steps, grid in ((1, "uniform"), (5, "logsnr")):
        y = run(mixture().denoiser(process), make(name), grids.get(grid), steps, shape=(2, 2), dtype=torch.float64)
        assert y.isfinite().all()


@pytest.mark.parametrize("law", ["vp", "edm", "cosine"])
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_deterministic_solvers_run_upwards_from_clean_data(name: str, law: str) -> None:
    """Inversion on the flipped grid, from sigma = 0 up to alpha = 0, and back: the way there and back is nearly closed."""
    process, solver = PROCESSES[law], make(name)
    if not keeps_grid(solver) or solver.reversible:
        pytest.skip("it has its own way back")
    denoiser, grid, x0 = mixture().denoiser(process), grids.get("arctan"), mixture().sample(9)
    x1 = run(denoiser, solver, grid, 40, x=x0, start=0.0, stop=1.0)
    back = run(denoiser, solver, grid, 40, x=x1)
    assert (back - x0).norm(dim=-1).median() < (0.4 if solver.order == 1 else 0.05)


@pytest.mark.parametrize("kind", ["v", "flow", "x0"])
@every_solver
def test_networks_that_say_enough_start_at_alpha_0(name: str, kind: str) -> None:
    for law in ("flow", "flow-shift-3", "cosine"):
        denoiser = ClassMixture(PROCESSES[law], kind)
        cond = {"label": torch.tensor([0, 1, 3])}
        y = run(denoiser, make(name), grids.get("logsnr"), 4, shape=(3, 2), cond=cond, dtype=torch.float64)
        assert y.isfinite().all()


@every_solver
def test_a_noise_prediction_at_alpha_0_is_refused_clearly(name: str) -> None:
    """x is the noise there, so the network says nothing about x0; the same network runs from any time below 1."""
    denoiser, cond = ClassMixture(PROCESSES["flow"], "eps"), {"label": torch.tensor([0, 3])}
    options: dict[str, Any] = {"cond": cond, "dtype": torch.float64}
    try:
        y = sample(denoiser, make(name), grids.get("uniform"), 4, shape=(2, 2), **options)
    except InputError as error:
        assert "says nothing else where alpha = 0" in str(error)
    else:
        assert y.isfinite().all()  # a step that only rescales the state there asks for no x0
    x = start(mixture(), PROCESSES["flow"], 2, 0.999)
    assert run(denoiser, make(name), grids.get("uniform"), 4, x=x, start=0.999, cond=cond).isfinite().all()


def test_ddim_refuses_a_noise_prediction_at_alpha_0() -> None:
    denoiser, cond = ClassMixture(PROCESSES["cosine"], "eps"), {"label": torch.tensor([3])}
    with pytest.raises(InputError, match="use a 'v' or 'flow' network there"):
        sample(denoiser, make("ddim"), grids.get("uniform"), 4, shape=(1, 2), cond=cond)


def clocks(law: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(t, s) an item, s < t, with both ends of time among them."""
    return torch.tensor([1.0, 0.8, 0.35, 0.1]).double(), torch.tensor([0.7, 0.31, 0.2, 0.05]).double()


def context(row: slice | None = None) -> Context:
    """The context of four items, or of one of them with the very same noise."""
    z = normal(4, 2, seed=9)
    return Context.of(
        4 if row is None else 1, 0, dtype=torch.float64, source=lambda ctx, fresh: z if row is None else z[row]
    )


@every_process
@every_solver
def test_a_clock_an_item_steps_row_by_row(name: str, law: str) -> None:
    process, solver, (t, s) = PROCESSES[law], make(name), clocks(law)
    x, denoiser = normal(4, 2, seed=4) * 1.5, mixture().denoiser(process)
    ctx = context()
    ctx.run.total = 5
    try:
        rows = solver.step(solver.init(x, t, denoiser, ctx), s, denoiser, ctx)
    except InputError as error:
        pytest.skip(f"refused: {error}")
    assert isinstance(rows, Step) and torch.equal(torch.as_tensor(rows.t), s)
    for i in range(4):
        row = slice(i, i + 1)
        ctx = context(row)
        ctx.run.total = 5
        one = solver.step(solver.init(x[row], float(t[i]), denoiser, ctx), float(s[i]), denoiser, ctx)
        assert torch.allclose(solver.read(rows)[row], solver.read(one), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("kind", ["x0", "eps", "v", "score"])
@every_process
def test_guidance_with_a_clock_an_item(law: str, kind: str) -> None:
    """Its interval too is read row by row."""
    process = PROCESSES[law]
    t = torch.tensor([0.9, 0.6, 0.35, 0.1]).double()
    x, label = normal(4, 2, seed=4) * 1.5, torch.tensor([0, 1, 2, 3])
    for batched in (True, False):
        denoiser = cfg(3.0, interval=(0.3, 0.7), batched=batched, rescale=0.4)(ClassMixture(process, kind))
        rows = denoiser(x, t, Context.of(4, None, cond={"label": label}))
        for i in range(4):
            one = denoiser(x[i : i + 1], float(t[i]), Context.of(1, None, cond={"label": label[i : i + 1]}))
            assert torch.allclose(rows.mean[i], one.mean[0], rtol=1e-8, atol=1e-9)
            assert torch.allclose(rows.view("eps")[i], one.view("eps")[0], rtol=1e-8, atol=1e-9)


@every_process
def test_coefficients_noise_and_kernels_row_by_row(law: str) -> None:
    process, (t, s) = PROCESSES[law], clocks(law)
    x, z = normal(4, 2, seed=1), normal(4, 2, seed=2)
    both, c = process.coef(t), process.coef(t)
    up, _ = process.corrupt(x, t, context(), noise=z)
    moved = process.renoise(x, s, t, z)
    aim = process.target("v", x, z, t)
    post = Posterior(linear(-c.sigma, x, c.alpha, z), "v", up, c)
    kernel = process.kernel(up, post, t, s, 0.7)
    blend = process.weights(lambda p, a, b: (p.coef(a).alpha - p.coef(b).sigma, a * b), t, s)
    for i in range(4):
        a, b, row = float(t[i]), float(s[i]), slice(i, i + 1)
        one = process.coef(a)
        for field in ("alpha", "sigma", "dalpha", "dsigma", "angle"):
            assert float(getattr(both, field)[i]) == pytest.approx(getattr(one, field), rel=1e-12, abs=1e-15)
        assert float(both.lam[i]) == pytest.approx(one.lam, rel=1e-10, abs=1e-12)
        single = process.corrupt(x[row], a, context(row), noise=z[row])[0]
        assert torch.allclose(up[row], single, rtol=1e-12, atol=1e-12)
        assert torch.allclose(moved[row], process.renoise(x[row], b, a, z[row]), rtol=1e-10, atol=1e-10)
        assert torch.allclose(aim[row], process.target("v", x[row], z[row], a), rtol=1e-12, atol=1e-12)
        belief = Posterior(linear(-one.sigma, x[row], one.alpha, z[row]), "v", single, one)
        alone = process.kernel(single, belief, a, b, 0.7)
        assert torch.allclose(kernel.draw(z)[row], alone.draw(z[row]), rtol=1e-9, atol=1e-9)
        assert float(kernel.std[i]) == pytest.approx(alone.std, rel=1e-9)
        assert torch.allclose(kernel.noise(kernel.draw(z))[row], z[row], rtol=1e-7, atol=1e-7)
        assert [float(v[i]) for v in blend] == pytest.approx([one.alpha - process.coef(b).sigma, a * b])
