"""Imitation of a teacher: zero where the student says the same, and the gradient of the denoising loss without its noise."""

from __future__ import annotations

import copy

import pytest
import torch

import sfumato as sf
from sfumato import networks, processes
from sfumato.core import Context, InputError, Streams
from sfumato.objectives import Denoising
from sfumato.objectives.distill.imitation import Imitation


def denoiser(kind="flow", seed=0):
    torch.manual_seed(seed)
    net = networks.DiT(2, size=8, patch=2, width=32, depth=2, heads=2, embeddings={"y": 3})
    for p in net.parameters():
        p.data = p.data + 0.05 * torch.randn_like(p)
    return sf.parametrized(net.eval(), processes.Flow(), kind, null={"y": 3})


def batch(n=8):
    return {
        "x": torch.randn(n, 2, 8, 8, generator=torch.Generator().manual_seed(1)),
        "cond": {"y": torch.arange(n) % 3},
    }


def context(n=8, seed=0):
    return Context(rng=Streams.of(seed, n), batch=n)


def test_a_copy_of_the_teacher_has_nothing_to_learn_and_another_has():
    teacher = denoiser()
    loss = Imitation(copy.deepcopy(teacher), teacher)(batch(), context())
    assert float(loss.total.detach()) < 1e-12
    assert float(Imitation(denoiser(seed=1), teacher)(batch(), context()).total.detach()) > 1e-3
    assert set(Imitation(denoiser(seed=1), teacher).players()) == {"student"}


def test_its_gradient_is_that_of_denoising_less_what_the_teacher_has_not_learnt():
    """d|s - v|^2 = d|s - teacher|^2 + 2 (teacher - v) ds: over many draws both agree where the teacher is the mean of v."""
    teacher, student = denoiser(), denoiser(seed=1)
    with torch.no_grad():
        for p in teacher.parameters():
            p.zero_()  # says 0, the mean of v = noise - x for data of mean 0

    def gradients(objective, repeats=60):
        found = []
        for k in range(repeats):
            student.zero_grad()
            objective(
                {"x": torch.randn(16, 2, 8, 8, generator=torch.Generator().manual_seed(k))}, context(16, k)
            ).total.backward()
            found.append(student.net.final.project.bias.grad.clone())
        return torch.stack(found)

    imitated = gradients(Imitation(student, teacher))
    denoised = gradients(Denoising(student))
    error = (imitated.mean(0) - denoised.mean(0)).norm()
    assert float(error) < 0.25 * float(imitated.mean(0).norm()) + 0.02
    assert float(imitated.std(0).norm()) < float(denoised.std(0).norm())


def test_the_data_have_the_weight_that_is_given_and_private_conditions_stay_with_the_student():
    teacher, student = denoiser(), denoiser(seed=1)
    plain, mixed = (Imitation(student, teacher, data=w)(batch(), context()) for w in (0.0, 0.5))
    assert float(mixed.total.detach()) == pytest.approx(
        float(plain.total.detach() + 0.5 * mixed.terms["denoising"]), rel=1e-5
    )
    told = batch()
    told["cond"]["expert"] = torch.zeros(8, dtype=torch.int64)
    with pytest.raises(InputError, match="expert"):
        Imitation(student, teacher)(told, context())
    student.reads = {*student.reads, "expert"}
    student.net.forward = (lambda f: lambda x, label, expert, **cond: f(x, label, **cond))(student.net.forward)
    assert torch.isfinite(Imitation(student, teacher, private=["expert"])(told, context()).total)


def test_refusals():
    with pytest.raises(InputError, match="weight"):
        Imitation(denoiser(), denoiser(), data=-1.0)
    with pytest.raises(InputError, match="both alike"):
        Imitation(denoiser("v"), denoiser())(batch(), context())
