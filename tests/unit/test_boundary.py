"""Hyperplanes between classes of latents, the critical time, and the edit across one: exact laws."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import sfumato as sf
from sfumato import editing, grids, oracles, solvers
from sfumato.core import Context, InputError
from sfumato.denoisers import parametrized
from sfumato.editing.boundary import Boundaries, LinearBoundary, critical_time, cross_validated, encode, radius
from sfumato.networks import UNet
from sfumato.processes import VP, Flow

SIZE = 8


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def two_classes(n: int = 30, size: int = 12, apart: float = 4.0, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(latents, labels, the unit vector that separates them)."""
    way = torch.nn.functional.normalize(noise(size, seed=seed + 7), dim=0)
    labels = torch.arange(2 * n) % 2 == 1
    return 0.3 * noise(2 * n, size, seed=seed) + apart * labels[:, None] * way, labels, way


def model(process: Any = None) -> Any:
    torch.manual_seed(0)
    net = UNet(1, width=8, multipliers=(1, 2), blocks=1, attention=(False, True), heads=2).double().eval()
    for i, p in enumerate(net.parameters()):
        p.data = p.data if bool(p.any()) else 0.1 * noise(*p.shape, seed=i)
    return parametrized(net, process or VP(), "v")


def task(x: Tensor, denoiser: Any, **fields: Any) -> editing.Task:
    codec, images = sf.load("digits").codec, torch.zeros(len(x), 3, SIZE, SIZE, dtype=torch.uint8)
    made = {
        "denoiser": denoiser, "codec": codec, "x0": x, "images": images, "source": {}, "target": {}, "scale": 1.0,
        "guidance": lambda d: d, "solver": solvers.get("ddim"), "grid": grids.get("uniform"), "steps": 10,
    }  # fmt: skip
    return editing.Task(**{**made, **fields})


@settings(max_examples=15)
@given(st.integers(0, 10_000), st.floats(-5, 5), st.sampled_from([(12,), (3, 2, 2)]))
def test_a_move_goes_exactly_to_the_distance_asked_and_along_the_normal_only(
    seed: int, goal: float, shape: tuple[int, ...]
):
    x, labels, _ = two_classes(seed=seed)
    x = x.view(-1, *shape)
    boundary = LinearBoundary.fit(x, labels)
    assert boundary.normal.shape == shape and abs(float(boundary.normal.norm()) - 1) < 1e-9
    moved = boundary.moved(x, goal)
    assert torch.allclose(boundary.distance(moved), torch.full((len(x),), goal, dtype=torch.float64), atol=1e-9)
    step = (moved - x).flatten(1)
    across = step - (step @ boundary.normal.flatten())[:, None] * boundary.normal.flatten()
    assert float(across.abs().max()) < 1e-9
    assert torch.allclose(boundary.moved(x, boundary.distance(x)), x, atol=1e-9), "to where it is, nothing moves"
    each = boundary.moved(x, torch.arange(len(x), dtype=torch.float64))
    assert torch.allclose(boundary.distance(each), torch.arange(len(x), dtype=torch.float64), atol=1e-8)


def test_the_hyperplane_is_that_of_an_independent_machine():
    from sklearn.svm import SVC

    x, labels, way = two_classes(apart=1.0)
    ours, theirs = LinearBoundary.fit(x, labels), SVC(kernel="linear", C=1.0).fit(x.numpy(), labels.numpy())
    length = float(torch.tensor(theirs.coef_[0]).norm())
    assert torch.allclose(ours.normal, torch.tensor(theirs.coef_[0]) / length, atol=1e-3)
    assert torch.allclose(ours.distance(x), torch.tensor(theirs.decision_function(x.numpy())) / length, atol=1e-2)
    assert ours.accuracy(x, labels) == theirs.score(x.numpy(), labels.numpy())
    assert float(ours.normal @ way) > 0.8
    assert abs(ours.spread - float(ours.distance(x).std())) < 1e-9


def test_the_plane_between_the_means_lies_half_way():
    x, labels, _ = two_classes()
    plane = LinearBoundary.between_means(x, labels)
    means = torch.stack([x[labels].mean(0), x[~labels].mean(0)])
    far = plane.distance(means)
    assert torch.allclose(far[0], -far[1]) and torch.allclose(far[0] - far[1], (means[0] - means[1]).norm())


def test_too_few_or_one_class_only_is_refused():
    x, labels, _ = two_classes()
    for bad in (torch.zeros(60, dtype=torch.bool), torch.arange(60) < 9, labels[:-1]):
        for fit in (LinearBoundary.fit, LinearBoundary.between_means, cross_validated):
            with pytest.raises(InputError, match="at least 10"):
                fit(x, bad)


def test_classes_that_nothing_tells_apart_are_refused():
    x, labels = noise(15, 6).repeat_interleave(2, 0), torch.arange(30) % 2 == 1
    with pytest.raises(InputError, match="same mean"):
        LinearBoundary.between_means(x, labels)
    with pytest.raises(InputError, match="same mean"):
        LinearBoundary.fit(x[:1].expand(30, 6), labels)


def test_cross_validation_tells_learning_from_memory():
    x, labels, _ = two_classes(n=40, size=200)
    assert cross_validated(x, labels) > 0.95
    blind = noise(80, 200, seed=3)
    assert LinearBoundary.fit(blind, labels).accuracy(blind, labels) == 1.0, (
        "any 80 points of 200 numbers are separable"
    )
    assert cross_validated(blind, labels) < 0.7
    pairs = torch.arange(80) // 2
    copies = blind.clone()
    copies[1::2] = copies[::2]  # each subject twice, once with each label: nothing can be learnt
    assert cross_validated(copies, labels, pairs) <= 0.5 + 1e-9


def test_encoding_is_ddim_upwards_with_what_the_network_says_there():
    denoiser, x = model(Flow()), noise(5, 1, SIZE, SIZE)
    found = encode(denoiser, x, 0.4, steps=4, batch=2)
    up = sf.invert(denoiser, x, solver="ddim", grid="uniform", steps=4, stop=0.4)
    assert torch.allclose(found.x, up.x, atol=1e-12) and found.h.shape == (5, 16, SIZE // 2, SIZE // 2)
    assert torch.allclose(encode(denoiser, x[3:4], 0.4, steps=4).h, found.h[3:4], atol=1e-10), "item i on its own"


def test_the_critical_time_is_where_states_still_separate_and_are_typical():
    """A mixture of two classes whose noising is known exactly: its inversions have the right radius at every time."""
    d, labels = 16, torch.arange(60) % 2 == 1
    way = torch.nn.functional.normalize(noise(d), dim=0)
    mixture = oracles.GaussianMixture(
        torch.stack([-1.5 * way, 1.5 * way]), torch.tensor([0.5, 0.5]), torch.tensor([0.5, 0.5])
    )

    class Seen(torch.nn.Module):
        """The oracle as a network, so that it has a submodule."""

        def __init__(self) -> None:
            super().__init__()
            self.mid_block, self.oracle = torch.nn.Identity(), mixture.denoiser(VP())

        def forward(self, x: Tensor, label: Tensor) -> Tensor:
            post = self.oracle(self.mid_block(x), float(label[0]), Context.of(len(x), None))
            return post.view("v")

    denoiser = parametrized(Seen(), VP(), "v")
    x0 = 0.5 * noise(60, d, seed=5) + torch.where(labels, 1.5, -1.5)[:, None] * way
    time, curve = critical_time(denoiser, x0, labels, levels=5, steps=100, gap=0.1, batch=32)
    assert [round(level.time, 6) for level in curve] == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert all(abs(level.inverted - level.sampled) < 0.1 for level in curve), curve
    best = max(level.accuracy for level in curve)
    enough = best - (best * (1 - best) / 60) ** 0.5
    assert time == max(level.time for level in curve if level.accuracy >= enough) and curve[0].accuracy > 0.9
    with pytest.raises(InputError, match="raise gap"):
        critical_time(denoiser, 3 * x0, labels, levels=2, steps=10, gap=1e-4)
    with pytest.raises(InputError, match="multiple"):
        critical_time(denoiser, x0, labels, levels=3, steps=10)
    assert abs(radius(noise(50, 400)) - 1) < 0.02


@pytest.mark.parametrize("process", [VP(), Flow()], ids=["vp", "flow"])
def test_an_edit_of_nothing_is_the_inversion_and_back_and_a_move_changes_only_the_first_step(process: Any):
    denoiser, x = model(process), noise(4, 1, SIZE, SIZE)
    labels = torch.arange(24) % 2 == 1
    learned = noise(24, 1, SIZE, SIZE, seed=4) + labels.view(-1, 1, 1, 1)
    boundaries = Boundaries.fit(denoiser, learned, labels, 0.5, steps=5)
    asked = task(x, denoiser)
    still = editing.get("boundary-diffusion", boundaries=boundaries, distance=None)(asked)
    assert torch.equal(still, editing.get("ddim-inversion", strength=0.5)(asked))
    stay = editing.get("boundary-diffusion", boundaries=boundaries, distance=0.0, relative=True)(asked)
    assert torch.allclose(stay, still, atol=1e-9), "moved by nothing, and h replaced by itself"
    moved = editing.get("boundary-diffusion", boundaries=boundaries, distance=2.0, where="x")(asked)
    up = sf.invert(denoiser, x, solver="ddim", grid="uniform", steps=5, stop=0.5)
    by_hand = boundaries.x.moved(up.x, 2 * boundaries.x.spread)
    assert torch.allclose(
        moved, sf.sample(denoiser, solver="ddim", grid="uniform", steps=5, x=by_hand, start=0.5), atol=1e-9
    )
    outcomes = [moved]
    for where in ("h", "both"):
        outcomes.append(editing.get("boundary-diffusion", boundaries=boundaries, distance=2.0, where=where)(asked))
    assert all(not torch.allclose(a, b, atol=1e-6) for i, a in enumerate(outcomes) for b in [still, *outcomes[:i]])
    alone = editing.get("boundary-diffusion", boundaries=boundaries)(task(x[2:3], denoiser))
    assert torch.allclose(alone, outcomes[-1][2:3], atol=1e-8), "item i never depends on the batch"
    assert asked.nfe[0] > 0


def test_what_is_missing_or_unknown_is_said():
    x = noise(1, 1, SIZE, SIZE)
    with pytest.raises(InputError, match="boundaries="):
        editing.get("boundary-diffusion")(task(x, model()))
    with pytest.raises(InputError, match="both, x, h"):
        editing.get("boundary-diffusion", where="y")
