"""Enlarging: an exact wavelet transform, structure that is held, and sizes beyond the training's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import sfumato as sf
from sfumato import codecs, conditioners, editing, oracles, pipeline
from sfumato.core import Context, Denoiser, InputError, Posterior
from sfumato.editing.methods.diffusehigh import DiffuseHigh, Structured
from sfumato.editing.wavelets import dwt2, idwt2, low_pass, unsharp
from sfumato.processes import VP, Flow

WAVELETS = ("haar", "db2", "db4", "db7")


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(deadline=None, max_examples=25)
@given(height=st.integers(1, 33), width=st.integers(1, 33), wavelet=st.sampled_from(WAVELETS))
def test_the_transform_inverts_exactly_at_any_size(height: int, width: int, wavelet: str) -> None:
    x = noise(2, 3, height, width)
    torch.testing.assert_close(idwt2(*dwt2(x, wavelet), (height, width), wavelet), x)


@pytest.mark.parametrize("wavelet", WAVELETS)
@pytest.mark.parametrize("size", [(8, 8), (7, 12)])
def test_against_pywavelets(wavelet: str, size: tuple[int, int]) -> None:
    pywt = pytest.importorskip("pywt")
    x = noise(1, 1, *size)
    low, (horizontal, vertical, diagonal) = pywt.dwt2(x[0, 0].numpy(), wavelet, mode="symmetric")
    ours, highs = dwt2(x, wavelet)
    torch.testing.assert_close(ours[0, 0], torch.from_numpy(low))
    for got, wanted in zip(highs[0, 0], (horizontal, vertical, diagonal), strict=True):
        torch.testing.assert_close(got, torch.from_numpy(wanted))


@pytest.mark.parametrize("n", range(1, 11))
def test_filters_are_orthonormal_with_vanishing_moments(n: int) -> None:
    h = torch.tensor(low_pass(f"db{n}"), dtype=torch.float64)
    for shift in range(n):
        overlap = float((h[: len(h) - 2 * shift] * h[2 * shift :]).sum())
        assert overlap == pytest.approx(float(shift == 0), abs=1e-6)
    high = h.flip(0) * torch.tensor([1.0, -1.0]).repeat(n)
    for k in range(min(n, 4)):
        assert float((high * torch.arange(2 * n) ** k).sum()) == pytest.approx(0.0, abs=1e-4)


def test_the_transform_is_differentiable_and_keeps_dtype() -> None:
    x = noise(1, 2, 6, 6).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: idwt2(dwt2(v)[0], 0 * dwt2(v)[1], (6, 6)), x)
    assert dwt2(noise(1, 1, 9, 9).float())[0].dtype == torch.float32


def test_unsharp_masking() -> None:
    x = noise(2, 3, 9, 9)
    torch.testing.assert_close(unsharp(x, 0.0), x)
    flat = torch.full((1, 3, 5, 5), 0.3, dtype=torch.float64)
    torch.testing.assert_close(unsharp(flat), flat)
    assert dwt2(unsharp(x))[1].square().sum() > dwt2(x)[1].square().sum()


class Pixels(Denoiser):
    """The exact belief of pictures whose pixels are independent, N(0.2, 0.3^2), at any size."""

    null = {"y": 1}

    def __init__(self, process: Any) -> None:
        super().__init__()
        self.one, self.process = oracles.Gaussian([0.2], 0.09).denoiser(process), process
        self.seen: list[tuple[float, Tensor]] = []

    def forward(self, x: Tensor, t: Any, ctx: Context) -> Posterior:
        post = self.one(x.reshape(-1, 1), t, ctx.fork(batch=ctx.batch * x[0].numel()))
        self.seen.append((t, x))
        return Posterior(post.native.view(x.shape), post.kind, x, post.coef)


class Wide(codecs.Identity):
    def encode(self, data: Tensor, ctx: Any = None) -> Tensor:
        return codecs.to_float(data, torch.float64)


def pipe(process: Any = None) -> Any:
    classes = conditioners.Classes({"y": ["thing"]})
    model: Any = Pixels(process or VP())
    return pipeline.Pipeline(model, Wide(), classes, (8, 8), grid="uniform", guidance=1.0)


def images(n: int = 2, side: int = 16, seed: int = 0) -> Tensor:
    return torch.randint(60, 200, (n, 3, side, side), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


LAWS = pytest.mark.parametrize("process", [VP(), Flow()], ids=["vp", "flow"])


@LAWS
@pytest.mark.parametrize("wavelet", WAVELETS)
def test_the_belief_has_the_guides_low_band_and_its_own_high_bands(process: Any, wavelet: str) -> None:
    """In the wrapper's steps, and exactly where the transform is a bijection (haar at even sizes)."""
    guide, x = noise(2, 3, 12, 12, seed=1), noise(2, 3, 12, 12, seed=2)
    inner = Pixels(process)
    wrapped = Structured(inner, guide, Wide(), steps=2, wavelet=wavelet)
    ctx = Context.of(2, None, dtype=torch.float64)
    plain = inner(x, 0.4, ctx).mean
    got = wrapped(x, 0.4, ctx).mean
    expected = idwt2(dwt2(guide, wavelet)[0], dwt2(plain, wavelet)[1], (12, 12), wavelet)
    torch.testing.assert_close(got, expected)
    if wavelet == "haar":
        torch.testing.assert_close(dwt2(got, wavelet)[0], dwt2(guide, wavelet)[0])
        torch.testing.assert_close(dwt2(got, wavelet)[1], dwt2(plain, wavelet)[1])
    ctx.run.step = 2
    torch.testing.assert_close(wrapped(x, 0.4, ctx).mean, plain)


@LAWS
@pytest.mark.parametrize("solver", ["ddim", "dpm-solver++", "ddpm"])
def test_without_structure_and_sharpening_it_is_sdedit(process: Any, solver: str) -> None:
    options: dict[str, Any] = {"steps": 20, "solver": solver, "seed": 3}
    got = editing.perform(pipe(process), images(), "thing", method="diffusehigh(structure=0, sharpen=0.0)", **options)
    other = editing.perform(pipe(process), images(), "thing", method="sdedit(strength=0.3)", **options)
    torch.testing.assert_close(got.state, other.state)


def test_held_in_every_step_the_low_band_is_the_guides() -> None:
    """And for white pixels, whose bands know nothing of each other, the high bands are those of the free run."""
    given = images()
    found = editing.perform(pipe(), given, method=DiffuseHigh(structure=99, wavelet="haar"), steps=20)
    guide = unsharp(codecs.to_float(given, torch.float64))
    torch.testing.assert_close(dwt2(found.state, "haar")[0], dwt2(guide, "haar")[0])
    loose = editing.perform(pipe(), given, method=DiffuseHigh(structure=0, wavelet="haar"), steps=20)
    torch.testing.assert_close(dwt2(found.state, "haar")[1], dwt2(loose.state, "haar")[1])
    assert not torch.allclose(dwt2(found.state, "haar")[0], dwt2(loose.state, "haar")[0])


def test_sharpening_raises_the_energy_of_the_high_bands() -> None:
    energy = []
    for sharpen in (0.0, 1.0):
        x = editing.perform(pipe(), images(), method=DiffuseHigh(sharpen=sharpen, wavelet="haar"), steps=20).state
        energy.append(float(dwt2(x, "haar")[1].square().mean()))
    assert energy[0] < energy[1]


def test_enlarging_by_stages() -> None:
    model = pipe()
    x = editing.enlarge(model, ["thing"] * 3, sizes=[12, (16, 20)], steps=10, base={"steps": 4}, seed=5)
    assert x.shape == (3, 3, 16, 20) and x.dtype == torch.uint8
    assert torch.equal(
        editing.enlarge(model, ["thing"] * 3, sizes=[12, (16, 20)], steps=10, base={"steps": 4}, seed=5), x
    )
    two = editing.enlarge(model, ["thing"] * 2, sizes=[12, (16, 20)], steps=10, base={"steps": 4}, seed=5)
    assert torch.equal(two, x[:2])
    small = model.generate(2, steps=4, seed=5)
    given = editing.enlarge(model, image=small, sizes=[12, (16, 20)], steps=10, seed=5)
    assert torch.equal(given, editing.enlarge(model, 2, sizes=[12, (16, 20)], steps=10, base={"steps": 4}, seed=5))


def test_a_network_draws_larger_than_it_was_trained() -> None:
    """The bundled digits at 16 pixels keep the 8-pixel digit they came from, better than without the structure."""
    model, off = sf.load("digits"), {}
    names = ["three", "seven", "eight", "zero"]
    small = model.generate(names, seed=1)
    for structure in (0, 5):
        method = DiffuseHigh(structure=structure, wavelet="haar", sharpen=0.0)
        x = editing.enlarge(model, names, image=small, sizes=[16], steps=20, method=method)
        back = torch.nn.functional.avg_pool2d(x.float(), 2)
        off[structure] = float((back - small.float()).square().mean().sqrt())
    assert off[5] < 0.8 * off[0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sizes": [6]}, "grow"), ({"sizes": [12, 10]}, "grow"), ({"sizes": [8]}, "grow"), ({"sizes": []}, "empty"), ({"sizes": [12], "image": images(1, 8), "base": {"steps": 3}}, "not generated"),
        ({"sizes": [12], "method": "diffusehigh(wavelet='sym4')"}, "haar"), ({"sizes": [12], "method": "diffusehigh(structure=-1)"}, "not negative"),
        ({"sizes": [12], "image": torch.zeros(1, 3, 8, 8)}, "uint8"),
    ],
)  # fmt: skip
def test_bad_input_is_said(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        editing.enlarge(pipe(), "thing", **options)


def test_other_bad_input_is_said() -> None:
    with pytest.raises(InputError, match="prompts"):
        editing.enlarge(pipe(), sizes=[12])
    low, highs = dwt2(noise(1, 1, 8, 8))
    with pytest.raises(InputError, match="bands"):
        idwt2(low, highs, (12, 12))
    with pytest.raises(InputError, match="sigma"):
        unsharp(noise(1, 1, 8, 8), sigma=0.0)


def test_a_stable_diffusion_pipeline_enlarges() -> None:
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    from sfumato.interop.tiny import pipeline as tiny

    model = sf.from_diffusers(tiny("sd"))
    side = model.size[0]
    x = editing.enlarge(model, "a cat", sizes=[2 * side], steps=6, guidance=2.0, base={"steps": 3})
    assert x.shape == (1, 3, 2 * side, 2 * side)
