"""Guidances by name, in pipelines and on the command line."""

from __future__ import annotations

import pytest
import torch

import sfumato as sf
from sfumato import codecs, conditioners, networks, pipeline, processes
from sfumato.cli._app import scale_or_spec
from sfumato.cli.sample import _region
from sfumato.core import InputError, UnknownName
from sfumato.denoisers import parametrized

VENDORS = ["noto", "twemoji", "fluent"]


def tiny(guidance="apg(scale=3)") -> pipeline.Pipeline:
    torch.manual_seed(0)
    net = networks.UNet(3, width=8, multipliers=(1, 2), blocks=1, attention=False, embeddings={"vendor": 3})
    for parameter in net.parameters():
        parameter.data = (parameter.data + 0.05 * torch.randn_like(parameter)).half().float()
    return pipeline.Pipeline(
        parametrized(net.eval(), processes.Cosine(), "v", null={"vendor": 3}),
        codecs.Identity(),
        conditioners.Classes({"vendor": VENDORS}),
        (8, 8),
        steps=3,
        guidance=guidance,
    )


def test_names_and_specs() -> None:
    assert {"cfg", "apg", "perp-neg", "autoguidance", "regional", "threshold"} <= set(sf.guidance.names())
    denoiser = tiny().denoiser
    made = sf.guidance.get("apg(scale=4, eta=0.5)")(denoiser)
    assert (made.scale, made.eta) == (4, 0.5)
    assert sf.guidance.get("apg", scale=4)(denoiser).scale == 4
    nested = sf.guidance.get("cfg(scale=8) | threshold(mode='static')")(denoiser)
    assert [type(m).__name__ for m in nested.modules()][:2] == ["Thresholded", "ClassifierFree"]
    with pytest.raises(UnknownName, match="no guidance named 'agp'.*apg"):
        sf.guidance.get("agp(scale=4)")
    with pytest.raises(InputError, match="it takes: scale"):
        sf.guidance.get("apg(strength=4)")
    with pytest.raises(InputError, match="not both"):
        sf.guidance.get("apg(scale=4)", eta=1.0)


def test_a_spec_is_the_object() -> None:
    p = tiny()
    assert torch.equal(p.generate(["noto"]), p.generate(["noto"], guidance=sf.guidance.apg(3.0)))
    assert torch.equal(p.generate(["noto"], guidance="cfg(scale=2.0)"), p.generate(["noto"], guidance=2.0))
    assert torch.equal(
        p.generate(["noto"], guidance="apg(scale=2.0, eta=1.0, momentum=0.0)"), p.generate(["noto"], guidance=2.0)
    )


def test_a_saved_pipeline_keeps_its_guidance(tmp_path) -> None:
    ours = tiny()
    folder = ours.save(tmp_path / "model")
    theirs = sf.load(folder)
    assert theirs.guidance == "apg(scale=3)" and torch.equal(theirs.generate(["noto"]), ours.generate(["noto"]))
    ours.guidance = "agp(scale=3)"
    ours.save(folder)
    with pytest.raises(UnknownName, match="did you mean 'apg'"):
        sf.load(folder)


def test_a_worse_model_by_name(tmp_path) -> None:
    ours, early = tiny(), tiny()
    for parameter in early.denoiser.parameters():
        parameter.data = (parameter.data * 0.9).half().float()
    folder = early.save(tmp_path / "early")
    named = ours.generate(["noto"], guidance=f"autoguidance(scale=2, worse={str(folder)!r})")
    given = ours.generate(["noto"], guidance=sf.guidance.autoguidance(2, worse=early.denoiser))
    assert torch.equal(named, given) and not torch.equal(named, ours.generate(["noto"], guidance=1.0))
    skipped = ours.generate(["noto"], guidance="autoguidance(scale=2, skip=('level.deep',))")
    assert not torch.equal(skipped, given)


def test_negative_prompts_of_a_pipeline() -> None:
    p = tiny(3.0)
    ours = p.generate(["noto"] * 3, negative="fluent", batch=2)
    assert torch.equal(ours, p.generate(["noto"] * 3, guidance=sf.guidance.cfg(3.0, null={"vendor": 2})))
    assert not torch.equal(ours, p.generate(["noto"] * 3))
    one = p.generate(["noto"], negative=["fluent", "twemoji"], guidance="perp-neg(scale=3)")
    assert not torch.equal(one, ours[:1])
    with pytest.raises(InputError, match="guidance leads away from a negative prompt"):
        p.generate(["noto"], negative="fluent", guidance=1.0)
    with pytest.raises(InputError, match="cfg takes one"):
        p.generate(["noto"], negative=["fluent", "twemoji"])


def test_regions_of_a_pipeline() -> None:
    p = tiny(3.0)
    whole = p.generate(["noto"], regions=[((0, 0, 1, 1), "fluent")], guidance="cfg(scale=3) | regional(background=0.0)")
    assert (whole.int() - p.generate(["fluent"]).int()).abs().max() <= 1
    boxed = p.generate(["noto"] * 3, regions=[((0, 0, 0.5, 1), "fluent")], batch=2)
    mask = torch.zeros(8, 8)
    mask[:, :4] = 1
    assert torch.equal(boxed, p.generate(["noto"] * 3, regions=[(mask, "fluent")]))
    assert not torch.equal(boxed, p.generate(["noto"] * 3))


def test_what_the_command_line_says() -> None:
    assert scale_or_spec("3") == 3.0 and scale_or_spec(None) is None and scale_or_spec("apg(scale=4)") == "apg(scale=4)"
    assert _region("0, 0,0.5,1: red heart: big") == [[0, 0, 0.5, 1], "red heart: big"]
    for wrong in ("red heart", "0,0,1:x", "0,0,1,1:", "a,b,c,d:x"):
        with pytest.raises(InputError, match="a region is written"):
            _region(wrong)


def test_the_command_reaches_the_sampler(tmp_path, monkeypatch) -> None:
    """Card, picture and replay hold the guidance, the negative prompt and the regions."""
    from sfumato.cli.sample import described, generated

    folder = tiny().save(tmp_path / "model")
    card = described(
        str(folder), ["noto"], 1, {"solver": None, "grid": None, "steps": None, "guidance": "apg(scale=2)"}, 0, {}
    )
    card |= {"negative": ["fluent"], "regions": [[[0.0, 0.0, 0.5, 1.0], "twemoji"]]}
    images = generated(sf.load(folder), card)
    assert torch.equal(
        images,
        sf.load(folder).generate(
            ["noto"], guidance="apg(scale=2)", negative="fluent", regions=[((0, 0, 0.5, 1), "twemoji")]
        ),
    )
