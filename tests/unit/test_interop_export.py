"""Models leave sfumato whole: the same bits in diffusers and safetensors, the same numbers in ONNX, samplers for ComfyUI."""

from __future__ import annotations

import importlib.util
import json
import sys
import types

import pytest
import torch

import sfumato as sf
from sfumato import networks, processes
from sfumato.codecs import KL
from sfumato.conditioners import Classes
from sfumato.core import Context, InputError, MissingExtra
from sfumato.denoisers import parametrized
from sfumato.guidance import cfg
from sfumato.interop import export, k_sampler
from sfumato.interop.kdiffusion import k_guidance, k_sigmas
from sfumato.networks.autoencoder import AutoencoderKL
from sfumato.pipeline import Pipeline

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning:diffusers.*"),
    pytest.mark.filterwarnings("ignore::UserWarning:(diffusers|transformers).*"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
diffusers = pytest.mark.skipif(
    importlib.util.find_spec("diffusers") is None, reason="needs the extra: pip install 'sfumato[diffusers]'"
)


def small() -> Pipeline:
    """A class-conditional latent model of a few thousand random weights."""
    torch.manual_seed(0)
    config = {"channels": 2, "width": 8, "multipliers": [1, 2], "attention": [False, False], "embeddings": {"y": 2}}
    net = networks.build("unet", config).eval()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    codec = KL(AutoencoderKL(channels=3, latent=2, factor=2, width=8, blocks=1)).eval()
    denoiser = parametrized(net, processes.Flow(), "flow", null={"y": 2})
    return Pipeline(denoiser, codec, Classes({"y": ["left", "right"]}), size=(16, 16), steps=4, guidance=2.0)


@diffusers
@pytest.mark.parametrize("solver", ["dpm-solver++", "heun", "unipc(order=2)"])
def test_a_model_of_ours_is_the_same_to_the_bit_in_diffusers(solver, tmp_path):
    from sfumato.interop import SfumatoPipeline, to_diffusers

    for pipeline, prompts in ((small(), ["left", "right"]), (sf.load("digits"), ["three", "eight"])):
        pipeline.solver = solver
        expected = pipeline.generate(prompts, seed=3, steps=4)
        to_diffusers(pipeline, tmp_path)
        loaded = SfumatoPipeline.from_pretrained(tmp_path)
        loaded.set_progress_bar_config(disable=True)
        assert torch.equal(loaded(prompts, seed=3, num_inference_steps=4, output_type="uint8").images, expected)
        back = sf.from_diffusers(tmp_path)
        assert torch.equal(back.generate(prompts, seed=3, steps=4), expected)
        assert back.description() == json.loads(json.dumps(pipeline.description()))
    shown = loaded(prompts, generator=torch.Generator().manual_seed(0), num_inference_steps=2).images
    assert [picture.size for picture in shown] == [(8, 8), (8, 8)]
    with pytest.raises(InputError, match="pil, pt"):
        loaded(batch_size=1, num_inference_steps=1, output_type="jpg")


def test_safetensors_keep_every_bit(tmp_path):
    pipeline = small()
    record = export(pipeline, "safetensors", tmp_path / "out")
    assert set(record["files"]) == {"model.safetensors", "pipeline.json"}
    prompts = ["left", "right"]
    assert torch.equal(sf.load(tmp_path / "out").generate(prompts, seed=1), pipeline.generate(prompts, seed=1))


def test_onnx_says_the_same(tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason="needs the extra: pip install 'sfumato[onnx]'")
    pipeline = small()
    record = export(pipeline, "onnx", tmp_path)
    assert set(record["files"]) == {"denoiser.onnx", "decoder.onnx", "encoder.onnx"}
    assert set(record["difference"]) == set(record["batch"]) == {"denoiser", "decoder", "encoder"}
    assert max(record["difference"].values()) < 1e-5
    assert record["conditions"] == ["y"] and record["predicts"] == "flow"
    json.dumps(record)


def test_export_refuses_clearly(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="diffusers, safetensors, onnx, comfyui"):
        export(small(), "tflite", tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        export(small(), "safetensors", tmp_path / "file")
    with pytest.raises(InputError, match="name the model"):
        export(None, "onnx", tmp_path)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(MissingExtra, match=r"sfumato\[onnx\]"):
        export(small(), "onnx", tmp_path)


def test_the_command(tmp_path, capsys):
    import sfumato.cli.export  # noqa: F401 (registers it)
    from sfumato.cli import app

    def run(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            app(["export", *words])
        out, err = capsys.readouterr()
        return left.value.code or 0, out, err

    status, out, _ = run("digits", "--to", "safetensors", "--out", str(tmp_path / "d"), "--json")
    assert status == 0 and json.loads(out)["files"]["model.safetensors"] > 1000
    assert sf.load(tmp_path / "d").generate(1, steps=2).shape == (1, 1, 8, 8)
    assert run("--to", "comfyui", "--out", str(tmp_path / "nodes"))[0] == 0
    for words, message in (
        (("digits", "--to", "tflite", "--out", str(tmp_path)), "diffusers, safetensors, onnx, comfyui"),
        (("nothing", "--to", "onnx", "--out", str(tmp_path)), "no model 'nothing'"),
        (("--to", "onnx", "--out", str(tmp_path)), "name the model"),
    ):
        status, out, err = run(*words)
        assert status == 2 and not out and message in err and len(err.splitlines()) == 1


def test_without_the_extra_the_error_names_it(monkeypatch):
    from sfumato.interop._needs import need

    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(MissingExtra, match=r"pip install 'sfumato\[diffusers\]'"):
        need("diffusers")


# ----------------------------------------------------------------------------------------------------- k-diffusion, ComfyUI


@pytest.mark.parametrize("solver", ["ddim", "heun", "dpm-solver++", "ddpm"])
@pytest.mark.parametrize("flow", [False, True])
def test_a_solver_as_a_k_diffusion_sampler(solver, flow):
    """On an exact mixture: the sampler's sigmas are our times, its model is our oracle."""
    process = processes.Flow() if flow else processes.EDM(0.002, 20.0)
    oracle = sf.oracles.GaussianMixture([[-1.0, 0.5], [1.0, 0.0]], [0.3, 0.2])
    denoiser, seen = oracle.denoiser(process), []
    start = torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * process.coef(1.0).sigma
    grid = sf.grids.get("uniform" if flow else "karras")
    sigmas = torch.tensor([process.coef(t).sigma for t in grid(process, 8, 1.0, 0.0).tolist()], dtype=torch.float64)

    def model(x, sigma, **extra):
        t = float(sigma[0]) if flow else (float(sigma[0]) / 20.0) ** (1 / 7)
        return denoiser(x, min(t, 1.0), Context(batch=len(x))).mean

    found = k_sampler(solver, flow=flow)(model, start, sigmas, {"seed": 4}, callback=seen.append)
    expected = sf.sample(denoiser, solver=solver, grid=grid, steps=8, x=start, seed=4)
    assert torch.allclose(found, expected, atol=1e-9)
    assert [step["i"] for step in seen] == list(range(8))
    with pytest.raises(InputError, match="strictly"):
        k_sampler(solver)(model, start, torch.tensor([1.0, 2.0, 0.5]))


def test_sigmas_of_a_grid_fall_from_the_models_highest():
    sigmas = k_sigmas("karras", 10, 0.03, 14.6)
    assert (
        len(sigmas) == 11 and sigmas[0] == pytest.approx(14.6) and sigmas[-1] == 0 and sigmas[-2] == pytest.approx(0.03)
    )
    assert (sigmas.diff() < 0).all()


def test_guidance_for_comfyui_is_ours():
    generator = torch.Generator().manual_seed(0)
    x, one, two = torch.randn(3, 2, 4, 4, 4, generator=generator)
    model = types.SimpleNamespace(model_sampling=types.SimpleNamespace(sigma_max=14.6))
    given = {
        "input": x,
        "sigma": torch.tensor([2.0, 2.0]),
        "cond_denoised": one,
        "uncond_denoised": two,
        "model": model,
    }
    assert torch.allclose(x - k_guidance(cfg(3.0, batched=False))(given), two + 3.0 * (one - two), atol=1e-5)
    off = cfg(3.0, interval=(0.0, 0.1), batched=False)
    assert torch.allclose(x - k_guidance(off)(given), one, atol=1e-6)


def test_the_comfyui_pack_works_where_it_is_copied(tmp_path, monkeypatch):
    class KSAMPLER:
        def __init__(self, function):
            self.sampler_function = function

    class CONST:
        sigma_min, sigma_max = 0.001, 1.0

    class Model:
        def __init__(self, sampling):
            self.sampling, self.guidance = sampling, None

        def get_model_object(self, name):
            return self.sampling

        def clone(self):
            return Model(self.sampling)

        def set_model_sampler_cfg_function(self, function):
            self.guidance = function

    monkeypatch.setitem(sys.modules, "comfy", types.ModuleType("comfy"))
    monkeypatch.setitem(sys.modules, "comfy.samplers", types.SimpleNamespace(KSAMPLER=KSAMPLER))
    export(None, "comfyui", tmp_path / "sfumato_nodes")
    where = tmp_path / "sfumato_nodes" / "__init__.py"
    spec = importlib.util.spec_from_file_location(
        "sfumato_nodes", where, submodule_search_locations=[str(where.parent)]
    )
    pack = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "sfumato_nodes", pack)
    spec.loader.exec_module(pack)
    assert set(pack.NODE_CLASS_MAPPINGS) == set(pack.NODE_DISPLAY_NAME_MAPPINGS)
    for node in pack.NODE_CLASS_MAPPINGS.values():
        assert hasattr(node, node.FUNCTION) and "model" in node.INPUT_TYPES()["required"]
    model = Model(CONST())
    (sampler,) = pack.NODE_CLASS_MAPPINGS["SfumatoSampler"]().make(model, "dpm-solver++", "order=3")
    (sigmas,) = pack.NODE_CLASS_MAPPINGS["SfumatoSigmas"]().make(model, "uniform", 5, 0.5)
    assert len(sigmas) == 6 and sigmas[0] == pytest.approx(0.5)
    found = sampler.sampler_function(lambda x, sigma: torch.zeros_like(x), torch.ones(1, 2), sigmas)
    assert torch.allclose(found, torch.zeros(1, 2), atol=1e-6)
    (patched,) = pack.NODE_CLASS_MAPPINGS["SfumatoGuidance"]().make(model, 3.0)
    assert patched is not model and callable(patched.guidance)
