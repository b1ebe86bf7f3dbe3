"""Exact inversion with guidance, over many steps, in both precisions, for any network."""

from __future__ import annotations

import pytest
import torch
from sweep import PROCESSES, ClassMixture, make, mixture, network, normal, start, three_processes

from sfumato import grids
from sfumato.core import Context, InputError, trajectory
from sfumato.guidance import cfg


@three_processes
@pytest.mark.parametrize("strength", [1.0, 0.8])
@pytest.mark.parametrize(
    ("name", "double", "single"),
    [("edict", 1e-10, 2e-3), ("edict(mixing=1.0)", 1e-10, 2e-4), ("bdia", 1e-10, 2e-4), ("bdia(gamma=0.96)", 1e-10, 2e-3)],
)  # fmt: skip
def test_fifty_steps_up_and_down_with_guidance(
    name: str, double: float, single: float, strength: float, law: str
) -> None:
    """A network that was never trained, guidance 7: within 1e-10 in float64 and the stated bounds in float32."""
    cond = {"vector": normal(3, 3, seed=2, dtype=torch.float64)}
    for dtype, bound in ((torch.float64, double), (torch.float32, single)):
        denoiser = cfg(7.0)(network(PROCESSES[law]).to(dtype))
        x0, solver, given = normal(3, 4, dtype=dtype), make(name), {k: v.to(dtype) for k, v in cond.items()}
        *_, up = trajectory(
            denoiser, solver.inverse(), grids.get("uniform"), 50, x=x0, start=0.0, stop=strength, cond=given
        )
        *_, down = trajectory(
            denoiser, solver, grids.get("uniform"), 50, x=up.restart(), start=strength, stop=0.0, cond=given
        )
        assert (down.x - x0).abs().max() < bound * x0.abs().max()
        assert (up.x - x0).abs().max() > 0.01


@pytest.mark.parametrize("form", ["v", "noise"])
def test_edict_without_mixing_is_two_runs_and_bdia_without_past_is_ddim(form: str) -> None:
    """The first update of each is DDIM's."""
    process = PROCESSES["vp"]
    denoiser, x = mixture().denoiser(process), start(mixture(), process, 6, 0.8)
    ctx = Context.of(6, None)
    ddim = denoiser(x, 0.8, ctx).at(process.coef(0.6).alpha, process.coef(0.6).sigma)
    for name in (f"edict(mixing=1.0, form={form!r})", f"bdia(form={form!r})"):
        solver = make(name)
        st = solver.step(solver.init(x, 0.8, denoiser, ctx), 0.6, denoiser, ctx)
        assert torch.allclose(st.x, ddim, rtol=1e-10, atol=1e-10)


def test_the_published_updates() -> None:
    """EDICT's four lines and BDIA's formula, in eps, with numbers in the place of a and b."""
    process, form = PROCESSES["vp"], "form='noise'"
    denoiser, x = ClassMixture(process), normal(4, 2)
    ctx = Context.of(4, None, cond={"label": torch.tensor([0, 1, 2, 3])})

    def ddim(z: torch.Tensor, by: torch.Tensor, t: float, s: float) -> torch.Tensor:
        a, b = process.coef(t), process.coef(s)
        ratio = b.alpha / a.alpha
        return ratio * z + (b.sigma - ratio * a.sigma) * denoiser(by, t, ctx).view("eps")

    y, p = x, 0.93
    u = ddim(x, y, 0.9, 0.7)
    w = ddim(y, u, 0.9, 0.7)
    x1 = p * u + (1 - p) * w
    y1 = p * w + (1 - p) * x1
    w = ddim(y1, x1, 0.7, 0.5)  # the roles change
    u = ddim(x1, w, 0.7, 0.5)
    x2 = p * u + (1 - p) * w
    solver = make(f"edict({form})")
    st = solver.step(solver.init(x, 0.9, denoiser, ctx), 0.7, denoiser, ctx)
    assert torch.allclose(st.x, x1) and torch.allclose(st.carry[0], y1)
    assert torch.allclose(solver.step(st, 0.5, denoiser, ctx).x, x2)

    z1 = ddim(x, x, 0.9, 0.7)
    z2 = ddim(z1, z1, 0.7, 0.5) + 0.96 * (x - ddim(z1, z1, 0.7, 0.9))
    solver = make(f"bdia(gamma=0.96, {form})")
    st = solver.step(solver.init(x, 0.9, denoiser, ctx), 0.7, denoiser, ctx)
    assert torch.allclose(st.x, z1) and torch.allclose(solver.step(st, 0.5, denoiser, ctx).x, z2)


def test_impossible_numbers_are_refused() -> None:
    for spec in ("edict(mixing=0.4)", "edict(form='x0')", "bdia(gamma=0.0)", "bdia(form='flow')"):
        with pytest.raises(InputError):
            make(spec)
    with pytest.raises(InputError, match="form='v'"):
        *_, _ = trajectory(
            mixture().denoiser(PROCESSES["flow"]), make("bdia(form='noise')"), grids.get("uniform"), 4, shape=(2, 2)
        )
