"""Inverses by iteration and by bidirectional integration: for any singlestep solver, item by item, or a clear refusal."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from sfumato import grids, oracles, solvers
from sfumato.core import Context, InputError, Solver, Step, trajectory
from sfumato.denoisers import parametrized
from sfumato.guidance import cfg
from sfumato.processes import EDM, VP, Flow

LAWS = {"vp": VP(), "edm": EDM(), "flow": Flow()}
UNIFORM = grids.get("uniform")
MIXTURE = oracles.GaussianMixture([[-1.2, 0.3], [0.9, 0.9], [0.5, -1.1]], [[0.35, 0.2], [0.25, 0.45], [0.5, 0.3]])
make = solvers.registry.make


class Net(nn.Module):
    """Never trained, smooth, with one condition."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first, self.second, self.vector = nn.Linear(5, 8), nn.Linear(8, 4), nn.Linear(3, 8)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) * 0.4)

    def forward(self, x: Tensor, label: Tensor, vector: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(torch.cat([x, label[:, None]], 1)) + self.vector(vector)))


def guided(process, dtype=torch.float64, scale=7.0):
    net = parametrized(Net().to(dtype), process, "v", null={"vector": torch.zeros(3, dtype=dtype)})
    return cfg(scale)(net)


def normal(*shape: int, seed: int = 0, dtype=torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def up(denoiser, solver: Solver, x: Tensor, steps: int = 50, stop: float = 1.0, **options) -> Step:
    *_, last = trajectory(denoiser, solver.inverse(), UNIFORM, steps, x=x, start=0.0, stop=stop, **options)
    return last.restart()


def down(denoiser, solver: Solver, st: Step, steps: int = 50, start: float = 1.0, **options) -> Tensor:
    *_, last = trajectory(denoiser, solver, UNIFORM, steps, x=st, start=start, **options)
    return last.x


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("spec", ["implicit", "implicit(inner='heun')", "implicit(inner='dpm-solver++2s')",
                                  "bidirectional(inner='ddim')", "bidirectional", "bidirectional(gamma=0.96)"])  # fmt: skip
def test_fifty_guided_steps_up_and_down_are_exact(spec, law):
    """Guidance 7 on a network that was never trained: 1e-10 in float64, 2e-3 in float32."""
    cond = normal(3, 3, seed=2)
    for dtype, bound in ((torch.float64, 1e-10), (torch.float32, 2e-3)):
        denoiser, solver, x0 = guided(LAWS[law], dtype), make(spec), normal(3, 4, dtype=dtype)
        told = {"cond": {"vector": cond.to(dtype)}}
        top = up(denoiser, solver, x0, **told)
        assert (top.x - x0).abs().max() > 0.1
        assert (down(denoiser, solver, top, **told) - x0).abs().max() < bound * x0.abs().max()


@pytest.mark.parametrize("law", LAWS)
def test_forwards_it_is_the_inner_solver(law):
    denoiser, x = MIXTURE.denoiser(LAWS[law]), normal(5, 2)
    a, b = ([st.x for st in trajectory(denoiser, make(s), UNIFORM, 7, x=x)] for s in ("implicit(inner='heun')", "heun"))
    assert all(torch.equal(u, v) for u, v in zip(a, b, strict=True))


def test_the_implicit_inverse_is_what_a_root_finder_finds():
    """One step of DDIM on the plane, against Newton's method on the step itself."""
    denoiser, process = MIXTURE.denoiser(VP()), VP()
    y, ctx = MIXTURE.sample(4, seed=2), Context.of(4, None)

    def ddim(x: Tensor) -> Tensor:
        c = process.coef(0.3)
        return denoiser(x, 0.5, ctx).at(c.alpha, c.sigma)

    found = make("implicit").inverse().step(Step(y, 0.3), 0.5, denoiser, ctx).x
    x = y.clone()
    for _ in range(30):
        whole = torch.autograd.functional.jacobian(ddim, x)  # (item, component, item, component)
        jacobian = torch.stack([whole[i, :, i] for i in range(4)])
        x = x - torch.linalg.solve(jacobian, (ddim(x) - y)[..., None])[..., 0]
    assert torch.allclose(found, x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("law", LAWS)
def test_one_plain_iteration_is_ddim_inversion_by_the_noisier_time(law):
    process = LAWS[law]
    denoiser, x = MIXTURE.denoiser(process), MIXTURE.sample(5)
    solver = make("implicit(memory=0, iterations=1, strict=False)").inverse()
    ctx = Context.of(5, None)
    found = solver.step(Step(x, 0.3), 0.5, denoiser, ctx).x
    a, b = process.coef(0.5), process.coef(0.3)
    turn = b.angle - a.angle
    ratio = math.hypot(b.alpha, b.sigma) / math.hypot(a.alpha, a.sigma)
    radius = math.hypot(a.alpha, a.sigma)
    v = denoiser(x / ratio, 0.5, ctx).at(-a.sigma / radius, a.alpha / radius)
    wanted = (x - math.hypot(b.alpha, b.sigma) * math.sin(turn) * v) / (ratio * math.cos(turn))
    assert torch.allclose(found, wanted) and ctx.run.nfe == 2


def test_acceleration_needs_fewer_calls_and_reaches_what_plain_iteration_does_not():
    denoiser, x0 = MIXTURE.denoiser(VP()), MIXTURE.sample(32, seed=1)
    calls = {}
    for memory in (0, 4):
        ctx = Context.of(32, None, dtype=torch.float64)
        up(denoiser, make(f"implicit(memory={memory}, iterations=100)"), x0, 40, ctx=ctx)
        calls[memory] = ctx.run.nfe
    assert calls[4] < 0.75 * calls[0]
    with pytest.raises(InputError, match="less guidance"):
        up(denoiser, make("implicit(memory=0)"), x0, 8)
    top = up(denoiser, make("implicit"), x0, 8)
    assert (down(denoiser, make("implicit"), top, 8) - x0).abs().max() < 1e-10


def test_an_item_never_depends_on_the_batch():
    denoiser, x0, cond = guided(Flow()), normal(4, 4), normal(4, 3, seed=5)
    four = up(denoiser, make("implicit"), x0, 10, cond={"vector": cond}).x
    for i in range(4):
        one = up(denoiser, make("implicit"), x0[i : i + 1], 10, cond={"vector": cond[i : i + 1]}).x
        assert torch.allclose(four[i : i + 1], one, rtol=1e-11, atol=1e-11)


def test_a_fixed_number_of_iterations_is_that_many_calls():
    denoiser, x0 = MIXTURE.denoiser(Flow()), MIXTURE.sample(3)
    errors = []
    for n in (1, 3, 9):
        ctx = Context.of(3, None, dtype=torch.float64)
        solver = make(f"implicit(iterations={n}, strict=False)")
        top = up(denoiser, solver, x0, 10, ctx=ctx)
        assert ctx.run.nfe == 10 * n
        errors.append(float((down(denoiser, solver, top, 10) - x0).abs().mean()))
    assert errors[2] < 0.01 * errors[1] < 0.01 * errors[0]


@pytest.mark.parametrize("law", LAWS)
def test_bidirectional_ddim_is_bdia(law):
    denoiser, x = MIXTURE.denoiser(LAWS[law]), normal(5, 2)
    for gamma in (1.0, 0.9):
        ours = [
            st.x for st in trajectory(denoiser, make(f"bidirectional(inner='ddim', gamma={gamma})"), UNIFORM, 9, x=x)
        ]
        bdia = [st.x for st in trajectory(denoiser, make(f"bdia(gamma={gamma})"), UNIFORM, 9, x=x)]
        assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-9) for a, b in zip(ours, bdia, strict=True))


def test_a_clock_an_item_says_row_by_row_what_one_clock_says():
    process = VP()
    denoiser, x = MIXTURE.denoiser(process), MIXTURE.sample(2)
    low, high = torch.tensor([0.3, 0.1]).double(), torch.tensor([0.5, 0.4]).double()
    solver = make("implicit").inverse()
    both = solver.step(Step(x, low), high, denoiser, Context.of(2, None)).x
    for i in range(2):
        one = solver.step(Step(x[i : i + 1], float(low[i])), float(high[i]), denoiser, Context.of(1, None)).x
        assert torch.allclose(both[i : i + 1], one, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("implicit(inner='ddpm')", "draws noise"),
        ("implicit(iterations=0)", "at least 1"),
        ("implicit(memory=-1)", "at least 0"),
        ("implicit(tolerance=0.0)", "positive"),
        ("bidirectional(inner='ddpm')", "draws noise"),
        ("bidirectional(gamma=0.0)", "positive"),
    ],
)
def test_impossible_numbers_are_refused(spec, said):
    with pytest.raises(InputError, match=said):
        make(spec)


@pytest.mark.parametrize("spec", ["implicit(inner='dpm-solver++')", "bidirectional(inner='dpm-solver++')"])
def test_a_solver_with_a_history_is_refused(spec):
    with pytest.raises(InputError, match="keeps a history"):
        up(MIXTURE.denoiser(VP()), make(spec), MIXTURE.sample(2), 5)
