"""Networks as denoisers: rows, labels, conditions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import sfumato as sf
from sfumato import grids, oracles, solvers
from sfumato.core import KINDS, Coef, Context, InputError, Posterior, linear, row, sample
from sfumato.denoisers import parametrized
from sfumato.denoisers.parametrized import edm_row
from sfumato.processes import DDPM, EDM, VE, VP, Cosine, Flow

PROCESSES = [VP(), VE(), EDM(), Flow(3.0), Cosine(), DDPM()]
MIXTURE = oracles.GaussianMixture([[-1.0, 0.5], [1.0, -0.3]], [0.4, 0.2], [0.3, 0.7])


class Echo(nn.Module):
    """Keeps what it was given."""

    def forward(self, x: Tensor, label: Tensor, colour: Tensor | None = None, size: float = 1.0) -> Tensor:
        self.given = {"x": x, "label": label, "colour": colour, "size": size}
        return x


class Anything(nn.Module):
    def forward(self, x: Tensor, label: Tensor, **cond: Any) -> Tensor:
        self.given = cond
        return x


class Exact(nn.Module):
    """What a perfectly trained network of each kind says; the label is t."""

    def __init__(self, process: Any, kind: str, data_std: float = 0.5) -> None:
        super().__init__()
        self.process, self.kind, self.data_std = process, kind, data_std

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        t = float(label[0])
        c = self.process.coef(t)
        if self.kind == "edm":
            x = x * math.sqrt(c.sigma**2 + (c.alpha * self.data_std) ** 2)
        x0, eps = MIXTURE.belief(x, c)
        if self.kind == "edm":  # F of Karras et al. 2022: (D - c_skip x) / c_out in variance-exploding coordinates
            sigma, s = c.sigma / c.alpha, self.data_std
            skip, out = s**2 / (sigma**2 + s**2), sigma * s / math.sqrt(sigma**2 + s**2)
            return (x0 - skip * x / c.alpha) / out
        p, q = row(self.kind, c)
        return linear(p, x0, q, eps)


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("kind", [*KINDS, "edm"])
def test_exact_networks_of_every_kind_believe_the_same(kind: str, process: Any) -> None:
    x = torch.randn(4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for t in (0.1, 0.5, 0.97):
        post = parametrized(Exact(process, kind), process, kind)(x, t, Context.of(4, None))
        exact = MIXTURE.denoiser(process)(x, t, Context.of(4, None))
        assert torch.allclose(post.mean, exact.mean, rtol=1e-8, atol=1e-8)
        assert torch.allclose(post.view("eps"), exact.view("eps"), rtol=1e-7, atol=1e-7)


@given(st.floats(1e-3, 90), st.floats(0.05, 3))
def test_the_edm_row_is_karras_preconditioning(sigma: float, s: float) -> None:
    """D = c_skip x + c_out F(c_in x)."""
    c, x, f = Coef(1.0, sigma, 0.0, 1.0), torch.tensor([[0.7, -2.0]]).double(), torch.tensor([[1.3, 0.1]]).double()
    skip, out = s**2 / (sigma**2 + s**2), sigma * s / math.sqrt(sigma**2 + s**2)
    assert torch.allclose(Posterior(f, edm_row(c, s), x, c).mean, skip * x + out * f, rtol=1e-9, atol=1e-9)
    process, echo = EDM(sigma_min=1e-4, sigma_max=100.0), Echo()
    t = process.time(-math.log(sigma))
    parametrized(echo, process, "edm", data_std=s)(x, t, Context.of(1, None))
    assert torch.allclose(echo.given["x"], x / math.sqrt(sigma**2 + s**2), rtol=1e-9)


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
def test_the_edm_network_works_in_every_process_and_with_a_clock_an_item(process: Any) -> None:
    denoiser, t = parametrized(Echo(), process, "edm"), torch.tensor([0.3, 0.8]).double()
    x = torch.tensor([[1.0, 2.0], [0.5, -1.0]]).double()
    rows = denoiser(x, t, Context.of(2, None))
    for i in range(2):
        one = denoiser(x[i : i + 1], float(t[i]), Context.of(1, None))
        assert torch.allclose(rows.mean[i], one.mean[0], rtol=1e-9)
    y = sample(denoiser, solvers.get("heun"), grids.get("uniform"), 3, shape=(2, 2))
    assert y.isfinite().all()


def test_labels_are_what_the_clock_says() -> None:
    echo, x = Echo(), torch.ones(3, 2)
    table = DDPM()
    ctx = Context.of(3, None)
    parametrized(echo, table)(x, 0.25, ctx)
    assert torch.equal(echo.given["label"], torch.full((3,), 0.25)) and echo.given["label"].dtype == torch.float32
    parametrized(echo, table, clock=table.label)(x, 0.25, ctx)
    assert torch.equal(echo.given["label"], torch.full((3,), 249.0))
    parametrized(echo, table, clock=lambda t: torch.full((3,), round(1000 * t), dtype=torch.int64))(x, 0.25, ctx)
    assert echo.given["label"].dtype == torch.int64 and echo.given["label"].tolist() == [250] * 3
    parametrized(echo, EDM(), clock=lambda t: math.log(EDM().coef(t).sigma) / 4)(x, 0.5, ctx)
    assert echo.given["label"][0] == pytest.approx(math.log(80 * 0.5**7) / 4)
    t = torch.tensor([0.1, 0.5, 1.0]).double()
    parametrized(echo, table, clock=table.label)(x, t, ctx)
    assert torch.allclose(echo.given["label"], torch.tensor([99.0, 499.0, 999.0]))


def test_a_label_is_never_rounded_to_half_precision() -> None:
    """999 is no bfloat16 number."""
    echo, table = Echo(), DDPM()
    for dtype in (torch.bfloat16, torch.float16):
        parametrized(echo, table, clock=table.label)(torch.ones(1, 2, dtype=dtype), 1.0, Context.of(1, None))
        assert float(echo.given["label"][0]) == 999.0 and echo.given["x"].dtype == dtype
    parametrized(echo, table)(torch.ones(1, 2).double(), 0.1, Context.of(1, None))
    assert float(echo.given["label"][0]) == 0.1


def test_conditions_go_to_those_who_read_them() -> None:
    echo, x, colour = Echo(), torch.ones(2, 2), torch.ones(2)
    parametrized(echo, VP())(x, 0.5, Context.of(2, None, cond={"colour": colour}))
    assert echo.given["colour"] is colour and echo.given["size"] == 1.0
    with pytest.raises(InputError, match=r"reads no condition \['color'\]; it reads \['colour', 'size'\]"):
        parametrized(echo, VP())(x, 0.5, Context.of(2, None, cond={"color": colour}))
    anything = Anything()
    parametrized(anything, VP())(x, 0.5, Context.of(2, None, cond={"color": colour, "anchor": x}))
    assert list(anything.given) == ["color"], "the anchor is the process', not the network's"
    anything.accepts = ("color",)
    with pytest.raises(InputError, match="reads no condition"):
        parametrized(anything, VP())(x, 0.5, Context.of(2, None, cond={"size": 1}))


def test_calls_are_counted_in_rows_of_the_batch() -> None:
    ctx = Context.of(2, None)
    denoiser = parametrized(Echo(), VP())
    denoiser(torch.ones(2, 2), 0.5, ctx)
    denoiser(torch.ones(6, 2), 0.5, ctx)
    assert ctx.run.nfe == 4


def test_an_unknown_kind_lists_the_known() -> None:
    with pytest.raises(InputError, match="'noise': use one of x0, eps, v, flow, score, edm"):
        parametrized(Echo(), VP(), "noise")


def test_a_compiled_denoiser_is_the_same_function_and_hears_taps():
    net = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))

    class Labelled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x, label):
            return self.net(x) + label[:, None]

    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    plain = sf.parametrized(Labelled(), sf.processes.VP())
    compiled = plain.compiled(backend=backend)
    assert list(compiled.state_dict()) == list(plain.state_dict())
    x, ctx = torch.randn(3, 2, generator=torch.Generator().manual_seed(0)), sf.Context.of(3)
    with torch.no_grad():
        assert torch.allclose(plain(x, 0.5, ctx).native, compiled(x, 0.5, ctx).native) and graphs
        doubled = ctx.fork(taps=[("net.2", lambda ctx, call, h: 2 * call(h))])
        a, b = plain(x, 0.5, doubled).native, compiled(x, 0.5, doubled).native
    assert torch.equal(a, b) and not torch.allclose(a, plain(x, 0.5, ctx).native)


def test_a_plain_function_is_a_network() -> None:
    def towards(x: Tensor, label: Tensor, colour: float = 0.5) -> Tensor:
        return colour * x

    denoiser = parametrized(towards, Flow(), "x0")
    x = torch.randn(2, 3)
    assert denoiser.reads == {"colour"} and not list(denoiser.parameters())
    assert torch.equal(denoiser(x, 0.5, Context.of(2, 0)).native, 0.5 * x)
    assert torch.equal(denoiser(x, 0.5, Context.of(2, 0, cond={"colour": 2.0})).native, 2 * x)
    assert parametrized(lambda x, t: 0 * x, VP())(x, 0.5, Context.of(2, 0)).native.abs().max() == 0


def test_a_state_of_another_type_than_the_network_is_refused_with_the_remedy() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 3)

        def forward(self, x: Tensor, label: Tensor) -> Tensor:
            return self.inner(x)

    denoiser = parametrized(Layer(), Flow(), "flow")
    wide = torch.randn(2, 3, dtype=torch.float64)
    with pytest.raises(
        InputError, match=r"the state is torch.float64 and the network torch.float32: give x in torch.float32, or"
    ):
        sf.sample(denoiser, steps=2, x=wide)
    assert sf.sample(denoiser.to(torch.float64), steps=2, x=wide).dtype == torch.float64
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):  # torch's own, where the types agree
        sf.sample(denoiser, steps=2, x=wide[:, :2])
