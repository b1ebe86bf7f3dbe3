"""Every registered operator is linear, and its adjoint, pseudo-inverse and proximal map are what their names say."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sfumato import operators
from sfumato.core import Context, InputError, linear
from sfumato.core.trees import first, tree_map
from sfumato.operators import Function, Operator, conjugate_gradient, lines, stack
from sfumato.operators.base import inner

make = operators.registry.make
CONFIGURED = [
    *operators.names(),
    "fourier(acceleration=2, centre=0.2, seed=3)", "mask(shape='pixels', hidden=0.7, seed=1)", "blur(std=0.6)",
    "downsample(factor=4)", "downsample(std=0.7)",
]  # fmt: skip
COMPOSED = {
    "fourier @ mask": lambda noise: operators.get("fourier", noise=noise) @ make("mask(shape='pixels')"),
    "downsample @ blur": lambda noise: operators.get("downsample", noise=noise) @ make("blur(std=0.5)"),
    "stack": lambda noise: stack(part=operators.get("mask", noise=noise), small=operators.get("downsample", noise=2 * noise)),
}  # fmt: skip
EVERY = [*CONFIGURED, *COMPOSED]
every_operator = pytest.mark.parametrize("name", EVERY)


def build(name: str, noise: float = 0.0) -> Operator:
    if name in COMPOSED:
        return COMPOSED[name](noise)
    head, bracket, rest = name.partition("(")
    return make(f"{head}(noise={noise}, {rest}" if bracket else f"{head}(noise={noise})")


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def like(y, seed: int):
    """Any y of the kind that an operator gives, on and off what is measured."""
    return tree_map(
        lambda v: torch.complex(*normal(2, *v.shape, seed=seed)) if v.is_complex() else normal(*v.shape, seed=seed), y
    )


def matrix(apply, shape: tuple[int, ...]) -> Tensor:
    """The real matrix of a linear map of one item, a column an entry."""

    def flat(y) -> Tensor:
        parts = [y[k] for k in y] if isinstance(y, dict) else [y]
        return torch.cat([(torch.view_as_real(p) if p.is_complex() else p).flatten(1) for p in parts], 1)

    n = torch.Size(shape).numel()
    return flat(apply(torch.eye(n, dtype=torch.float64).reshape(n, *shape))).T


def close(a, b, tolerance: float = 1e-9) -> None:
    tree_map(lambda u, v: torch.testing.assert_close(u, v, rtol=tolerance, atol=tolerance), a, b)


@every_operator
@settings(max_examples=12, deadline=None)
@given(channels=st.integers(1, 3), rows=st.integers(2, 4), columns=st.integers(2, 4), seed=st.integers(0, 1000))
def test_linearity_and_adjointness(name, channels, rows, columns, seed):
    operator = build(name)
    u, x = normal(2, 3, channels, 4 * rows, 4 * columns, seed=seed)
    y = operator(x)
    close(operator(2.0 * x - 0.5 * u), linear(2.0, y, -0.5, operator(u)))
    other = like(y, seed + 1)
    back = operator.adjoint(other)
    assert back.shape == x.shape and back.dtype == x.dtype
    torch.testing.assert_close(inner(y, other), inner(x, back), rtol=1e-9, atol=1e-9)


@every_operator
def test_pseudo_inverse_is_that_of_the_matrix(name):
    operator, shape = build(name), (1, 8, 8)
    operator.iterations = 200
    x = normal(4, *shape)
    y = operator(x)
    solution = operator.pinv(y)
    close(operator(solution), y, 1e-7)
    # least norm: what A cannot see is not in it, and the matrix' own pseudo-inverse agrees
    exact = torch.linalg.pinv(matrix(operator, shape), rtol=1e-9)
    torch.testing.assert_close(
        solution.flatten(1), (exact @ matrix(operator, shape) @ x.flatten(1).T).T, rtol=1e-6, atol=1e-6
    )


@every_operator
@pytest.mark.parametrize(
    "variance", [0.01, 2.0, torch.tensor([0.3, 1.5, 4.0], dtype=torch.float64)], ids=["small", "large", "each"]
)
def test_proximal_map_is_the_minimum(name, variance):
    operator, shape = build(name, 0.2), (1, 8, 8)
    operator.iterations = 200
    x, truth = normal(2, 3, *shape, seed=3)
    y = operator.measure(truth, Context.of(3, seed=1))
    found = operator.prox(x, y, variance)
    # the gradient of -log p(y | u) + |u - x|^2 / (2 variance), by autograd, is 0 there
    u = found.clone().requires_grad_()
    v = torch.as_tensor(variance, dtype=torch.float64).expand(3)
    cost = (operator.residual(u, y) + (u - x).square().flatten(1).sum(1) / (2 * v)).sum()
    (slope,) = torch.autograd.grad(cost, u)
    assert slope.abs().max() < 1e-6 * (1 + 1 / float(v.min()))


@every_operator
def test_an_exact_measurement_projects(name):
    operator = build(name)
    operator.iterations = 200
    x, truth = normal(2, 3, 1, 8, 8, seed=5)
    y = operator(truth)
    found = operator.prox(x, y, 0.7)
    close(operator(found), y, 1e-7)
    close(operator.prox(found, y, 0.7), found, 1e-6)
    assert operator.misfit(truth, y).max() < 1e-18
    assert ((found - truth).flatten(1).norm(dim=1) <= (x - truth).flatten(1).norm(dim=1) + 1e-9).all()


@every_operator
def test_an_item_never_depends_on_its_batch(name):
    operator = build(name, 0.1)
    x = normal(3, 2, 8, 8, dtype=torch.float32)
    y = operator.measure(x, Context.of(3, seed=2))
    for fn in (operator, lambda v: operator.prox(v, tree_map(lambda p: p[: len(v)], y), 0.5)):
        for i in (1, 2):
            part = fn(x[:i])
            tree_map(lambda a, b, i=i: torch.testing.assert_close(a[:i], b, rtol=1e-5, atol=1e-6), fn(x), part)
    assert torch.equal(first(operator.measure(x[:1], Context.of(1, seed=2))), first(y)[:1])


@every_operator
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_dtypes_are_kept_and_agree(name, dtype):
    operator = build(name, 0.3)
    x = normal(2, 1, 8, 8)
    y = operator(x)
    mine = operator(x.to(dtype))
    tree_map(lambda a, b: torch.testing.assert_close(a.to(b.dtype), b, rtol=1e-5, atol=1e-5), mine, y)
    back = operator.prox(x.to(dtype), mine, 0.5)
    assert back.dtype == dtype
    torch.testing.assert_close(back.double(), operator.prox(x, y, 0.5), rtol=1e-4, atol=1e-4)


@every_operator
def test_on_the_meta_device(name):
    operator = build(name, 0.1)
    x = torch.empty(2, 1, 8, 8, device="meta")
    y = operator(x)
    assert operator.prox(x, y, 0.5).shape == operator.adjoint(y).shape == operator.pinv(y).shape == x.shape
    assert operator.residual(x, y).shape == (2,)


@pytest.mark.parametrize("name", operators.names())
def test_noise_has_the_stated_std_where_something_is_measured(name):
    operator = build(name, 0.5)
    x = torch.zeros(400, 1, 8, 8, dtype=torch.float64)
    y = operator.measure(x, Context.of(400, seed=4))
    real = (torch.view_as_real(y) if y.is_complex() else y).flatten()
    drawn = real[real != 0]
    assert abs(float(drawn.std()) - 0.5) < 0.02
    close(operator.restrict(y), y)
    # -log p of it is half the number of reals that were measured
    expected = 0.5 * drawn.numel() / 400
    assert abs(float(operator.residual(x, y).mean()) - expected) < 0.05 * expected


def test_conjugate_gradients_against_a_direct_solve():
    factor = normal(5, 12, 12, seed=6)
    a = factor @ factor.mT + 0.1 * torch.eye(12, dtype=torch.float64)
    b = normal(5, 12, seed=7)
    found = conjugate_gradient(lambda u: (a @ u[..., None])[..., 0], b, 60)
    torch.testing.assert_close(found, torch.linalg.solve(a, b), rtol=1e-6, atol=1e-6)
    zero = b.clone()
    zero[2] = 0.0
    found = conjugate_gradient(lambda u: (a @ u[..., None])[..., 0], zero, 60)
    assert torch.equal(found[2], torch.zeros(12, dtype=torch.float64)) and torch.isfinite(found).all()


@given(n=st.integers(8, 200), acceleration=st.floats(1, 8), centre=st.floats(0, 0.3), seed=st.integers(0, 99))
def test_lines_are_as_many_as_asked_and_hold_the_centre(n, acceleration, centre, seed):
    kept = lines(n, acceleration, centre, seed)
    assert int(kept.sum()) == max(1, round(n / acceleration))
    low = min(int(kept.sum()), max(1, round(n * centre)))
    assert kept[: low // 2 + 1].all() and kept[n - (low - 1) // 2 :].all()
    assert torch.equal(kept, lines(n, acceleration, centre, seed))


def test_what_cannot_be_meant_is_refused():
    x = normal(2, 1, 6, 6)
    for call in (
        lambda: make("downsample(factor=4)")(x),
        lambda: operators.get("fourier", mask=torch.ones(5, dtype=torch.bool))(x),
        lambda: operators.get("fourier", mask=torch.ones(6)),
        lambda: operators.get("fourier")(x.bfloat16()),
        lambda: operators.get("blur", kernel=torch.ones(9, 9))(x),
        lambda: operators.get("mask", hidden=1.0),
        lambda: operators.get("identity", noise=-1.0),
        lambda: operators.get("identity")(x, gain=2.0),
        lambda: operators.get("identity").residual(x, x),
        lambda: operators.get("blur") @ operators.get("identity", noise=0.1),
        lambda: stack(a=operators.get("identity"), b=operators.get("identity", noise=0.1)),
        lambda: Function(torch.tanh).adjoint(x),
        lambda: Function(torch.tanh).prox(x, x, 1.0),
        lambda: operators.get("identity", noise=0.1).measure(x, Context.of(2, seed=None)),
        lambda: conjugate_gradient(lambda u: u, x, 0),
    ):
        with pytest.raises(InputError):
            call()


def test_a_function_with_parameters_is_an_operator():
    gain = Function(lambda x, gain: gain * x.abs(), 0.5, ("gain",))
    x = normal(3, 4)
    y = gain(x, gain=2.0)
    assert torch.equal(y, 2 * x.abs())
    torch.testing.assert_close(gain.residual(x, y + 1, gain=2.0), torch.full((3,), 4 / (2 * 0.25), dtype=torch.float64))
    both = Function(torch.tanh) @ gain.__class__(gain.fn, 0.0, ("gain",))
    assert torch.equal(both(x, gain=3.0), torch.tanh(3 * x.abs())) and not both.linear
