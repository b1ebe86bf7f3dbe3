"""Precision and devices: the same noise in every dtype, results that differ by rounding only, nothing that waits for a device."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sweep import (
    PROCESSES,
    ClassMixture,
    every_process,
    every_solver,
    keeps_grid,
    make,
    mixture,
    network,
    normal,
    run,
    three_processes,
)
from torch import nn

from sfumato import grids
from sfumato.core import Context, Streams, column
from sfumato.denoisers import parametrized
from sfumato.guidance import cfg

GRID, STEPS = grids.get("arctan"), 16
LOW = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", LOW, ids=str)
@three_processes
@every_solver
def test_low_precision_agrees_with_float64(name: str, law: str, dtype: torch.dtype) -> None:
    """The median item is within thirty roundings of what it is in float64: 4e-6 in float32, 0.23 in bfloat16."""
    denoiser = mixture().denoiser(PROCESSES[law])
    exact = run(denoiser, make(name), GRID, STEPS, shape=(31, 2), seed=4, dtype=torch.float64)
    y = run(denoiser, make(name), GRID, STEPS, shape=(31, 2), seed=4, dtype=dtype)
    assert y.dtype == dtype
    scale = max(1.0, float(exact.abs().median()))
    bound = 100 if name == "dpm-solver-fast" else 30  # three large steps in noise form magnify rounding
    assert (y.double() - exact).norm(dim=-1).median() / scale < bound * torch.finfo(dtype).eps


@every_solver
def test_a_given_state_keeps_its_dtype(name: str) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        x = normal(3, 2, dtype=dtype)
        assert run(mixture().denoiser(PROCESSES["vp"]), make(name), GRID, 3, x=x).dtype == dtype


@every_solver
@settings(max_examples=8)
@given(
    shape=st.lists(st.integers(1, 4), min_size=0, max_size=4),
    batch=st.integers(1, 3),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    seed=st.integers(-(2**66), 2**66),
    law=st.sampled_from(list(PROCESSES)),
)
def test_states_of_every_shape(
    name: str, shape: list[int], batch: int, dtype: torch.dtype, seed: int, law: str
) -> None:
    """(B,), vectors, images, volumes: moved elementwise, whatever the seed."""
    denoiser = parametrized(Echo(), PROCESSES[law], "v")
    y = run(denoiser, make(name), grids.get("uniform"), 3, shape=(batch, *shape), dtype=dtype, seed=seed)
    assert y.shape == (batch, *shape) and y.dtype == dtype and y.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_dtype_gets_the_same_noise(dtype: torch.dtype) -> None:
    """float64 and float32 exactly, half precisions rounded."""
    shape = (3, 5, 4)
    wide, narrow = Streams.of(3, 3), Streams.of(3, 3)
    for step in range(3):
        wide.at(step), narrow.at(step)
        for _ in range(2):
            z = wide.normal(torch.empty(shape, dtype=torch.float64))
            assert torch.equal(narrow.normal(torch.empty(shape, dtype=dtype)), z.to(dtype))
            assert torch.equal(z.float().double(), z)


@three_processes
@every_solver
def test_solvers_and_guidance_never_ask_a_device_for_a_number(name: str, law: str) -> None:
    """On the meta device there are no numbers: .item(), bool(tensor) and a forgotten device all raise."""
    solver = make(name)
    if not keeps_grid(solver):
        pytest.skip("it chooses its own times by what it sees")
    with torch.device("meta"):
        denoiser = network(PROCESSES[law])
    for wrapped, cond in (
        (denoiser, {"vector": torch.empty(2, 3, device="meta")}),
        (cfg(3.0, interval=(0.1, 0.9), rescale=0.5)(denoiser), {"vector": torch.empty(2, 3, device="meta")}),
        (cfg(3.0, batched=False)(denoiser), {"vector": torch.empty(2, 3, device="meta")}),
    ):
        y = run(wrapped, solver, GRID, 4, shape=(2, 4), cond=cond, device="meta")
        assert y.device.type == "meta" and y.shape == (2, 4)


@every_process
def test_exact_beliefs_and_clocks_an_item_work_on_the_device_of_the_state(law: str) -> None:
    """Times stay on the host, states anywhere: a (B,) clock on the CPU serves a state elsewhere."""
    process = PROCESSES[law]
    x, t, s = torch.empty(2, 2, device="meta"), torch.tensor([0.9, 0.4]).double(), torch.tensor([0.5, 0.2]).double()
    for device in ("cpu", "meta"):
        at, to = t.to(device), s.to(device)
        for kind in ("v", "x0", "eps"):
            post = parametrized(Echo(), process, kind)(x, at, Context.of(2, None))
            assert post.at(process.coef(to).alpha, process.coef(to).sigma).device.type == "meta"
        post = mixture().denoiser(process)(x, at, Context.of(2, None))
        assert process.kernel(x, post, at, to).draw(x).device.type == "meta"
        assert process.corrupt(x, at, Context.of(2, None), noise=x)[0].device.type == "meta"


class Echo(nn.Module):
    def forward(self, x: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        return x * column(label, x)


@three_processes
@every_solver
def test_gradients_flow_through_a_whole_run(name: str, law: str) -> None:
    """grad=True: the derivative along a direction equals a central difference; without it nothing is recorded."""
    denoiser, solver = mixture().denoiser(PROCESSES[law]), make(name)
    x, direction = normal(2, 2, seed=1), normal(2, 2, seed=2)

    def end(x: torch.Tensor, **options: bool) -> torch.Tensor:
        return run(denoiser, solver, grids.get("uniform"), 4, x=x, start=0.6, stop=0.3, seed=1, **options)

    x.requires_grad_()
    assert not end(x).requires_grad
    (gradient,) = torch.autograd.grad(end(x, grad=True).square().sum(), x)
    h = 1e-5
    with torch.no_grad():
        difference = (end(x + h * direction).square().sum() - end(x - h * direction).square().sum()) / (2 * h)
    if keeps_grid(solver):
        assert float((gradient * direction).sum()) == pytest.approx(float(difference), rel=1e-5, abs=1e-7)


@every_solver
def test_guidance_in_low_precision_keeps_conditions_and_dtype(name: str) -> None:
    denoiser = cfg(2.0)(ClassMixture(PROCESSES["flow"]))
    for dtype in (torch.float32, torch.bfloat16):
        y = run(denoiser, make(name), GRID, 4, shape=(2, 2), cond={"label": torch.tensor([0, 1])}, dtype=dtype)
        assert y.dtype == dtype and y.isfinite().all()
