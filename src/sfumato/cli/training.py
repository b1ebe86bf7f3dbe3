"""What one process of ``sfumato train`` does: data, network, objective, Trainer, and a pipeline of the result."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfumato.cli.train import PROCESSES, Settings

if TYPE_CHECKING:
    from torch import nn

    from sfumato.cli.data import Pictures
    from sfumato.conditioners import Conditioner
    from sfumato.denoisers import Parametrized
    from sfumato.pipeline import Pipeline

TOKENS = 16
CLASS = "class"  # the name of the condition of class-conditional models
SHOWN = 16  # pictures on a sample sheet
TEXT_NULL = {"text": 0.0, "text_mask": False, "vector": 0.0}


def run(data: str, out: str, settings: Settings, resume: bool) -> None:
    """Train in ``out``; every process of the run calls this with the same arguments."""
    from sfumato.cli._launch import on_cpu
    from sfumato.cli.data import pictures
    from sfumato.objectives import Denoising
    from sfumato.training import Trainer
    from sfumato.training.data import Batches

    found = pictures(data, settings.size)
    kind = condition_of(found, settings)
    conditioner = conditioner_of(found, kind)
    denoiser = denoiser_of(found, kind, settings)
    rate = settings.guidance_dropout
    dropout: Any = {"text": {"text+text_mask+vector": rate}, "label": {CLASS: rate}, "none": 0.0}[kind]
    batches = Batches(
        found, settings.batch, settings.seed, flip=settings.flip, transform=_conditioned(found, kind, conditioner)
    )
    folder = Path(out)

    def keep(players: Mapping[str, nn.Module], it: int) -> None:
        pipeline = bundle(players["denoiser"], conditioner, found, data, settings, it)
        show(pipeline, found, kind, folder / "samples" / f"{it:07d}.png", settings)
        pipeline.save(folder / "pipeline")

    trainer = Trainer(
        Denoising(denoiser, dropout=dropout),
        batches,
        steps=settings.steps,
        out=folder,
        lr=settings.lr,
        warmup=settings.warmup,
        ema=settings.ema,
        clip=settings.clip,
        seed=settings.seed,
        save_every=settings.save_every,
        log_every=settings.log_every,
        sample_every=settings.sample_every,
        on_sample=keep,
        cpu=on_cpu(),
        config={
            k: v
            for k, v in dataclasses.asdict(settings).items()
            if k in ("batch", "objective", "process", "network", "numbers")
        },
    )
    trainer.fit(resume=resume)


def condition_of(found: Pictures, settings: Settings) -> str:
    """'text', 'label' or 'none': what was asked for, or what the data has. InputError where the data lacks it."""
    from sfumato.core.errors import InputError

    if settings.condition == "auto":
        return "text" if found.captioned else "label" if found.classes else "none"
    if (settings.condition == "text" and not found.captioned) or (settings.condition == "label" and not found.classes):
        need = "captions (NAME.txt beside NAME.png)" if settings.condition == "text" else "a sub-folder a class"
        raise InputError(f"condition = {settings.condition}, but the data has no {need}; set condition=none")
    return settings.condition


def conditioner_of(found: Pictures, kind: str) -> Conditioner:
    """What turns prompts or class names into conditions of the finished model."""
    from sfumato import conditioners

    if kind == "text":
        return conditioners.Text(TOKENS)
    return conditioners.Classes({CLASS: found.classes}) if kind == "label" else conditioners.Unconditional()


def denoiser_of(found: Pictures, kind: str, settings: Settings) -> Parametrized:
    """The untrained network of the settings, as a denoiser of the process."""
    import torch

    from sfumato import processes
    from sfumato.denoisers import parametrized

    channels = found.batch([0])["x"].shape[1]
    config: dict[str, Any] = {"channels": channels}
    config |= {"size": settings.size} if settings.network == "dit" else {}
    config |= {"context_channels": 384, "vector_channels": 384} if kind == "text" else {}
    config |= {"embeddings": {CLASS: len(found.classes)}} if kind == "label" else {}
    null: Any = {"text": TEXT_NULL, "label": {CLASS: len(found.classes)}, "none": {}}[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        net = _built(settings, {**config, **settings.numbers})
    return parametrized(net, getattr(processes, PROCESSES[settings.process])(), settings.objective, null=null)


def _built(settings: Settings, config: Mapping[str, Any]) -> nn.Module:
    """The network; InputError where PyTorch cannot make one of the numbers that were given."""
    from sfumato import networks
    from sfumato.core.errors import InputError

    try:
        return networks.build(settings.network, config)
    except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, InputError) or not settings.numbers:
            raise
        given = ", ".join(f"network.{name}={value}" for name, value in settings.numbers.items())
        raise InputError(f"no {settings.network} can be made with {given}: {error}") from error


def _conditioned(found: Pictures, kind: str, conditioner: Conditioner) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """batch -> the batch with its conditions: sentence features are made once for all captions, before the training."""
    if kind == "text":
        from sfumato.networks import EmbeddingTable, SentenceEncoder

        table = EmbeddingTable.of(SentenceEncoder(), found.captions(), TOKENS)

        def features(batch: Mapping[str, Any]) -> dict[str, Any]:
            tokens, mask, pooled = table.encode(batch["caption"], TOKENS)
            return {"text": tokens, "text_mask": mask, "vector": pooled * pooled.shape[-1] ** 0.5}

    def transform(batch: dict[str, Any]) -> dict[str, Any]:
        cond = {"text": lambda: features(batch), "label": lambda: {CLASS: batch["label"]}, "none": dict}[kind]()
        return {"x": batch["x"], "cond": cond}

    return transform


def bundle(
    denoiser: Any, conditioner: Conditioner, found: Pictures, data: str, settings: Settings, it: int
) -> Pipeline:
    """The model after ``it`` steps, with a card that says how it was made."""
    import sfumato
    from sfumato import codecs
    from sfumato.pipeline import Pipeline

    channels = found.batch([0])["x"].shape[1]
    card = {
        "what": f"{settings.network} trained on {Path(data).name} for {it} steps",
        "data": {"source": Path(data).name, "pictures": len(found)},
        "settings": json.loads(json.dumps(dataclasses.asdict(settings))),
        "sfumato": sfumato.__version__,
    }
    return Pipeline(denoiser, codecs.Identity(channels), conditioner, (settings.size, settings.size), card=card)


def show(pipeline: Pipeline, found: Pictures, kind: str, path: Path, settings: Settings) -> None:
    """A sheet of samples, always with the same seed and the same prompts or classes, to compare over a training."""
    from sfumato.cli._pictures import save, sheet

    prompts: Any = SHOWN
    if kind == "text":
        prompts = (found.some(SHOWN)["caption"] * SHOWN)[:SHOWN]
    elif kind == "label":
        prompts = [found.classes[i % len(found.classes)] for i in range(SHOWN)]
    images = pipeline.generate(prompts, seed=settings.seed)
    save(sheet(images), path, {**pipeline.card, "prompts": prompts if isinstance(prompts, list) else None})
