"""Pipelines: what is saved is what is loaded, images depend on their seed only, bad folders say what is wrong."""

from __future__ import annotations

import json

import pytest
import torch

import sfumato as sf
from sfumato import codecs, conditioners, networks, pipeline, processes
from sfumato.core import InputError
from sfumato.denoisers import parametrized

VENDORS = ["noto", "twemoji"]


def tiny(process=None, predicts: str = "v", codec=None) -> pipeline.Pipeline:
    torch.manual_seed(0)
    channels = 3 if codec is None else codec.autoencoder.latent
    net = networks.UNet(channels, width=8, multipliers=(1, 2), blocks=1, attention=False, embeddings={"vendor": 2})
    for parameter in net.parameters():  # the networks begin at zero output; half precision must lose nothing here
        parameter.data = (parameter.data + 0.05 * torch.randn_like(parameter)).half().float()
    return pipeline.Pipeline(
        parametrized(net.eval(), process or processes.Cosine(), predicts, null={"vendor": 2}),
        codec or codecs.Identity(),
        conditioners.Classes({"vendor": VENDORS}),
        (8, 8) if codec is None else (16, 16),
        steps=3,
        guidance=2.0,
        card={"made by": "a test"},
    )


@pytest.mark.parametrize(
    "process", [processes.VP(), processes.EDM(), processes.Flow(shift=2.0), processes.DDPM("cosine", 50)], ids=str
)
def test_a_saved_pipeline_loads_as_the_same_function(tmp_path, process):
    ours = tiny(process)
    theirs = sf.load(ours.save(tmp_path / "model"))
    assert json.dumps(theirs.description()) == json.dumps(ours.description())
    for t in (0.0, 0.3, 1.0):
        assert theirs.process.coef(t) == ours.process.coef(t)
    a, b = (p.generate(["noto", "twemoji"], seed=5) for p in (ours, theirs))
    assert torch.equal(a, b)


def test_a_latent_pipeline_keeps_its_codec_and_scale(tmp_path):
    torch.manual_seed(1)
    codec = codecs.KL(networks.AutoencoderKL(latent=2, factor=4, width=8)).fit_scale(torch.randn(8, 3, 16, 16))
    for tensor in (*codec.parameters(), *codec.buffers()):
        tensor.data = tensor.data.half().float()
    ours = tiny(codec=codec.eval())
    theirs = sf.load(ours.save(tmp_path))
    assert torch.equal(ours.generate(2), theirs.generate(2))
    assert ours.generate(1).shape == (1, 3, 16, 16)


def test_an_image_depends_on_its_seed_and_not_on_its_batch():
    p = tiny()
    many = p.generate(["noto"] * 5, seed=3, solver="ddpm")
    assert torch.equal(many, p.generate(["noto"] * 5, seed=3, solver="ddpm", batch=2))
    assert torch.equal(many[:2], p.generate(["noto"] * 2, seed=3, solver="ddpm"))
    assert not torch.equal(many[0], many[1])
    chosen = p.generate(["noto"] * 2, seed=[11, 12], solver="ddpm")
    assert torch.equal(chosen[1:], p.generate(["noto"], seed=[12], solver="ddpm"))


def test_conditions_and_guidance_reach_the_network():
    p = tiny()
    assert not torch.equal(p.generate(["noto"]), p.generate(["twemoji"]))
    assert not torch.equal(p.generate(["noto"]), p.generate(["noto"], guidance=1.0))
    assert torch.equal(p.generate(1, guidance=1.0), p.generate(1, guidance=1.0, cond={"vendor": None}))


def test_progress_tells_every_step():
    seen = []
    tiny().generate(3, steps=2, batch=2, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(0, 4), (1, 4), (2, 4), (2, 4), (3, 4), (4, 4)]


def test_inverting_and_sampling_again_gives_the_image_back():
    p = tiny(processes.VP(), "eps")
    for (
        parameter
    ) in p.denoiser.net.output.parameters():  # eps = 0: both ways are exact scalings, the plumbing is tested
        parameter.data.zero_()
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    up = p.invert(images, ["noto", "twemoji"], steps=5)
    assert up.t == 1.0 and up.index == 0
    assert torch.allclose(up.x, codecs.to_float(images) * p.process.coef(1.0).alpha, atol=1e-6)
    back = sf.sample(p.denoiser, solver="ddim", steps=5, x=up, cond=p.conditions(2, ["noto", "twemoji"]))
    assert torch.equal(codecs.to_uint8(back), images)


@pytest.mark.parametrize("damage", ["truncate", "remove", "json", "format", "foreign"])
def test_a_damaged_folder_is_one_clear_error(tmp_path, damage):
    folder = tiny().save(tmp_path / "m")
    weights, description = folder / "model.safetensors", folder / "pipeline.json"
    if damage == "truncate":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif damage == "remove":
        weights.unlink()
    elif damage == "json":
        description.write_text("{")
    elif damage == "format":
        description.write_text(json.dumps(json.loads(description.read_text()) | {"format": 99}))
    else:
        other = json.loads(description.read_text())
        other["network"]["config"]["width"] = 16
        description.write_text(json.dumps(other))
    with pytest.raises(InputError, match="damaged|format|does not fit|missing"):
        sf.load(folder)


def test_wrong_requests_say_what_is_allowed(tmp_path):
    p = tiny()
    with pytest.raises(FileNotFoundError, match="no model 'nothing'"):
        sf.load("nothing")
    with pytest.raises(InputError, match="one of noto, twemoji"):
        p.generate(["apple"])
    with pytest.raises(InputError, match="at least one"):
        p.generate(0)
    with pytest.raises(InputError, match="2 seeds"):
        p.generate(3, seed=[1, 2])
    with pytest.raises(InputError, match="reads no"):
        p.generate(1, cond={"style": "noto"})
    p.solver = sf.solvers.get("ddim")
    with pytest.raises(InputError, match="as a spec"):
        p.save(tmp_path)


def test_a_prompt_without_words_is_the_null_condition():
    text = conditioners.Text(4, {"vendor": VENDORS}, table="emoji-captions.safetensors")
    cond = text(2, ["red heart", " "], vendor=["noto", None])
    assert cond["vendor"].tolist() == [0, 2]
    assert cond["text_mask"].any(1).tolist() == [True, False]
    assert cond["vector"][1].abs().sum() == 0
    assert cond["vector"][0].square().mean() == pytest.approx(1.0, abs=0.01)
    with pytest.raises(InputError, match="prompts for 3 images"):
        text(3, ["one", "two"])


def test_models_of_the_package_beside_are_found_by_name(tmp_path, monkeypatch):
    package = tmp_path / "sfumato_zoo"
    tiny().save(package / "models" / "study" / "one")
    (package / "__init__.py").write_text("")
    with pytest.raises(FileNotFoundError, match="digits"):
        sf.load("study/one")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "study/one" in pipeline.bundled() and "digits" in pipeline.bundled()
    assert sf.load("study/one").card == {"made by": "a test"}


def test_a_folder_of_diffusers_is_recognised(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="sf.from_diffusers"):
        sf.load(tmp_path)


def test_a_model_that_the_wheel_leaves_out_says_where_it_is(monkeypatch):
    monkeypatch.setattr(pipeline, "bundled_models", lambda description: {})
    with pytest.raises(FileNotFoundError, match="sfumato-zoo"):
        sf.load("medical")


def test_further_prompts_join_as_their_guidance_says():
    p = tiny()
    one = p.generate(["noto"], seed=1)
    assert torch.equal(p.generate(["noto"], also="noto", seed=1), one)  # the same prompt twice is that prompt
    averaged = p.generate(["noto"], also=["twemoji"], seed=1)
    assert torch.equal(averaged, p.generate(["noto"], also=["twemoji"], guidance="cfg(scale=2) | composed", seed=1))
    assert torch.equal(averaged, p.generate(["twemoji"], also=["noto"], seed=1)) and not torch.equal(averaged, one)
    switched = p.generate(["noto"], also=["twemoji"], guidance="cfg(scale=2) | switched(at=1.0)", seed=1)
    assert torch.equal(switched, one)
    with pytest.raises(InputError, match="superposition reads the noise"):
        p.generate(["noto"], also=["twemoji"], guidance="superposition", seed=1)
    half = p.generate(
        ["noto"],
        also=["twemoji"],
        regions=[((0, 0, 1, 1), "twemoji")],
        guidance="cfg(scale=2) | regional(background=0)",
    )
    assert half.shape == one.shape


def test_a_sampler_card_keeps_the_spec_of_a_guidance():
    p = tiny()
    card = sf.tune(p, 2, "untuned", guidance="apg(scale=2)", items=2, unseen=2, fine=6, prompts=["noto"])
    assert card.guidance == "apg(scale=2)"
    p.generate(["noto"], sampler=card, guidance="apg( scale=2 )")
    with pytest.raises(InputError, match="tuned at guidance apg"):
        p.generate(["noto"], sampler=card, guidance="apg(scale=3)")
    with pytest.raises(InputError, match="tuned at guidance apg"):
        p.generate(["noto"], sampler=card, guidance=2.0)


def test_an_acceleration_goes_inside_guidance_and_beside_a_sampler_card() -> None:
    pipe = sf.load("digits")
    plain = pipe.generate(["three", "five"], steps=4, guidance=2.0)
    assert torch.equal(
        pipe.generate(["three", "five"], steps=4, guidance=2.0, accelerate="deepcache(interval=1)"), plain
    )
    faster = pipe.generate(["three", "five"], steps=4, guidance=2.0, accelerate="deepcache(interval=2)")
    assert not torch.equal(faster, plain)
    assert torch.equal(
        pipe.accelerated("deepcache(interval=2)").generate(["three", "five"], steps=4, guidance=2.0), faster
    )
    card = sf.tune(pipe, 3, "untuned", guidance=2.0, items=2, unseen=2, fine=8, budget=2)
    tuned = pipe.generate(["three"], sampler=card, accelerate="deepcache")
    assert torch.equal(tuned, pipe.accelerated("deepcache").generate(["three"], sampler=card))
    with pytest.raises(InputError, match="not kept"):
        pipe.accelerated("deepcache").save("nowhere")
    for spec in ("int8(items=2, steps=2)", "quantized(items=2, steps=2)"):
        with pytest.raises(InputError, match="quantised or pruned"):
            pipe.accelerated(spec).save("nowhere")
    with pytest.raises(InputError, match="not 3"):
        pipe.generate(1, accelerate=3)  # type: ignore[arg-type]
    with pytest.raises(sf.core.SfumatoError, match="deepcache"):
        pipe.generate(1, accelerate="magic")


def test_a_network_that_its_configuration_no_longer_describes_is_not_saved(tmp_path) -> None:
    pipe = sf.load("digits")
    pipe.save(tmp_path / "whole")
    layer = next(m for m in pipe.denoiser.net.modules() if isinstance(m, torch.nn.Linear))
    layer.weight = torch.nn.Parameter(layer.weight[:-1])
    with pytest.raises(InputError, match="no longer"):
        pipe.save(tmp_path / "cut")
    assert not (tmp_path / "cut").exists()


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1), (torch.float16, 4), (torch.bfloat16, 24)], ids=str)
def test_a_moved_pipeline_draws_edits_and_inverts_in_its_own_precision(dtype, bound):
    torch.manual_seed(1)
    codec = codecs.KL(networks.AutoencoderKL(latent=2, factor=4, width=8)).fit_scale(torch.randn(8, 3, 16, 16)).eval()
    for made in (tiny, lambda: tiny(codec=codec)):
        ours = made()
        options = {"seed": 3, "negative": "", "cond": {"vendor": ["noto", "twemoji"]}}
        before = ours.generate(2, **options).int()
        moved = ours.to(dtype)
        assert moved is ours and {p.dtype for p in ours.denoiser.parameters()} == {dtype}
        after = moved.generate(2, **options)
        assert (after.int() - before).abs().max() <= bound
        assert moved.invert(after, steps=2).x.dtype == dtype
        ours.to(torch.float32)


def test_what_cannot_be_drawn_is_refused_and_not_replaced_by_a_default():
    for wrong, says in (
        ({"steps": 0}, "steps = 0"),
        ({"guidance": float("nan")}, "a finite scale"),
        ({"guidance": float("inf")}, "a finite scale"),
    ):
        with pytest.raises(InputError, match=says):
            tiny().generate(1, **wrong)
    with pytest.raises(InputError, match="prompts = None: a text"):
        tiny().generate(None)


def test_a_network_of_ones_own_is_drawn_with_and_says_why_it_is_not_kept(tmp_path):
    class Net(torch.nn.Conv2d):
        def forward(self, x, label):
            return super().forward(x)

    ours = pipeline.Pipeline(parametrized(Net(3, 3, 1), processes.Flow(), "flow"), codecs.Identity(), size=(8, 8))
    assert ours.generate(1, steps=2).shape == (1, 3, 8, 8)
    with pytest.raises(InputError, match="a Net cannot be made again from a name"):
        ours.save(tmp_path)
