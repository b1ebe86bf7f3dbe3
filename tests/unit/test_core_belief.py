"""A Posterior is one reading; all others follow from it, whatever the kind, the time and the dtype."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from sfumato.core import KINDS, Coef, InputError, Posterior, linear, row, solve
from sfumato.processes import EDM, VE, VP, Cosine, Flow

PROCESSES = [VP(), VE(), EDM(), Flow(), Flow(3.0), Cosine()]
number = st.floats(-4, 4).filter(lambda v: abs(v) > 1e-3)
positive = st.floats(0.01, 50)


def pair(n: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(n, 4, generator=g, dtype=torch.float64) for _ in range(2))  # type: ignore[return-value]


def says(kind: str | tuple, c: Coef, x0: Tensor, eps: Tensor) -> Posterior:
    """The belief (x0, eps) said as ``kind``."""
    p, q = row(kind, c)
    return Posterior(linear(p, x0, q, eps), kind, linear(c.alpha, x0, c.sigma, eps), c)


@given(positive, positive, number, number, number, number, st.integers(0, 99))
def test_any_row_gives_any_reading(a: float, s: float, da: float, ds: float, p: float, q: float, seed: int) -> None:
    """For every alpha, sigma and every row that does not repeat x."""
    c = Coef(a, s, da, ds)
    det = abs(a * q - s * p)
    assume(det > 1e-2 * math.hypot(a, s) * math.hypot(p, q))
    x0, eps = pair(seed=seed)
    post = says((p, q), c, x0, eps)
    tolerance = 1e-9 * (1 + 100 * math.hypot(a, s) / min(a, s, 1))
    assert torch.allclose(post.mean, x0, rtol=1e-8, atol=tolerance)
    assert torch.allclose(post.view("eps"), eps, rtol=1e-8, atol=tolerance)
    assert torch.allclose(post.view("v"), a * eps - s * x0, rtol=1e-8, atol=tolerance * (a + s))
    assert torch.allclose(post.view("flow"), da * x0 + ds * eps, rtol=1e-8, atol=tolerance * (abs(da) + abs(ds)))
    assert torch.allclose(post.view("score"), -eps / s, rtol=1e-8, atol=tolerance / s)
    assert torch.allclose(post.at(0.3, -2.0), 0.3 * x0 - 2 * eps, rtol=1e-8, atol=2 * tolerance)
    assert torch.allclose(post.at(a, s), post.x, rtol=1e-8, atol=tolerance * (a + s))


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
@pytest.mark.parametrize(("said", "read"), list(product(KINDS, KINDS)))
def test_all_kinds_convert_to_all_kinds(said: str, read: str, process: object) -> None:
    x0, eps = pair()
    for t in (0.05, 0.4, 0.99):
        c = process.coef(t)  # type: ignore[attr-defined]
        p, q = row(read, c)
        scale = abs(p) + abs(q)
        assert torch.allclose(says(said, c, x0, eps).view(read), linear(p, x0, q, eps), rtol=1e-7, atol=1e-8 * scale)


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
@pytest.mark.parametrize("kind", KINDS)
def test_a_clock_an_item_reads_as_one_clock(kind: str, process: object) -> None:
    t = torch.tensor([0.2, 0.5, 0.9]).double()
    x0, eps = pair()
    rows = says(kind, process.coef(t), x0, eps)  # type: ignore[attr-defined]
    for i in range(3):
        one = says(kind, process.coef(float(t[i])), x0[i : i + 1], eps[i : i + 1])  # type: ignore[attr-defined]
        for read in KINDS:
            assert torch.allclose(rows.view(read)[i], one.view(read)[0], rtol=1e-8, atol=1e-9)


@given(
    positive,
    positive,
    st.sampled_from(["x0", "eps", "v", "score"]),
    st.sampled_from([("x0", "eps"), ("eps", "x0"), ("v", "x0")]),
)
def test_but_with_keep_gives_back_both_readings(a: float, s: float, kind: str, edit: tuple[str, str]) -> None:
    """``but(x0=new, keep=('eps',))``: x0 is new, eps is kept, x is what follows."""
    c, (x0, eps), (new, _) = Coef(a, s, -1.0, 1.0), pair(), pair(seed=5)
    changed, kept = edit
    before = says(kind, c, x0, eps)
    after = before.but(keep=(kept,), aux={"mark": 1}, **{changed: new})
    scale = 1e-7 * (1 + (a + s) / min(a, s)) ** 2
    assert torch.allclose(after.view(changed), new, rtol=1e-6, atol=scale)
    assert torch.allclose(after.view(kept), before.view(kept), rtol=1e-6, atol=scale)
    assert torch.allclose(after.x, a * after.mean + s * after.view("eps"), rtol=1e-6, atol=scale * (a + s))
    assert after.aux == {"mark": 1} and before.aux == {}


@given(positive, positive, st.sampled_from(KINDS))
def test_but_without_keep_leaves_x(a: float, s: float, kind: str) -> None:
    c, (x0, eps), (new, _) = Coef(a, s, -1.0, 1.0), pair(), pair(seed=5)
    before = says(kind, c, x0, eps)
    after = before.but(x0=new)
    assert after.x is before.x and torch.equal(after.mean, new)
    assert torch.allclose(after.view("eps"), (before.x - a * new) / s, rtol=1e-7, atol=1e-7 * (1 + a / s))
    same = before.but(aux={"k": 2})
    assert same.native is before.native and same.aux == {"k": 2}


def test_edits_that_say_nothing_are_refused() -> None:
    x0, eps = pair()
    post = says("eps", VP().coef(0.5), x0, eps)
    with pytest.raises(InputError, match="is not one of x0, eps"):
        post.but(clean=x0)
    with pytest.raises(InputError, match="replace one reading"):
        post.but(x0=x0, eps=eps)
    with pytest.raises(InputError, match="keep at most one"):
        post.but(keep=("eps", "v"), x0=x0)
    with pytest.raises(InputError, match="say the same"):
        post.but(keep=("eps",), eps=eps)
    with pytest.raises(InputError, match="say the same"):
        post.but(keep=("eps",), score=eps)
    with pytest.raises(InputError, match="is not one of x0, eps"):
        post.view("noise")


def test_a_noise_prediction_at_alpha_0_can_only_be_read_as_noise() -> None:
    x0, eps = pair()
    post = says("eps", Flow().coef(1.0), x0, eps)
    assert torch.equal(post.view("eps"), eps) and torch.equal(post.at(0.0, 0.5), 0.5 * eps)
    assert torch.equal(post.at(0.0, 0.0), torch.zeros_like(eps))
    for read in ("x0", "v", "flow"):
        with pytest.raises(InputError, match="says nothing else where alpha = 0 and sigma = 1"):
            post.view(read)
    with pytest.raises(InputError, match="says nothing else"):
        post.at(0.5, torch.ones(3))  # a region or a clock an item


def test_other_predictions_at_alpha_0_say_everything() -> None:
    x0, eps = pair()
    for process, kind in product((Flow(), Flow(3.0), Cosine()), ("x0", "v", "flow")):
        post = says(kind, process.coef(1.0), x0, eps)
        assert torch.allclose(post.mean, x0) and torch.allclose(post.view("eps"), eps)


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_at_sigma_0_the_state_is_the_data(process: object) -> None:
    c = process.coef(0.0)  # type: ignore[attr-defined]
    x0, eps = pair()
    for kind in ("x0", "eps", "v"):
        assert torch.allclose(says(kind, c, x0, eps).mean, x0)
    for kind in ("eps", "v"):
        assert torch.allclose(says(kind, c, x0, eps).at(0.5, 0.5), 0.5 * x0 + 0.5 * eps)
    with pytest.raises(InputError, match="says nothing else where alpha = 1 and sigma = 0"):
        says("x0", c, x0, eps).view("eps")
    with pytest.raises(InputError, match="score is infinite where sigma = 0"):
        says("v", c, x0, eps).view("score")
    if math.isinf(c.dsigma):
        with pytest.raises(InputError, match="flow of this process is infinite where sigma = 0"):
            says("v", c, x0, eps).view("flow")
    else:
        assert torch.allclose(says("flow", c, x0, eps).mean, x0)  # also where the flow is 0 there (EDM)


@given(st.tuples(number, number), st.tuples(number, number), st.tuples(number, number))
def test_solve_is_the_two_by_two_system(target: tuple, one: tuple, other: tuple) -> None:
    assume(abs(one[0] * other[1] - one[1] * other[0]) > 1e-3)
    u, w = solve(target, one, other)
    for k in range(2):
        assert u * one[k] + w * other[k] == pytest.approx(target[k], rel=1e-6, abs=1e-6)


def test_coefficients_at_the_ends_of_time() -> None:
    assert Flow().coef(0.0).lam == math.inf and Flow().coef(1.0).lam == -math.inf
    assert Flow().coef(0.0).angle == 0 and Flow().coef(1.0).angle == math.pi / 2
    both = Flow().coef(torch.tensor([0.0, 1.0]))
    assert both.lam.tolist() == [math.inf, -math.inf] and both.angle.tolist() == [0, math.pi / 2]


def test_beliefs_can_be_compared_and_hashed_without_reading_tensors() -> None:
    """A frozen dataclass that holds tensors must not compare them."""
    x0, eps = pair()
    post = says("v", VP().coef(0.5), x0, eps)
    assert post == post and post != says("v", VP().coef(0.5), x0, eps) and len({post, post}) == 1
