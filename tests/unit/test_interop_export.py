"""Models leave sfumato whole: the same bits in diffusers and safetensors, the same numbers in ONNX, samplers for ComfyUI."""

from __future__ import annotations

import importlib.util
import inspect
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


class KSAMPLER:
    """ComfyUI's, as far as a sampler meets it: see the test of the pack."""

    def __init__(self, sampler_function, extra_options={}, inpaint_options={}):  # noqa: B006 (its own signature)
        self.sampler_function, self.extra_options = sampler_function, extra_options

    def sample(self, guider, sigmas, extra_args, callback, noise, latent_image, denoise_mask=None, disable_pbar=False):
        extra_args["denoise_mask"] = denoise_mask

        def denoised(x, sigma, denoise_mask, model_options={}, seed=None):  # noqa: B006
            assert sigma.shape == x.shape[:1]
            return guider(x, sigma, model_options=model_options, seed=seed)

        def told(news):
            callback(news["i"], news["denoised"], news["x"], len(sigmas) - 1)

        sampling = guider.patcher.get_model_object("model_sampling")
        start = sampling.noise_scaling(sigmas[0], noise, latent_image)
        found = self.sampler_function(
            denoised, start, sigmas, extra_args=extra_args, callback=told, disable=disable_pbar, **self.extra_options
        )
        return sampling.inverse_noise_scaling(sigmas[-1], found)


class CONST:
    """A flow's model_sampling; ComfyUI mixes this class with one that holds the sigmas."""

    def noise_scaling(self, sigma, noise, latent_image):
        return sigma * noise + (1.0 - sigma) * latent_image

    def inverse_noise_scaling(self, sigma, latent):
        return latent / (1.0 - sigma)


class ModelSampling(CONST):
    sigma_min, sigma_max = torch.tensor(0.001), torch.tensor(1.0)


class Patcher:
    """A MODEL."""

    def __init__(self, sampling):
        self.sampling, self.options = sampling, {}

    def get_model_object(self, name):
        return {"model_sampling": self.sampling}[name]

    def clone(self):
        return Patcher(self.sampling)

    def set_model_sampler_cfg_function(self, sampler_cfg_function, disable_cfg1_optimization=False):
        assert (
            len(inspect.signature(sampler_cfg_function).parameters) != 3
        )  # three are the old way: cond, uncond, scale
        self.options["sampler_cfg_function"] = sampler_cfg_function
        self.options["disable_cfg1_optimization"] = disable_cfg1_optimization


class Guider:
    """A model whose pictures are constants: ``positive`` and, where there is such a prompt, ``negative``."""

    def __init__(self, patcher, positive, negative, scale):
        self.patcher, self.positive, self.negative, self.scale = patcher, positive, negative, scale

    def __call__(self, x, sigma, model_options=None, seed=None):
        options = self.patcher.options
        without = self.negative is None or (self.scale == 1 and not options.get("disable_cfg1_optimization", False))
        cond = torch.full_like(x, self.positive)
        uncond = torch.zeros_like(x) if without else torch.full_like(x, self.negative)
        if "sampler_cfg_function" not in options:
            return uncond + (cond - uncond) * self.scale
        inner = types.SimpleNamespace(model_sampling=self.patcher.sampling)
        given = {
            "cond": x - cond, "uncond": x - uncond, "cond_scale": self.scale, "timestep": sigma, "input": x, "sigma": sigma,
            "cond_denoised": cond, "uncond_denoised": uncond, "model": inner, "model_options": options, "input_cond": [],
            "input_uncond": None if without else [],
        }  # fmt: skip
        return x - options["sampler_cfg_function"](given)


@pytest.fixture
def pack(tmp_path, monkeypatch):
    """The pack, loaded as ComfyUI loads a folder of custom_nodes: under the name of its path, from its __init__.py."""
    monkeypatch.setitem(sys.modules, "comfy", types.ModuleType("comfy"))
    monkeypatch.setitem(sys.modules, "comfy.samplers", types.SimpleNamespace(KSAMPLER=KSAMPLER))
    folder = tmp_path / "sfumato_nodes"
    export(None, "comfyui", folder)
    name = str(folder).replace(".", "_x_")
    spec = importlib.util.spec_from_file_location(name, str(folder / "__init__.py"))
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


def test_the_comfyui_pack_works_where_it_is_copied(pack):
    """Against stand-ins of what ComfyUI does, read in its public sources (Comfy-Org/ComfyUI: nodes.py at 02217e36,
    comfy/samplers.py at 311c0140, comfy/model_sampling.py at 2fd20839, comfy_extras/nodes_custom_sampler.py at 4be318aa, and
    comfy/model_patcher.py):

    - a folder of custom_nodes is imported from its __init__.py under a name made of its path; NODE_CLASS_MAPPINGS and
      NODE_DISPLAY_NAME_MAPPINGS are still read; INPUT_TYPES, FUNCTION, RETURN_TYPES and CATEGORY are the first interface's
    - KSAMPLER(sampler_function, extra_options, inpaint_options) calls sampler_function(model, x, sigmas, extra_args=,
      callback=, disable=, **extra_options), x scaled by model_sampling; the model wants denoise_mask, model_options and seed,
      which is what extra_args holds; the callback reads i, denoised and x; seeds go up to 2^64 - 1
    - SIGMAS is a float tensor (steps + 1,) on the CPU, and with denoise < 1 the last steps + 1 of int(steps / denoise);
      SplitSigmas can leave one sigma only, which must leave x alone; FlipSigmas puts 0.0001 in the place of the first 0
    - get_model_object("model_sampling") has sigma_min and sigma_max, and CONST among its classes where it is a flow
    - set_model_sampler_cfg_function(function, disable_cfg1_optimization): the function gets one mapping with input, sigma (B,),
      cond_denoised, uncond_denoised, input_uncond and model, and gives x minus the guided picture. Without the flag, at a
      scale of 1, and where there is no negative prompt, uncond_denoised is zeros
    """
    assert set(pack.NODE_CLASS_MAPPINGS) == set(pack.NODE_DISPLAY_NAME_MAPPINGS)
    for node in pack.NODE_CLASS_MAPPINGS.values():
        assert hasattr(node, node.FUNCTION) and "model" in node.INPUT_TYPES()["required"]
        assert isinstance(node.RETURN_TYPES, tuple) and isinstance(node.CATEGORY, str)
        names = [*node.INPUT_TYPES()["required"], *node.INPUT_TYPES().get("optional", {})]
        assert names == list(inspect.signature(getattr(node, node.FUNCTION)).parameters)[1:]
    model, made, seen = Patcher(ModelSampling()), {k: v() for k, v in pack.NODE_CLASS_MAPPINGS.items()}, []
    (sampler,) = made["SfumatoSampler"].make(model, "dpm-solver++", "order=3")
    (sigmas,) = made["SfumatoSigmas"].make(model, "uniform", 5, 0.5)
    assert len(sigmas) == 6 and sigmas[0] == pytest.approx(0.5) and sigmas.device.type == "cpu"
    noise, latent = torch.randn(2, 1, 4, 4, 4, generator=torch.Generator().manual_seed(0))

    def run(guider, sigmas, seed=2**64 - 1):
        given = {"model_options": {}, "seed": seed}
        return sampler.sample(guider, sigmas, given, lambda *news: seen.append(news), noise, latent)

    found = run(Guider(model, 0.25, -1.0, 1.0), sigmas)
    assert torch.allclose(found, torch.full_like(found, 0.25), atol=1e-6)
    assert [news[0] for news in seen] == list(range(5)) and seen[0][3] == 5 and seen[0][1].shape == noise.shape
    assert torch.allclose(run(Guider(model, 0.25, -1.0, 1.0), sigmas[:1]), (0.5 * noise + 0.5 * latent) / 0.5)

    (patched,) = made["SfumatoGuidance"].make(model, 3.0)
    assert patched is not model and not model.options
    for scale in (1.0, 8.0):  # its own scale does not count
        found = run(Guider(patched, 0.25, -1.0, scale), sigmas)
        assert torch.allclose(found, torch.full_like(found, -1.0 + 3.0 * 1.25), atol=1e-5)
    with pytest.raises(InputError, match="no negative prompt"):
        run(Guider(patched, 0.25, None, 1.0), sigmas)


def test_the_comfyui_pack_inverts_and_draws_again(pack):
    """FlipSigmas: up from 0.0001, then down, give the latent back when the model's pictures are linear in x."""
    model = Patcher(types.SimpleNamespace(sigma_min=torch.tensor(0.03), sigma_max=torch.tensor(14.6)))
    made = {k: v() for k, v in pack.NODE_CLASS_MAPPINGS.items()}
    (sampler,) = made["SfumatoSampler"].make(model, "ddim")
    (sigmas,) = made["SfumatoSigmas"].make(model, "karras", 400)
    rising = sigmas.flip(0)
    rising[0] = 0.0001

    def gaussian(x, sigma, **_):  # data of std 0.5
        return x * 0.25 / (0.25 + sigma.view(-1, 1, 1, 1) ** 2)

    x = 0.5 * torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    up = sampler.sampler_function(gaussian, x, rising, extra_args={"seed": 1})
    assert up.std() > 10
    assert torch.allclose(sampler.sampler_function(gaussian, up, sigmas, extra_args={"seed": 1}), x, atol=0.05)
