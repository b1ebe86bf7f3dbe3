"""Patches of brains are pure functions of their seeds, and false lesions are where they say."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sfumato.core import Context, InputError, Streams
from sfumato.core.errors import UnknownName
from sfumato.zoo import make_medical, medical
from sfumato.zoo.sets import MissingDataset


@pytest.fixture
def ball(monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """A brain that is always there: a bright ball of 60 voxels with a darker core."""
    grid = torch.stack(torch.meshgrid(*[torch.arange(70.0) - 35] * 3, indexing="ij"))
    distance = grid.square().sum(0).sqrt()
    scan = torch.where(distance < 30, 0.9, 0.0) - torch.where(distance < 12, 0.4, 0.0)
    monkeypatch.setattr(medical, "volume", lambda name: scan)
    medical._axial.cache_clear()
    yield scan
    medical._axial.cache_clear()


def test_batches_are_pure_functions_of_the_iteration(ball):
    one, two = (medical.Patches("colin27", 16, seed=3) for _ in range(2))
    assert torch.equal(one(5)["x"], two(5)["x"])
    assert not torch.equal(one(5)["x"], one(6)["x"])
    assert not torch.equal(one(5)["x"], medical.Patches("colin27", 16, seed=4)(5)["x"])


def test_patches_hold_brain_and_are_as_they_are_unless_augmented(ball):
    x = medical.patches("icbm152", 40, seed=1)
    assert x.shape == (40, 1, 32, 32)
    assert ((x > -0.9).float().mean((1, 2, 3)) >= medical.FILLED).all()
    levels = torch.tensor([-1.0, 0.0, 0.8])
    assert ((x[..., None] - levels).abs().amin(-1) < 1e-6).all()
    other = medical.patches("icbm152", 40, seed=1, augment=True)
    assert other.unique().numel() > 40 and (other[x == -1] == -1).float().mean() > 0.5


@pytest.mark.parametrize("contrast", [0.3, 0.8])
def test_a_lesion_changes_what_it_marks(ball, contrast):
    x = medical.patches("colin27", 30, seed=2)
    sick, where = medical.lesions(x, [contrast], seed=7)
    gap = (sick - x).abs()
    assert where.flatten(1).any(1).all() and where.float().mean() < 0.2
    deep = gap[where]
    assert deep.median() > 0.8 * contrast and gap.max() <= contrast + 1e-6
    assert gap[~where].mean() < 0.05 * contrast
    assert sick.min() >= -1
    again = medical.lesions(x[:3], [contrast], seed=7)
    assert torch.equal(again[0], sick[:3]) and torch.equal(again[1], where[:3])
    assert not torch.equal(medical.lesions(x, [contrast], seed=8)[1], where)


def test_where_a_scan_comes_from_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv("SFUMATO_CACHE", str(tmp_path))
    monkeypatch.setattr(medical, "_installed", lambda scan: [])
    with pytest.raises(MissingDataset, match="apt-get install mricron-data"):
        medical.locate("colin27")
    with pytest.raises(MissingDataset, match="pip install nilearn"):
        medical.locate("icbm152")
    (tmp_path / "medical").mkdir()
    (tmp_path / "medical" / "ch2bet.nii.gz").write_bytes(b"truncated")
    with pytest.raises(InputError, match="SHA-256"):
        medical.locate("colin27")
    with pytest.raises(UnknownName, match="colin27"):
        medical.locate("nobody")
    for call in (lambda: medical.Patches("colin27", 0), lambda: medical.lesions(torch.zeros(1, 1, 32, 32), [])):
        with pytest.raises(InputError):
            call()


def test_the_regressor_learns_from_what_was_measured():
    operator = make_medical.acquisition()
    x = torch.rand(3, 1, 32, 32)
    seen = []

    class Spy(torch.nn.Module):
        def forward(self, x: Tensor, label: Tensor) -> Tensor:
            seen.append(x)
            return x

    batch, context = {"x": x}, lambda: Context(rng=Streams.of(5, 3), batch=3)
    loss = make_medical.Regression(Spy(), operator)(batch, context())
    torch.testing.assert_close(seen[0], operator.pinv(operator.measure(x, context())))
    torch.testing.assert_close(loss.total, (seen[0] - x).square().mean())
    assert make_medical.Regression(Spy())(batch, context()).total == 0
