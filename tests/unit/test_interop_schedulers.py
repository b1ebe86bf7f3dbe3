"""Schedulers of diffusers and solvers of ours take the same steps: in our loop, and in theirs through the adapter."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch

pytest.importorskip("diffusers", reason="needs the extra: pip install 'sfumato[diffusers]'")
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning:diffusers.*"),
    pytest.mark.filterwarnings("ignore::UserWarning:(diffusers|transformers).*"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

import diffusers as d  # noqa: E402

import sfumato as sf  # noqa: E402
from sfumato import processes, solvers  # noqa: E402
from sfumato.core import Context, InputError, Streams  # noqa: E402
from sfumato.interop import SolverScheduler, tiny  # noqa: E402
from sfumato.interop.law import DEFAULT  # noqa: E402

NOISE = Streams.of(0, 2).normal(torch.empty(2, 3, 8, 8))


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return tiny.unet(d)


@torch.no_grad()
def loop(net, scheduler, n: int, begin: int = 0, x=None, change=None, **options):
    """The loop of every diffusers pipeline."""
    scheduler.set_timesteps(n)
    if begin:
        scheduler.set_begin_index(begin)
    x = NOISE * getattr(scheduler, "init_noise_sigma", 1.0) if x is None else x
    for i, t in enumerate(scheduler.timesteps[begin:]):
        out = net(scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x, t).sample
        x = scheduler.step(out, t, x, **options, return_dict=False)[0]
        x = x if change is None else change(i, x)
    return x


V, FLOW = {"prediction_type": "v_prediction"}, {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
ZERO = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", **V}
CASES = [
    (d.DDIMScheduler, {"clip_sample": False}),
    (d.DDIMScheduler, {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}),
    (d.DDIMScheduler, {"clip_sample": False, "timestep_spacing": "trailing", **V}),
    (d.DDIMScheduler, {"clip_sample": False, "prediction_type": "sample", "beta_schedule": "scaled_linear"}),
    (d.DDIMScheduler, {"clip_sample": False, **ZERO}),
    (d.DDIMScheduler, {"clip_sample": True, **V}),
    (d.DDIMScheduler, {"thresholding": True, "sample_max_value": 1.5, **V}),
    (d.EulerDiscreteScheduler, {}),
    (d.EulerDiscreteScheduler, {"timestep_spacing": "leading", "steps_offset": 1, **V}),
    (d.EulerDiscreteScheduler, {"use_karras_sigmas": True}),
    (d.EulerDiscreteScheduler, {"use_exponential_sigmas": True}),
    (d.DPMSolverMultistepScheduler, {}),
    (d.DPMSolverMultistepScheduler, {"use_karras_sigmas": True, **V}),
    (d.DPMSolverMultistepScheduler, {"solver_type": "heun", **V}),
    (d.DPMSolverMultistepScheduler, {"solver_order": 1}),
    (d.DPMSolverMultistepScheduler, {"solver_order": 3}),
    (d.DPMSolverMultistepScheduler, {"use_lu_lambdas": True}),
    (d.DPMSolverMultistepScheduler, {"final_sigmas_type": "sigma_min", "timestep_spacing": "leading"}),
    (d.DPMSolverMultistepScheduler, {**FLOW, "flow_shift": 3.0}),
    (d.UniPCMultistepScheduler, {}),
    (d.UniPCMultistepScheduler, V),
    (d.UniPCMultistepScheduler, {"solver_order": 3, "use_karras_sigmas": True}),
    (d.UniPCMultistepScheduler, FLOW),
    (d.FlowMatchEulerDiscreteScheduler, {}),
    (d.FlowMatchEulerDiscreteScheduler, {"shift": 3.0}),
    (d.EDMEulerScheduler, {}),
]


@pytest.mark.parametrize(
    ("kind", "config"), CASES, ids=[f"{k.__name__}-{'-'.join(map(str, c)) or 'default'}" for k, c in CASES]
)
def test_the_steps_of_a_scheduler_are_ours(net, kind, config):
    theirs = loop(net, kind(**config), 10)
    ours = sf.from_diffusers(net, scheduler=kind(**config))
    found = sf.sample(ours.guided(), solver=ours.solver, grid=ours.grid, steps=10, shape=NOISE.shape)
    scale = theirs.abs().max()
    assert (found - theirs).abs().max() <= 3e-6 * scale
    adapter = sf.as_diffusers_scheduler(ours.solver, like=kind(**config))
    assert (loop(net, adapter, 10) - theirs).abs().max() <= 3e-6 * scale
    if kind is not d.DDIMScheduler or "trailing" not in config.values():
        assert adapter.timesteps.tolist() == pytest.approx(kind_timesteps(kind, config), abs=1e-4)


def kind_timesteps(kind, config):
    scheduler = kind(**config)
    scheduler.set_timesteps(10)
    return scheduler.timesteps.tolist()


@pytest.mark.parametrize("config", [{}, {"clip_sample": False, **V}, {"thresholding": True, **V}])
def test_ddpm_with_the_noise_of_diffusers(net, config):
    theirs = loop(net, d.DDPMScheduler(**config), 8, generator=torch.Generator().manual_seed(1))
    draws = torch.Generator().manual_seed(1)
    recorded = [torch.randn(NOISE.shape, generator=draws) for _ in range(7)] + [torch.zeros_like(NOISE)]
    ours = sf.from_diffusers(net, scheduler=d.DDPMScheduler(**config))
    ctx = Context(batch=2, source=lambda ctx, fresh: recorded[ctx.run.step])
    found = sf.sample(ours.guided(), solver=ours.solver, grid=ours.grid, steps=8, x=NOISE, ctx=ctx)
    # an eps prediction's first x0 is (x - sigma eps) / 0.006: float32 leaves it 1e-7 / 0.006
    assert (found - theirs).abs().max() <= (1e-4 if not config else 3e-6) * theirs.abs().max()


def test_zero_terminal_snr_is_exactly_zero(net):
    """Where diffusers keeps alpha = 2^-12 in its place, the difference is of that size."""
    ours = sf.from_diffusers(net, scheduler=d.EulerDiscreteScheduler(**ZERO))
    assert ours.process.coef(1.0).alpha == 0 and float(ours.grid.times(5)[0]) == 1
    theirs = loop(net, d.EulerDiscreteScheduler(**ZERO), 10)
    found = sf.sample(ours.guided(), solver=ours.solver, grid=ours.grid, steps=10, shape=NOISE.shape)
    assert (found - theirs).abs().max() <= 2**-11 * theirs.abs().max()


def test_ddim_that_steps_past_its_next_time_is_warned_of(net):
    ours = sf.from_diffusers(net, scheduler=d.DDIMScheduler(clip_sample=False, timestep_spacing="linspace"))
    with pytest.warns(UserWarning, match="not to the next"):
        ours.generate(1, steps=7)


@pytest.mark.parametrize(
    "kind", [d.PNDMScheduler, d.HeunDiscreteScheduler, d.KDPM2DiscreteScheduler, d.DEISMultistepScheduler]
)
def test_other_schedulers_are_read_for_their_law_and_times(net, kind):
    ours = sf.from_diffusers(net, scheduler=kind())
    assert len(ours.grid.times(5)) in (5, 6)  # PNDM ends on the last time of its table
    assert torch.isfinite(ours.generate(1, steps=5).float()).all()
    with pytest.raises(InputError, match="only inverts"):
        sf.from_diffusers(net, scheduler=d.DDIMInverseScheduler())


# ------------------------------------------------------------------------------------------------------------ the adapter


@pytest.mark.parametrize(
    "solver",
    ["heun", "dpm-solver++2s", "dpm-solver-3", "dpm-solver-fast", "edm(churn=10)", "ddpm", "dpm-solver++sde", "unipc"],
)
def test_any_solver_in_a_loop_of_diffusers(net, solver):
    """The same bits as our own loop, whatever number of calls a step costs and whatever noise it draws."""
    like = d.DDIMScheduler(clip_sample=False)
    scheduler = sf.as_diffusers_scheduler(solver, "logsnr", like=like)
    made = solvers.registry.make(solver)
    assert scheduler.order == round(made.nfe)
    found = loop(net, scheduler, 5, generator=[torch.Generator().manual_seed(k) for k in (3, 4)])
    seeds = [int(torch.randint(2**62, (1,), generator=torch.Generator().manual_seed(k))) for k in (3, 4)]
    denoiser = sf.from_diffusers(net, scheduler=like).denoiser
    expected = sf.sample(denoiser, solver=solver, grid="logsnr", steps=5, x=NOISE, seed=seeds)
    assert (found - expected).abs().max() <= 3e-6 * expected.abs().max()
    assert len(scheduler.timesteps) <= 5 * scheduler.order


@pytest.mark.parametrize("n", [1, 2, 3, 4, 6, 7])
def test_a_solver_that_plans_its_times_makes_the_calls_it_promises(net, n):
    """dpm-solver-fast: n calls for n steps, in fewer steps of several calls."""
    like = d.DDIMScheduler(clip_sample=False)
    scheduler = sf.as_diffusers_scheduler("dpm-solver-fast", like=like)
    found = loop(net, scheduler, n)
    ours = sf.from_diffusers(net, scheduler=like)
    ctx = Context.of(len(NOISE), None)
    expected = sf.sample(ours.denoiser, solver="dpm-solver-fast", grid=ours.grid, steps=n, x=NOISE, ctx=ctx)
    assert len(scheduler.timesteps) == ctx.run.nfe <= n  # its second order needs a finite end: two calls become one
    assert (found - expected).abs().max() <= 3e-6 * expected.abs().max()


def test_solvers_that_choose_their_times_are_refused():
    class Adaptive(sf.core.Solver):
        def times(self, process, grid, x, ctx):
            return iter(grid[1:])

        def step(self, st, s, denoiser, ctx):
            return sf.Step(st.x, s)

    with pytest.raises(InputError, match="chooses its own times"):
        sf.as_diffusers_scheduler(Adaptive(), like=d.DDIMScheduler())


def test_configuration_round_trips(net, tmp_path):
    like = d.EulerDiscreteScheduler(use_karras_sigmas=True, beta_schedule="scaled_linear")
    made = sf.as_diffusers_scheduler("dpm-solver++(order=3)", like=like)
    made.save_pretrained(tmp_path)
    expected = loop(net, made, 6)
    for other in (
        SolverScheduler.from_pretrained(tmp_path),
        SolverScheduler.from_config(made.config),
        SolverScheduler.from_config(
            like.config | {"_class_name": "EulerDiscreteScheduler"}, solver="dpm-solver++(order=3)"
        ),
        copy.deepcopy(made),
        pickle.loads(pickle.dumps(made)),
    ):
        assert torch.equal(loop(net, other, 6), expected)
    assert made.config.beta_schedule == "scaled_linear" and made.config.solver == "dpm-solver++(order=3)"
    back = d.EulerDiscreteScheduler.from_config(made.config)
    assert (
        d.DDIMScheduler.from_config(made.config).config.timestep_spacing == "leading"
    )  # Euler's default is not handed on
    assert back.config.use_karras_sigmas and torch.equal(back.alphas_cumprod, like.alphas_cumprod)
    with pytest.raises(InputError, match="as a spec"):
        sf.as_diffusers_scheduler(solvers.get("ddim"), like=like).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="give like="):
        SolverScheduler()


def test_an_image_to_image_run_begins_in_the_middle(net):
    like = d.DDIMScheduler(clip_sample=False)
    clean, scheduler = torch.rand(2, 3, 8, 8), sf.as_diffusers_scheduler("heun", like=like)
    scheduler.set_timesteps(10)
    begin = 4 * scheduler.order
    start = scheduler.add_noise(clean, NOISE, scheduler.timesteps[begin : begin + 1].repeat(2))
    found = loop(net, scheduler, 10, begin, start)
    ours = sf.from_diffusers(net, scheduler=like)
    times = ours.grid.cut(10, 0.6)
    x, _ = ours.process.corrupt(clean, float(times[0]), Context(batch=2), noise=NOISE)
    expected = sf.sample(ours.denoiser, solver="heun", grid=sf.grids.fixed(times), steps=6, x=x, start=float(times[0]))
    assert (found - expected).abs().max() <= 3e-6 * expected.abs().max()
    by_label = sf.as_diffusers_scheduler("heun", like=like)
    by_label.set_timesteps(10)
    with torch.no_grad():
        x = start
        for t in by_label.timesteps[begin:]:
            x = by_label.step(net(x, t).sample, t, x).prev_sample
    assert torch.equal(x, found)
    wrong = sf.as_diffusers_scheduler("heun", like=like)
    wrong.set_timesteps(10)
    wrong.set_begin_index(begin + 1)
    with pytest.raises(InputError, match="cannot begin"):
        wrong.step(NOISE, wrong.timesteps[begin + 1], NOISE)
    with pytest.raises(InputError, match="none of this run's"):
        sf.as_diffusers_scheduler("ddim", like=like).index_for_timestep(3)


def test_a_state_changed_between_steps_is_taken_over(net):
    """Inpainting pipelines blend known pixels in after each step; within a step of several calls that is refused."""
    like = d.DDIMScheduler(clip_sample=False)

    def change(i, x):
        return torch.cat([torch.full_like(x[..., :4], 0.1 * i), x[..., 4:]], -1)

    theirs = loop(net, like, 8, change=change)
    found = loop(net, sf.as_diffusers_scheduler("ddim", like=like), 8, change=change)
    assert (found - theirs).abs().max() <= 3e-6 * theirs.abs().max()
    with pytest.raises(InputError, match="between the calls"):
        loop(net, sf.as_diffusers_scheduler("heun", like=like), 8, change=change)


def test_two_runs_at_once_and_a_run_given_up(net):
    like = d.DDIMScheduler(clip_sample=False)
    one, two = (sf.as_diffusers_scheduler(s, like=like) for s in ("unipc", "ddpm"))
    expected = loop(net, one, 6), loop(net, two, 6, generator=torch.Generator().manual_seed(0))
    found = [None, None]

    def run(i, scheduler, **options):
        found[i] = loop(net, scheduler, 6, **options)

    threads = [
        threading.Thread(target=run, args=(0, one)),
        threading.Thread(target=run, args=(1, two), kwargs={"generator": torch.Generator().manual_seed(0)}),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    one.set_timesteps(6)  # a run that is left in the middle leaves nothing behind
    one.step(NOISE, one.timesteps[0], NOISE)
    assert torch.equal(loop(net, one, 6), expected[0])


def test_an_error_of_the_solver_reaches_the_caller(net):
    scheduler = sf.as_diffusers_scheduler("ddim", like=d.DDIMScheduler(clip_sample=False))
    scheduler.set_timesteps(4)
    with pytest.raises(RuntimeError):
        scheduler.step(torch.zeros(2, 3, 5, 5), scheduler.timesteps[0], NOISE)


def test_half_precision_runs_in_single(net):
    scheduler = sf.as_diffusers_scheduler("unipc", like=d.DDIMScheduler(clip_sample=False))
    scheduler.set_timesteps(4)
    x = NOISE.half()
    for t in scheduler.timesteps:
        x = scheduler.step(x, t, x).prev_sample
    assert x.dtype == torch.float16 and torch.isfinite(x).all()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3", "flux", "dit", "pixart"])
def test_a_real_pipeline_with_our_scheduler(kind, tmp_path):
    """pipe.scheduler = ...: every pipeline runs, equals our own run, and is saved and loaded with its scheduler."""
    pytest.importorskip("transformers")
    pipe = tiny.pipeline(kind)
    pipe.scheduler = sf.as_diffusers_scheduler("unipc(order=2)", "logsnr", like=pipe.scheduler)
    options = {"num_inference_steps": 5, "generator": torch.Generator().manual_seed(0), "output_type": "np"}
    options |= {} if kind == "dit" else {"height": 16, "width": 16}
    options |= {"use_resolution_binning": False} if kind == "pixart" else {}
    first = pipe([3] if kind == "dit" else ["red"], **options).images
    pipe.save_pretrained(tmp_path)
    again = type(pipe).from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    if kind == "flux":
        again.default_sample_size = 8
    assert isinstance(again.scheduler, SolverScheduler)
    options["generator"] = torch.Generator().manual_seed(0)
    assert abs(first - again([3] if kind == "dit" else ["red"], **options).images).max() < 1e-5


def test_image_to_image_and_inpainting_pipelines_take_our_scheduler():
    pytest.importorskip("transformers")
    pipe = tiny.pipeline("sd")
    image, mask = torch.rand(1, 3, 16, 16), torch.zeros(1, 1, 16, 16)
    mask[..., 8:] = 1
    for solver in ("ddim", "heun", "unipc"):
        like = pipe.scheduler
        parts = {**pipe.components, "scheduler": sf.as_diffusers_scheduler(solver, like=like)}
        edit = d.StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)
        edit.set_progress_bar_config(disable=True)
        options = {"num_inference_steps": 5, "output_type": "np", "strength": 0.6}
        made = edit(["red"], image=image, generator=torch.Generator().manual_seed(0), **options).images
        edit.scheduler = like
        theirs = edit(["red"], image=image, generator=torch.Generator().manual_seed(0), **options).images
        assert abs(made - theirs).max() < (1e-5 if solver == "ddim" else 0.5)
    parts["scheduler"] = sf.as_diffusers_scheduler("ddim", like=like)
    paint = d.StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False)
    paint.set_progress_bar_config(disable=True)
    options |= {"mask_image": mask, "image": image, "height": 16, "width": 16}
    made = paint(["red"], generator=torch.Generator().manual_seed(0), **options).images
    paint.scheduler = like
    theirs = paint(["red"], generator=torch.Generator().manual_seed(0), **options).images
    assert abs(made - theirs).max() < 1e-5


def test_a_process_of_ours_as_a_scheduler():
    like = {"process": "VP", "numbers": {"beta_min": 0.1, "beta_max": 20.0}, "predicts": "eps"}
    oracle = sf.oracles.Gaussian([0.5, -1.0], torch.diag(torch.tensor([0.3, 1.2])))
    denoiser, start = (
        oracle.denoiser(processes.VP()),
        torch.randn(4, 2, generator=torch.Generator().manual_seed(0)).double(),
    )
    scheduler = sf.as_diffusers_scheduler("heun", "logsnr", like=like)
    scheduler.set_timesteps(7)
    x = start
    for t in scheduler.timesteps:
        x = scheduler.step(denoiser(x, float(t), Context(batch=4)).view("eps"), t, x).prev_sample
    assert torch.allclose(x, sf.sample(denoiser, solver="heun", grid="logsnr", steps=7, x=start), atol=1e-12)
    assert DEFAULT in solvers.names()


@pytest.mark.parametrize("solver", ["ipndm", "pndm", "ghvb"])
def test_solvers_that_need_equal_times_say_so_and_run_on_them(solver: str) -> None:
    """Their own ``times`` only check the grid, so they are schedules like any other where it suits them."""
    pipe = tiny.pipeline("sd")
    like = pipe.scheduler
    pipe.scheduler = sf.as_diffusers_scheduler(solver, "uniform", like=like)
    made = pipe("a", num_inference_steps=8, height=16, width=16, output_type="np").images
    assert made.shape == (1, 16, 16, 3)
    with pytest.raises(sf.SfumatoError, match="equally spaced"):
        sf.as_diffusers_scheduler(solver, "karras", like=like).set_timesteps(8)
