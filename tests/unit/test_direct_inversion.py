"""Direct inversion: the source branch is the stored one, the target branch is left alone, a mask is exact."""

from __future__ import annotations

import pytest
import torch
from tiny_inversion import images, tiny

import sfumato as sf
from sfumato import editing, processes
from sfumato.core import InputError, Solver, Step, trajectory
from sfumato.editing.attention import Pair
from sfumato.editing.methods.direct_inversion import DirectInversion, Restored, trail

LAWS = {"cosine": processes.Cosine(), "flow": processes.Flow(), "vp": processes.VP()}
FREE = {"cross": 0.0, "structure": 0.0}


class Seen(DirectInversion):
    """Keeps the task, so that a test can ask for both branches."""

    task = None

    def __call__(self, task):
        type(self).task = task
        return super().__call__(task)


def task_of(pipe, method="seen", prompt="twemoji", **options):
    method = Seen(**{**FREE, "strength": 0.8})
    sf.edit(pipe, images(), prompt, source="noto", method=method, **{"steps": 10, "guidance": 5.0, **options})
    return Seen.task


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("solver", ["ddim", "heun", "dpm-solver++"])
def test_the_source_branch_passes_through_what_was_stored(solver, law):
    """Guidance 5, in float32: at most 1e-6 from the trajectory of the inversion at every time, with any solver."""
    pipe = tiny(LAWS[law], torch.float32)
    task = task_of(pipe, solver=solver)
    stored, pair = trail(task, 0.8), Pair(2)
    steered = Restored(task.solver, pair, stored)
    x = stored[0.8]
    seen = task.trajectory(
        pair.join(x, x), denoiser=task.guidance(task.denoiser), solver=steered, start=0.8, ctx=pair.context(task)
    )
    apart = {st.t: float((pair.split(st.x)[0] - stored[st.t]).abs().max()) for st in seen}
    assert len(apart) == 9 and max(apart.values()) <= 1e-6
    source, target = DirectInversion(0.8, **FREE).branches(task)
    assert (source - task.x0).abs().max() <= 1e-6 < (target - task.x0).abs().max()


def test_without_it_the_source_branch_drifts_with_guidance():
    pipe, drift = tiny(LAWS["cosine"]), []
    for scale in (1.0, 3.0, 7.0):
        task = task_of(pipe, guidance=scale)
        source, _ = DirectInversion(0.8, scale=0.0, **FREE).branches(task)
        drift.append(float((source - task.x0).abs().mean()))
    assert 1e-4 < drift[0] < drift[1] < drift[2]


@pytest.mark.parametrize("law", LAWS)
def test_branches_that_meet_nowhere_are_ddim_inversion(law):
    pipe, options = tiny(LAWS[law]), {"source": "noto", "steps": 8, "guidance": 4.0}
    ours = editing.perform(pipe, images(), "twemoji", method=DirectInversion(0.7, **FREE), **options)
    ddim = editing.perform(pipe, images(), "twemoji", method="ddim-inversion(strength=0.7)", **options)
    assert torch.allclose(ours.state, ddim.state, rtol=1e-9, atol=1e-9)
    assert ours.nfe == 6 + 2 * 2 * 6 and ddim.nfe == 6 + 2 * 6


def test_shared_self_attention_ties_the_target_to_the_source():
    """With the source's own condition the coupled target is the source: the image returns, though guidance is 5."""
    pipe = tiny(LAWS["flow"])
    x0, apart = pipe.codec.encode(images()), {}
    for name, method in (
        ("free", DirectInversion(0.8, **FREE)),
        ("tied", DirectInversion(0.8, cross=0.0, structure=1.0)),
    ):
        found = editing.perform(pipe, images(), "twemoji", source="noto", method=method, steps=10, guidance=5.0)
        apart[name] = found.state
    assert not torch.allclose(apart["free"], apart["tied"]) and torch.isfinite(apart["tied"]).all()
    assert (apart["tied"] - x0).abs().mean() > 0


@pytest.mark.parametrize("law", LAWS)
def test_outside_the_mask_the_picture_returns(law):
    pipe = tiny(LAWS[law], torch.float32)
    mask = torch.zeros(8, 8)
    mask[:4] = 1
    after = editing.perform(
        pipe, images(), "twemoji", source="noto", mask=mask, method=DirectInversion(**FREE), steps=8, guidance=5.0
    )
    assert torch.equal(after.images[..., 4:, :], images()[..., 4:, :])
    assert not torch.equal(after.images[..., :4, :], images()[..., :4, :])


def test_the_ablations_are_what_they_are_called():
    """scale: the source goes that share of the way; target_offset: the target moves by as much."""
    pipe = tiny(LAWS["cosine"])
    task = task_of(pipe)
    stored, pair = trail(task, 0.8), Pair(2)
    x = pair.join(stored[0.8], stored[0.8])
    denoiser = task.guidance(task.denoiser)

    class Still(Solver):
        def step(self, st, s, denoiser, ctx):
            return Step(st.x, s)

    first = {}
    for scale, target in ((0.0, 0.0), (0.4, 0.0), (1.0, 0.5)):
        run = task.trajectory(
            x,
            denoiser=denoiser,
            solver=Restored(Still(), pair, stored, scale, target),
            start=0.8,
            ctx=pair.context(task),
        )
        next(run)
        first[scale] = (st := next(run)).x
    offset = stored[st.t] - stored[0.8]
    assert torch.equal(first[0.0], x)
    assert torch.allclose(first[0.4], x + pair.join(0.4 * offset, 0 * offset))
    assert torch.allclose(first[1.0], x + pair.join(offset, 0.5 * offset))


def test_what_cannot_be_done_is_refused():
    pipe = tiny(LAWS["cosine"])
    for method, more, said in [
        (DirectInversion(**FREE), {"solver": "ddpm"}, "draws noise"),
        (DirectInversion(cross=0.4, structure=0.0), {}, "no text among the conditions"),
        (DirectInversion(cross=2.0), {}, "a share of the run"),
    ]:
        with pytest.raises(InputError, match=said):
            sf.edit(pipe, images(), "twemoji", source="noto", method=method, steps=4, **more)
    with pytest.raises(InputError, match="above 0"):
        DirectInversion(strength=0.0)
    with pytest.raises(InputError, match="needs"):
        sf.edit(pipe, images(), "twemoji", method="direct-inversion")
    task = task_of(pipe)
    steered = Restored(task.solver, Pair(2), {0.8: task.x0})
    with pytest.raises(InputError, match="no source state was stored"):
        list(trajectory(task.denoiser, steered, task.grid, 4, x=torch.cat([task.x0] * 2), start=0.8,
                        cond=Pair(2).join(task.source, task.target)))  # fmt: skip
