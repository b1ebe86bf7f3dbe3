"""Edits by exactly invertible solvers: the picture comes back when nothing is asked, on every law, guided, in both precisions."""

from __future__ import annotations

import pytest
import torch
from tiny_inversion import images, tiny

import sfumato as sf
from sfumato import editing, processes
from sfumato.core import InputError
from sfumato.editing.methods.reversible import BDIAEdit, EDICTEdit, FixedPoint

LAWS = {"cosine": processes.Cosine(), "flow": processes.Flow(), "vp": processes.VP()}

EXACT = {
    "edict(source_guidance=None)": {}, "edict(source_guidance=None, mixing=1.0, strength=1.0)": {}, "bdia(source_guidance=None)": {}, "bdia(source_guidance=None, gamma=1.0)": {},
    "bdia(source_guidance=None, strength=0.5)": {"solver": "heun"}, "fixed-point(source_guidance=None)": {"solver": "implicit"},
}  # fmt: skip


@pytest.mark.parametrize(
    ("method", "law"),
    [*((m, "flow") for m in EXACT), ("edict(source_guidance=None)", "vp"), ("bdia(source_guidance=None)", "cosine")],
)
def test_asked_for_what_it_shows_a_picture_returns(method, law):
    """Guidance 7 both ways: to 1e-10 in float64; what is asked for otherwise changes it."""
    pipe, options = tiny(LAWS[law]), {"source": "noto", "method": method, "steps": 15, "guidance": 7.0, **EXACT[method]}
    x0 = pipe.codec.encode(images())
    assert (editing.perform(pipe, images(), "noto", **options).state - x0).abs().max() < 1e-10
    assert (editing.perform(pipe, images(), "twemoji", **options).state - x0).abs().max() > 0.05


@pytest.mark.parametrize("method", ["edict(source_guidance=None)", "bdia(source_guidance=None)"])
def test_in_float32_it_returns_within_what_the_method_magnifies(method):
    pipe = tiny(LAWS["flow"], torch.float32)
    found = editing.perform(pipe, images(), "noto", source="noto", method=method, steps=30, guidance=7.0)
    assert (found.state - pipe.codec.encode(images())).abs().max() < 1e-2


def test_what_is_not_exact_is_magnified_by_guidance():
    """DDIM inversion on the same model and steps is worse by many orders, and worse with more guidance."""
    pipe = tiny(LAWS["cosine"])
    x0, errors = pipe.codec.encode(images()), []
    for scale in (1.0, 7.0):
        found = editing.perform(
            pipe, images(), "noto", source="noto", method="ddim-inversion", strength=0.8, steps=15, guidance=scale
        )
        errors.append(float((found.state - x0).abs().mean()))
    assert 1e-4 < errors[0] < errors[1]


def test_the_cost_is_that_of_the_steps():
    pipe = tiny(LAWS["flow"])
    for method, calls in (
        ("edict", 2 * 20 + 2 * 2 * 20),
        ("edict(source_guidance=None)", 2 * 2 * 2 * 20),
        ("bdia", 20 + 2 * 20 - 2),
        ("fixed-point(iterations=3)", 3 * 20 + 2 * 20),
    ):
        found = editing.perform(pipe, images(1), "noto", source="noto", method=method, steps=25, guidance=3.0)
        assert found.nfe == calls


def test_fixed_point_iteration_closes_the_way_that_ddim_inversion_leaves_open():
    pipe = tiny(LAWS["cosine"])
    x0, errors = pipe.codec.encode(images()), {}
    for method in ("ddim-inversion(strength=0.8)", "fixed-point(iterations=1)", "fixed-point(iterations=8)"):
        found = editing.perform(pipe, images(), "noto", source="noto", method=method, steps=15, guidance=1.0)
        errors[method] = float((found.state - x0).abs().mean())
    assert errors["fixed-point(iterations=8)"] < 1e-4 * errors["ddim-inversion(strength=0.8)"]
    assert errors["fixed-point(iterations=8)"] < 1e-2 * errors["fixed-point(iterations=1)"]


def test_another_scale_on_the_way_up():
    """source_guidance=1 is the conditional model alone; None is the guidance of the way down, whatever it is."""
    pipe = tiny(LAWS["flow"])
    options = {"source": "noto", "steps": 10, "guidance": 3.0}
    ones = [
        sf.edit(pipe, images(), "twemoji", method=EDICTEdit(source_guidance=scale), **options)
        for scale in (None, 3.0, 1.0)
    ]
    assert torch.equal(ones[0], ones[1]) and not torch.equal(ones[0], ones[2])
    own = sf.edit(
        pipe,
        images(),
        "twemoji",
        method=EDICTEdit(source_guidance=None),
        **(options | {"guidance": sf.guidance.cfg(3.0)}),
    )
    assert torch.equal(own, ones[0])


@pytest.mark.parametrize(
    ("method", "solver", "said"),
    [
        ("edict", "heun", "couples two runs of DDIM"),
        ("edict(strength=0.0)", None, "above 0"),
        ("edict(mixing=0.2)", None, "above 0.5"),
        ("bdia", "ddpm", "draws noise"),
        ("bdia", "dpm-solver++", "keeps a history"),
        ("bdia(gamma=0.0)", None, "positive"),
        ("fixed-point", "ddpm", "draws noise"),
        ("fixed-point(iterations=0)", None, "at least 1"),
    ],
)
def test_what_cannot_be_inverted_is_refused(method, solver, said):
    with pytest.raises(InputError, match=said):
        sf.edit(tiny(LAWS["cosine"]), images(), "noto", source="noto", method=method, solver=solver, steps=5)


def test_solvers_that_are_exact_already_are_taken_as_they_are():
    pipe = tiny(LAWS["cosine"])
    options = {"source": "noto", "steps": 8}
    for method, spec in ((EDICTEdit(mixing=0.9), "edict(mixing=0.9)"), (BDIAEdit(gamma=0.9), "bdia(gamma=0.9)"),
                         (FixedPoint(iterations=4), "implicit(iterations=4, strict=False)")):  # fmt: skip
        a = sf.edit(pipe, images(), "twemoji", method=method, **options)
        assert torch.equal(a, sf.edit(pipe, images(), "twemoji", method=method, solver=spec, **options))


def test_a_stable_diffusion_pipeline_inverts_exactly():
    """Text-conditional U-Net of diffusers on VAE latents, guided: EDICT and BDIA return the code to rounding."""
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    from sfumato.interop.tiny import pipeline as tiny_diffusers

    pipe = sf.from_diffusers(tiny_diffusers("sd"))
    picture = images(1, seed=3).repeat_interleave(pipe.size[0] // 8, 2).repeat_interleave(pipe.size[1] // 8, 3)
    for method in ("edict(source_guidance=None)", "bdia(source_guidance=None)"):
        found = editing.perform(pipe, picture, "a cat", source="a cat", method=method, steps=10, guidance=2.0)
        assert (found.state - pipe.codec.encode(picture)).abs().max() < 1e-2
