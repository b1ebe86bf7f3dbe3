"""Every class of diffusers pipeline that is carried gives diffusers' own pictures: same weights, noise, schedule and steps.

Built at a few pixels with random weights, saved and loaded as a user does; nothing is downloaded.
"""

from __future__ import annotations

import threading

import pytest
import torch

pytest.importorskip("diffusers", reason="needs the extra: pip install 'sfumato[diffusers]'")
pytest.importorskip("transformers", reason="needs the extra: pip install 'sfumato[diffusers]'")
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning:diffusers.*"),
    pytest.mark.filterwarnings("ignore::UserWarning:(diffusers|transformers|peft).*"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

import diffusers  # noqa: E402

import sfumato as sf  # noqa: E402
from sfumato.core import Context, Streams  # noqa: E402
from sfumato.guidance import cfg  # noqa: E402
from sfumato.interop import tiny  # noqa: E402

PROMPTS = ["a red heart", "blue sky"]


def noise(pipeline, n: int = 2, seed: int = 0) -> torch.Tensor:
    """What ``generate(seed=)`` starts from, before it is scaled."""
    return Streams.of(seed, n).normal(torch.empty(n, *pipeline.codec.shape(*pipeline.size)))


def reloaded(kind: str, folder, scheduler=None, **options):
    """(our pipeline of the saved folder, the diffusers pipeline)."""
    pipe = tiny.pipeline(kind, scheduler, **options)
    pipe.save_pretrained(folder)
    ours = sf.from_diffusers(folder)
    ours.source.set_progress_bar_config(disable=True)
    return ours, pipe


def close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 3e-6) -> None:
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


def latents(ours, steps: int, prompts=PROMPTS, guidance=None, seed: int = 0, **raw) -> torch.Tensor:
    """The states that ``generate`` decodes."""
    cond = ours.conditions(
        len(prompts) if isinstance(prompts, list) else prompts, prompts if isinstance(prompts, list) else None, **raw
    )
    shape = (len(prompts) if isinstance(prompts, list) else prompts, *ours.codec.shape(*ours.size))
    return sf.sample(
        ours.guided(guidance), solver=ours.solver, grid=ours.grid, steps=steps, shape=shape, cond=cond, seed=seed
    )


# ---------------------------------------------------------------------------------------------------- classes of pipelines


@pytest.mark.parametrize("guidance", [1.0, 7.5])
@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3", "pixart"])
def test_text_to_image_equals_diffusers(kind, guidance, tmp_path):
    ours, pipe = reloaded(kind, tmp_path)
    options = {"use_resolution_binning": False} if kind == "pixart" else {}
    theirs = pipe(
        PROMPTS,
        latents=noise(ours),
        num_inference_steps=6,
        guidance_scale=guidance,
        output_type="latent",
        height=16,
        width=16,
        **options,
    ).images
    close(latents(ours, 6, guidance=guidance), theirs)
    shown = pipe(
        PROMPTS,
        latents=noise(ours),
        num_inference_steps=6,
        guidance_scale=guidance,
        output_type="pt",
        height=16,
        width=16,
        **options,
    ).images
    images = ours.generate(PROMPTS, steps=6, guidance=guidance, seed=0)
    assert images.dtype == torch.uint8
    assert (images - (shown * 255).round()).abs().max() <= 1


def test_flux_reads_its_guidance_and_shifts_its_schedule_with_the_size(tmp_path):
    ours, pipe = reloaded("flux", tmp_path)
    ours.source.default_sample_size = 8
    ours = sf.from_diffusers(ours.source)
    for side in (16, 32):
        start = Streams.of(0, 2).normal(torch.empty(2, *ours.codec.shape(side, side)))
        packed = pipe._pack_latents(start, *start.shape)
        theirs = pipe(
            PROMPTS,
            latents=packed,
            num_inference_steps=5,
            guidance_scale=2.5,
            output_type="pt",
            height=side,
            width=side,
        ).images
        images = ours.generate(PROMPTS, steps=5, cond={"guidance": 2.5}, size=(side, side))
        assert (images - (theirs * 255).round()).abs().max() <= 1
    assert ours.schedule((16, 16)).times(5) != ours.schedule((64, 64)).times(5)


def test_flux_with_true_guidance(tmp_path):
    ours, pipe = reloaded("flux", tmp_path, distilled=False)
    ours.source.default_sample_size = 8
    ours = sf.from_diffusers(ours.source)
    packed = pipe._pack_latents(noise(ours), 2, 4, 8, 8)
    theirs = pipe(
        PROMPTS, latents=packed, num_inference_steps=5, true_cfg_scale=3.0, negative_prompt=["dull", "dull"], output_type="latent",
        height=16, width=16,
    ).images  # fmt: skip
    found = latents(ours, 5, guidance=cfg(3.0, null=ours.conditioner.null("dull")))
    close(pipe._pack_latents(found, *found.shape), theirs)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_dit_equals_diffusers(guidance, tmp_path):
    ours, pipe = reloaded("dit", tmp_path)
    generator = torch.Generator().manual_seed(5)
    start = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    theirs = pipe([3, 7], guidance_scale=guidance, generator=generator, num_inference_steps=5, output_type="pt").images
    found = sf.sample(
        ours.guided(guidance),
        solver=ours.solver,
        grid=ours.grid,
        steps=5,
        x=start,
        cond=ours.conditions(2, label=[3, 7]),
    )
    assert (ours.codec.images(found) - (theirs * 255).round()).abs().max() <= 1


def test_a_vq_codec_and_its_unconditional_u_net(tmp_path):
    ours, pipe = reloaded("vq", tmp_path)
    theirs = torch.tensor(
        pipe(batch_size=2, generator=torch.Generator().manual_seed(5), num_inference_steps=5, output_type="np").images
    )
    start = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    found = sf.sample(ours.guided(), solver=ours.solver, grid=ours.grid, steps=5, x=start)
    assert (ours.codec.images(found) - (theirs.permute(0, 3, 1, 2) * 255).round()).abs().max() <= 1
    codes = ours.codec.encode(torch.rand(2, 3, 16, 16) * 2 - 1)
    assert codes.shape == (2, 3, 8, 8)


def test_pixels_through_ddpm_with_the_noise_of_diffusers(tmp_path):
    """DDPM clips x0 and draws noise: our kernel at eta = 1, given the draws of diffusers' generator."""
    ours, pipe = reloaded("pixels", tmp_path)
    theirs = pipe(batch_size=2, generator=torch.Generator().manual_seed(5), num_inference_steps=6, output_type="pt")
    draws = torch.Generator().manual_seed(5)
    start, recorded = (
        torch.randn(2, 3, 8, 8, generator=draws),
        [torch.randn(2, 3, 8, 8, generator=draws) for _ in range(5)],
    )
    recorded.append(torch.zeros(2, 3, 8, 8))
    ctx = Context(batch=2, source=lambda ctx, fresh: recorded[ctx.run.step])
    found = sf.sample(ours.guided(), solver=ours.solver, grid=ours.grid, steps=6, x=start, ctx=ctx)
    theirs = theirs.images if isinstance(theirs.images, torch.Tensor) else torch.tensor(theirs.images)
    close((found / 2 + 0.5).clamp(0, 1), theirs, 2e-4)  # x0 of the first step is amplified by 1 / alpha = 160


# ------------------------------------------------------------------------------------------------------------- conditions


def test_inpainting_u_nets_read_mask_and_masked_picture(tmp_path):
    ours, pipe = reloaded("inpaint", tmp_path)
    image, mask = torch.rand(1, 3, 16, 16) * 2 - 1, torch.zeros(1, 1, 16, 16)
    mask[..., 8:] = 1
    code = ours.codec.encode(image * (mask < 0.5))
    theirs = pipe(
        PROMPTS, image=image.expand(2, -1, -1, -1), mask_image=mask.expand(2, -1, -1, -1), masked_image_latents=code.expand(2, -1, -1, -1),
        height=16, width=16, latents=noise(ours), num_inference_steps=5, guidance_scale=4.0, output_type="latent", strength=1.0,
    ).images  # fmt: skip
    close(latents(ours, 5, guidance=4.0, image=image, mask=mask), theirs)
    with pytest.raises(ValueError, match="channels"):
        latents(ours, 5)


def test_controlnet(tmp_path):
    ours, pipe = reloaded("control", tmp_path)
    ours = sf.from_diffusers(ours.source, control_strength=0.7)
    control = torch.rand(2, 3, 16, 16)
    theirs = pipe(
        PROMPTS, image=control, latents=noise(ours), num_inference_steps=5, guidance_scale=4.0, output_type="latent", height=16, width=16,
        controlnet_conditioning_scale=0.7,
    ).images  # fmt: skip
    close(latents(ours, 5, guidance=4.0, control=control), theirs)
    assert not torch.allclose(latents(ours, 5, guidance=4.0, control=1 - control), theirs, atol=1e-3)


def adapter_weights(unet, width: int, dim: int) -> dict:
    """The state of an IP-Adapter of 4 tokens for this U-Net, at random."""
    projection = diffusers.models.embeddings.ImageProjection(
        cross_attention_dim=width, image_embed_dim=dim, num_image_text_embeds=4
    )
    image = {"proj.weight": projection.image_embeds.weight, "proj.bias": projection.image_embeds.bias}
    image |= {"norm.weight": projection.norm.weight, "norm.bias": projection.norm.bias}
    layers, key = {}, 1
    for name in unet.attn_processors:
        if not name.endswith("attn1.processor"):
            size = unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
            layers[f"{key}.to_k_ip.weight"], layers[f"{key}.to_v_ip.weight"] = torch.randn(2, size, width) * 0.3
            key += 2
    return {"image_proj": image, "ip_adapter": layers}


def test_ip_adapter():
    pipe = tiny.pipeline("sd")
    torch.manual_seed(1)
    pipe.unet._load_ip_adapter_weights([adapter_weights(pipe.unet, tiny.WIDTH, 12)], low_cpu_mem_usage=False)
    ours, embeds = sf.from_diffusers(pipe), torch.randn(1, 1, 12)
    both = torch.cat([torch.zeros_like(embeds), embeds])
    theirs = pipe(
        PROMPTS, ip_adapter_image_embeds=[both], latents=noise(ours), num_inference_steps=5, guidance_scale=4.0, output_type="latent",
        height=16, width=16,
    ).images  # fmt: skip
    close(latents(ours, 5, guidance=4.0, image_prompt=embeds), theirs)
    with pytest.raises(ValueError, match="image_prompt"):
        latents(ours, 5)


def test_several_ip_adapters_at_once():
    """Two adapters of one and of three pictures, at scales of their own."""
    pipe = tiny.pipeline("sd")
    torch.manual_seed(1)
    weights = [adapter_weights(pipe.unet, tiny.WIDTH, dim) for dim in (12, 20)]
    pipe.unet._load_ip_adapter_weights(weights, low_cpu_mem_usage=False)
    pipe.set_ip_adapter_scale([0.7, 0.4])
    ours, embeds = sf.from_diffusers(pipe), [torch.randn(1, 1, 12), torch.randn(1, 3, 20)]
    theirs = pipe(
        PROMPTS, ip_adapter_image_embeds=[torch.cat([torch.zeros_like(e), e]) for e in embeds], latents=noise(ours),
        num_inference_steps=5, guidance_scale=4.0, output_type="latent", height=16, width=16,
    ).images  # fmt: skip
    close(latents(ours, 5, guidance=4.0, image_prompt=embeds), theirs)
    assert not torch.allclose(latents(ours, 5, guidance=4.0, image_prompt=[embeds[0], -embeds[1]]), theirs, atol=1e-3)
    with pytest.raises(ValueError, match="1 image prompts for 2 IP-Adapters"):
        latents(ours, 5, image_prompt=embeds[0])
    with pytest.raises(ValueError, match="image_prompt"):
        latents(ours, 5)


def test_instruct_pix2pix_with_two_scales(tmp_path):
    """The picture's code beside the state, unscaled; one scale for it and one for the words: diffusers' own latents."""
    ours, pipe = reloaded("instruct", tmp_path)
    image = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    assert ours.guidance == "dual(scale=7.5, image_scale=1.5)"
    for guidance, scales in ((None, (7.5, 1.5)), ("dual(scale=4, image_scale=2)", (4.0, 2.0))):
        theirs = pipe(
            PROMPTS, image=image, latents=noise(ours), num_inference_steps=5, guidance_scale=scales[0],
            image_guidance_scale=scales[1], output_type="latent",
        ).images  # fmt: skip
        close(latents(ours, 5, guidance=guidance, image=image * 2 - 1), theirs)
    negative = pipe(
        PROMPTS, image=image, latents=noise(ours), num_inference_steps=5, guidance_scale=4.0, image_guidance_scale=2.0,
        negative_prompt=["dull", "dull"], output_type="latent",
    ).images  # fmt: skip
    pictures = ours.generate(
        PROMPTS, steps=5, guidance="dual(scale=4, image_scale=2)", negative="dull", cond={"image": image * 2 - 1}
    )
    assert (pictures.int() - ours.codec.images(negative).int()).abs().max() <= 1
    with pytest.raises(ValueError, match="channels"):
        latents(ours, 5)
    with pytest.raises(ValueError, match="no picture among"):
        sf.guidance.dual(2.0)(sf.from_diffusers(tiny.pipeline("sd")).denoiser)(
            torch.zeros(1, 4, 8, 8), 0.5, Context(cond={"text": torch.zeros(1, 4, tiny.WIDTH)}, batch=1)
        )


def test_lora_loaded_by_peft_acts():
    peft = pytest.importorskip("peft")
    pipe = tiny.pipeline("sd")
    ours = sf.from_diffusers(pipe)
    before = latents(ours, 5, guidance=4.0)
    torch.manual_seed(1)
    pipe.unet.add_adapter(
        peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False), adapter_name="style"
    )
    ours = sf.from_diffusers(pipe)
    theirs = pipe(
        PROMPTS,
        latents=noise(ours),
        num_inference_steps=5,
        guidance_scale=4.0,
        output_type="latent",
        height=16,
        width=16,
    ).images
    close(latents(ours, 5, guidance=4.0), theirs)
    assert (theirs - before).abs().max() > 1e-3


def test_negative_prompts_are_a_null_condition():
    pipe = tiny.pipeline("sdxl")
    ours = sf.from_diffusers(pipe)
    theirs = pipe(
        PROMPTS, negative_prompt=["dull", "dull"], latents=noise(ours), num_inference_steps=5, guidance_scale=4.0, output_type="latent",
        height=16, width=16,
    ).images  # fmt: skip
    close(latents(ours, 5, guidance=cfg(4.0, null=ours.conditioner.null("dull"))), theirs)


def test_sdxl_reads_sizes():
    pipe = tiny.pipeline("sdxl")
    ours = sf.from_diffusers(pipe)
    theirs = pipe(
        PROMPTS, latents=noise(ours), num_inference_steps=5, guidance_scale=4.0, output_type="latent", height=16, width=16,
        original_size=(64, 32), crops_coords_top_left=(3, 5), target_size=(32, 32),
    ).images  # fmt: skip
    close(latents(ours, 5, guidance=4.0, original_size=(64, 32), crop=(3, 5), target_size=(32, 32)), theirs)


def test_image_to_image_is_the_tail_of_the_schedule():
    pipe = tiny.pipeline("sd")
    ours = sf.from_diffusers(pipe)
    code = ours.codec.encode(torch.rand(2, 3, 16, 16) * 2 - 1).detach()
    times = ours.grid.cut(10, 0.6)
    start, _ = ours.process.corrupt(code, float(times[0]), Context(batch=2), noise=noise(ours))
    found = sf.sample(
        ours.guided(4.0), solver="ddim", grid=sf.grids.fixed(times), steps=6, start=float(times[0]), stop=float(times[-1]), x=start,
        cond=ours.conditions(2, PROMPTS),
    )  # fmt: skip
    x = pipe.scheduler
    x.set_timesteps(10)
    labels = x.timesteps[4:]  # what StableDiffusionImg2ImgPipeline.get_timesteps keeps at strength 0.6
    text, empty = pipe.encode_prompt(PROMPTS, "cpu", 1, True)
    theirs = x.add_noise(code, noise(ours), labels[:1])
    with torch.no_grad():
        for t in labels:
            none, some = (pipe.unet(theirs, t, encoder_hidden_states=e).sample for e in (empty, text))
            theirs = x.step(none + 4.0 * (some - none), t, theirs).prev_sample
    close(found, theirs)


# --------------------------------------------------------------------------------------------- what diffusers cannot do


def test_a_safety_checker_is_carried():
    class Blackens(torch.nn.Module):
        def forward(self, clip_input, images):
            images[0] = 0
            return images, [True, False]

    pipe = tiny.pipeline("sd")
    plain = sf.from_diffusers(pipe).generate(PROMPTS, steps=2)
    pipe.run_safety_checker = lambda images, device, dtype: Blackens()(None, images.clone())
    pipe.safety_checker = Blackens()
    checked = sf.from_diffusers(pipe).generate(PROMPTS, steps=2)
    assert not checked[0].any() and torch.equal(checked[1], plain[1])


def test_two_threads_share_one_pipeline():
    ours = sf.from_diffusers(tiny.pipeline("sd"))
    alone = [ours.generate(PROMPTS, steps=n, seed=n, solver=s) for n, s in ((5, "ddim"), (7, "unipc"))]
    found = [None, None]

    def run(i, n, solver):
        found[i] = ours.generate(PROMPTS, steps=n, seed=n, solver=solver)

    threads = [threading.Thread(target=run, args=(i, n, s)) for i, (n, s) in enumerate(((5, "ddim"), (7, "unipc")))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(alone, found, strict=True))


def test_seeds_belong_to_items_and_not_to_batches():
    ours = sf.from_diffusers(tiny.pipeline("sd"))
    prompts = ["a", "b", "c"]
    together = ours.generate(prompts, steps=4, seed=[11, 12, 13], solver="ddpm")
    alone = ours.generate("b", steps=4, seed=[12], solver="ddpm")
    assert (together[1].int() - alone[0].int()).abs().max() <= 1
    assert torch.equal(together, ours.generate(prompts, steps=4, seed=[11, 12, 13], solver="ddpm", batch=3))


@pytest.mark.parametrize("solver", ["unipc", "ddpm"])
def test_a_run_resumes_exactly_in_mid_trajectory(solver):
    ours = sf.from_diffusers(tiny.pipeline("sd"))
    cond, denoiser = ours.conditions(2, PROMPTS), ours.guided(4.0)
    options = {"solver": solver, "grid": ours.grid, "steps": 8, "cond": cond, "seed": 3}
    whole = list(sf.trajectory(denoiser, shape=(2, 4, 8, 8), **options))
    *_, last = sf.trajectory(denoiser, x=whole[4], **options)
    assert torch.equal(last.x, whole[-1].x)


def test_every_solver_and_grid_applies_and_taps_reach_the_model():
    ours = sf.from_diffusers(tiny.pipeline("sd"))
    seen = []

    def tap(ctx, call, *args, **kwargs):
        seen.append(args[0].shape)
        return call(*args, **kwargs)

    for grid in ("karras", "logsnr", "trailing", "arctan"):
        ctx = Context.of(2, 0, cond=ours.conditions(2, PROMPTS), taps=(("model.mid_block", tap),))
        x = sf.sample(ours.guided(4.0), solver="heun", grid=grid, steps=3, shape=(2, 4, 8, 8), ctx=ctx)
        assert torch.isfinite(x).all()
    assert len(seen) == 4 * 5


def test_inversion_goes_back():
    """To the middle of time: above it a random network's flow multiplies every error by 1 / alpha."""
    ours = sf.from_diffusers(tiny.pipeline("sd"))
    cond = ours.conditions(2, PROMPTS)
    code = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    options = {"solver": "dpm-solver++", "grid": "logsnr", "steps": 40, "cond": cond}
    with torch.no_grad():
        up = sf.invert(ours.denoiser, code, stop=0.5, **options)
        back = sf.sample(ours.denoiser, x=up, start=0.5, **options)
    assert (back - code).abs().max() < 1e-2 < (up.x - code).abs().max()


# --------------------------------------------------------------------------------------------------------------- refusals


def test_what_cannot_be_carried_is_refused_with_the_reason(tmp_path):
    with pytest.raises(FileNotFoundError, match="model_index.json"):
        sf.from_diffusers(tmp_path / "nothing")
    net = tiny.unet(diffusers)
    with pytest.raises(ValueError, match="give scheduler="):
        sf.from_diffusers(net)
    for scheduler, reason in (
        (diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "other way"),
        (diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), "stochastic solver"),
        (diffusers.EDMEulerScheduler(prediction_type="v_prediction"), "v_prediction"),
        (diffusers.CMStochasticIterativeScheduler(), "cannot|nothing that can be carried"),
        (diffusers.EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction"), "continuous"),
    ):
        with pytest.raises(ValueError, match=reason):
            sf.from_diffusers(net, scheduler=scheduler)
    with pytest.raises(ValueError, match="cannot be carried"):
        sf.from_diffusers(torch.nn.Linear(2, 2), scheduler=diffusers.DDPMScheduler())
    learned = tiny.unet(diffusers, out_channels=6)
    with pytest.raises(ValueError, match="fixed_small"):
        sf.from_diffusers(learned, scheduler=diffusers.DDPMScheduler(variance_type="learned_range"))
    assert sf.from_diffusers(learned, scheduler=diffusers.DDPMScheduler()).generate(1, steps=2).shape == (1, 3, 8, 8)
    distilled = tiny.text_unet(diffusers, time_cond_proj_dim=8)
    with pytest.raises(ValueError, match="distilled"):
        sf.from_diffusers(distilled, scheduler=diffusers.DDIMScheduler())
    with pytest.raises(ValueError, match="save_pretrained"):
        sf.from_diffusers(net, scheduler=diffusers.DDIMScheduler()).save(tmp_path)


def test_a_model_folder_with_a_scheduler(tmp_path):
    net = tiny.unet(diffusers)
    net.save_pretrained(tmp_path)
    ours = sf.from_diffusers(tmp_path, scheduler=diffusers.DDIMScheduler(clip_sample=False))
    again = sf.from_diffusers(net, scheduler=diffusers.DDIMScheduler(clip_sample=False))
    assert torch.equal(ours.generate(2, steps=3), again.generate(2, steps=3))


@pytest.mark.parametrize(("dtype", "state"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)], ids=str)
def test_a_moved_pipeline_runs_its_model_there_and_keeps_the_state_precise(dtype, state):
    ours = sf.from_diffusers(tiny.pipeline("sd"))
    before = ours.generate(["a red heart"], steps=4).int()
    seen = set()

    class Watched(sf.core.Wrapper):
        def forward(self, x, t, ctx):
            seen.add(x.dtype)
            return self.inner(x, t, ctx)

    after = ours.to(dtype).generate(
        ["a red heart"], steps=4, guidance=lambda denoiser: Watched(cfg(ours.guidance)(denoiser))
    )
    assert seen == {state} and {p.dtype for p in ours.denoiser.parameters()} == {dtype}
    assert (after.int() - before).abs().max() <= (1 if dtype == torch.float64 else 24)
