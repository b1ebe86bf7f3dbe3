"""MagicMix: its limits are SDEdit and the layout itself, on exact beliefs and on networks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import sfumato as sf
from sfumato import codecs, editing, grids, solvers
from sfumato.core import InputError
from sfumato.denoisers.mixtures import Mixture
from sfumato.denoisers.oracles import Gaussian
from sfumato.editing.base import Task
from sfumato.editing.methods.basic import SDEdit
from sfumato.editing.methods.magicmix import MagicMix
from sfumato.guidance import cfg
from sfumato.processes import VP, Cosine, Flow

LAW = Mixture([Gaussian(m, [0.1, 0.1]) for m in ([2.0, 0.0], [-2.0, 0.0])])


def task(
    process: Any = None, n: int = 6, solver: str = "ddim", scale: float = 1.0, dtype: Any = torch.float64, **fields: Any
) -> Task:
    """Points near the first component, asked to become the second."""
    denoiser = LAW.labelled(process or VP())
    x0 = Gaussian([2.0, 0.0], [0.1, 0.1]).sample(n, 1).to(dtype)
    label = {"label": torch.ones(n, dtype=torch.long)}
    facts: dict[str, Any] = {
        "denoiser": denoiser, "codec": codecs.Identity(), "x0": x0, "images": torch.zeros(n, 3, 1, 1, dtype=torch.uint8),
        "source": label, "target": label, "guidance": cfg(scale) if scale != 1 else lambda d: d, "scale": scale,
        "solver": solvers.registry.make(solver), "grid": grids.get("uniform"), "steps": 40,
    }  # fmt: skip
    return Task(**(facts | fields))


LAWS = pytest.mark.parametrize("process", [VP(), Flow(), Cosine()], ids=["vp", "flow", "cosine"])


@LAWS
@pytest.mark.parametrize("solver", ["ddim", "dpm-solver++", "heun", "ddpm"])
def test_with_all_the_content_it_is_sdedit(process: Any, solver: str) -> None:
    for update in ("mixed", "state") if solver != "ddpm" else ("mixed",):
        got = MagicMix(nu=1.0, k_max=0.7, update=update)(task(process, solver=solver))
        torch.testing.assert_close(got, SDEdit(0.7)(task(process, solver=solver)))


@LAWS
def test_without_content_it_is_sdedit_from_below(process: Any) -> None:
    """nu = 0: every state is the noised layout until the last mixing, so it is SDEdit from the first time at or below k_min."""
    one = task(process)
    got = MagicMix(nu=0.0, k_max=0.6, k_min=0.25, update="mixed")(one)
    times = one.grid(one.process, round(one.steps * 0.6), 0.6, 0.0)
    last = float(times[times > 0.25][-1])
    ctx = one.context()
    noise = one.process.corrupt(one.x0, 0.6, ctx)[1]
    x = one.process.renoise(one.x0, 0.0, last, noise)
    for t, s in zip(times[times <= last].tolist(), times[times < last].tolist(), strict=False):
        post = one.denoiser(x, t, one.context())
        c = one.process.coef(s)
        x = post.at(c.alpha, c.sigma)
    torch.testing.assert_close(got, x)


@LAWS
def test_a_layout_that_is_the_content_stays(process: Any) -> None:
    """Where the prompt's only picture is the layout, every mixture of the two is on its path."""
    point = Mixture([Gaussian([0.7, -0.4], 1e-10), Gaussian([0.7, -0.4], 1e-10)]).labelled(process)
    x0 = torch.tensor([[0.7, -0.4]], dtype=torch.float64).expand(6, 2)
    for nu in (0.1, 0.5, 0.9):
        for update in ("mixed", "state"):
            got = MagicMix(nu=nu, update=update)(task(process, denoiser=point, x0=x0))
            torch.testing.assert_close(got, x0, atol=1e-4, rtol=0)


def test_nu_moves_from_the_layout_to_the_content() -> None:
    wide = Mixture([Gaussian(m, [0.5, 0.5]) for m in ([2.0, 0.0], [-2.0, 0.0])]).labelled(VP())
    ends = []
    for nu in (0.1, 0.4, 0.7, 1.0):
        ends.append(float(MagicMix(nu=nu, k_max=0.8, k_min=0.2)(task(denoiser=wide))[:, 0].mean()))
    assert ends == sorted(ends, reverse=True) and ends[0] > ends[-1] + 1


def test_a_mixed_state_has_the_variance_of_its_time() -> None:
    """One noise for the layout and the state: at the first mixing nothing changes; fresh noises would lose half of it."""
    from sfumato.editing.methods.magicmix import Mixed

    one = task(n=4000)
    ctx = one.context()
    x, noise = one.process.corrupt(one.x0, 0.6, ctx)
    mixing = Mixed(one.solver, one.x0, noise, 0.5, 0.3, 0.6)
    torch.testing.assert_close(mixing.mixture(x, 0.6, one.process), x)


def test_items_seeds_precision_and_calls() -> None:
    method, whole = MagicMix(k_max=0.8), task(scale=2.0)
    x = method(whole)
    torch.testing.assert_close(method(task(scale=2.0)), x, rtol=0, atol=0)
    assert whole.nfe[0] == 2 * 32
    three = {k: v[:3] for k, v in whole.target.items()}
    part = task(scale=2.0, n=3, x0=whole.x0[:3], target=three)
    torch.testing.assert_close(method(part), x[:3])
    assert not torch.equal(method(task(scale=2.0, seed=1)), x)
    single = method(task(scale=2.0, dtype=torch.float32))
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), x, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ({"k_min": 0.6, "k_max": 0.6}, "k_min < k_max"), ({"k_max": 1.2}, "times"), ({"nu": -0.1}, "share"),
        ({"update": "both"}, "mixed, state"),
    ],
)  # fmt: skip
def test_bad_numbers_are_said(numbers: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        MagicMix(**numbers)


def test_a_stable_diffusion_pipeline_mixes() -> None:
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    from sfumato.interop.tiny import pipeline

    pipe = sf.from_diffusers(pipeline("sd"))
    picture: Tensor = torch.randint(0, 256, (1, 3, *pipe.size), generator=torch.Generator().manual_seed(0)).to(
        torch.uint8
    )
    options: dict[str, Any] = {"steps": 6, "guidance": 2.0}
    got = editing.perform(pipe, picture, "a cat", method="magicmix", nu=1.0, **options)
    other = editing.perform(pipe, picture, "a cat", method="sdedit", strength=0.6, **options)
    mixed = editing.perform(pipe, picture, "a cat", method="magicmix(nu=0.5, update='state')", **options)
    assert (
        torch.equal(got.images, other.images)
        and mixed.state.isfinite().all()
        and not torch.equal(mixed.state, got.state)
    )


def words(k_max: float, nu: float, one: str, two: str, **options: Any) -> Tensor:
    """uint8 pictures of the tiny model of two classes."""
    from tiny_inversion import tiny

    method = MagicMix(k_max=k_max, k_min=0.2, nu=nu, update=options.pop("update", "mixed"))
    return editing.mix(
        tiny(Cosine(), torch.float32),
        one,
        two,
        3,
        method=method,
        grid="uniform",
        **{"guidance": 2.0, "steps": 10, **options},
    )


@pytest.mark.parametrize("update", ["mixed", "state"])
def test_a_layout_of_words_ends_in_runs_of_one_prompt_or_of_one_after_another(update: str) -> None:
    from tiny_inversion import tiny

    pipe, run = tiny(Cosine(), torch.float32), {"solver": "ddim", "grid": "uniform", "steps": 10}
    options: dict[str, Any] = {"seed": 4, "update": update}
    one = pipe.generate(["noto"] * 3, seed=4, **run)
    assert (words(0.6, 1.0, "noto", "noto", **options).int() - one.int()).abs().max() <= 1
    changed = pipe.generate(["noto"] * 3, also="twemoji", guidance="cfg(scale=2) | switched(at=0.4)", seed=4, **run)
    assert (words(0.6, 1.0, "noto", "twemoji", **options).int() - changed.int()).abs().max() <= 1
    mixed = words(0.6, 0.5, "noto", "twemoji", **options)
    assert not torch.equal(mixed, changed)
    alone = editing.mix(
        pipe,
        "noto",
        "twemoji",
        1,
        method=MagicMix(0.6, 0.2, 0.5, update),
        steps=10,
        grid="uniform",
        guidance=2.0,
        seed=4,
    )
    assert (alone.int() - mixed[:1].int()).abs().max() <= 1
    with pytest.raises(InputError, match="k_max = 1"):
        words(1.0, 0.5, "noto", "twemoji")
    with pytest.raises(InputError, match="steps = 0"):
        words(0.6, 0.5, "noto", "twemoji", steps=0)


def test_mixing_begins_exactly_where_the_layout_run_stands() -> None:
    """The belief and its noise are the state they were read from, so nu does not matter in the first step."""
    from tiny_inversion import tiny

    denoiser, t = tiny(Cosine()).denoiser, 0.6
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    post = denoiser(x, t, sf.Context.of(2, None, cond={"vendor": torch.tensor([0, 1])}, dtype=x.dtype))
    mixing = MagicMix(nu=0.3).mixing(solvers.get("ddim"), denoiser, post.mean, post.view("eps"))[0]
    torch.testing.assert_close(mixing.mixture(x, t, denoiser.process), x)  # type: ignore[attr-defined]
