"""The makers of all bundled models: ``sfumato zoo make NAME`` trains one, resuming where it was stopped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from sfumato import codecs, conditioners
from sfumato.core import InputError
from sfumato.pipeline import Pipeline
from sfumato.training import Trainer
from sfumato.zoo import captions, emoji, make_digits, make_distilled, make_emoji, make_latent_study, make_medical
from sfumato.zoo.encoders import save_encoder

MAKERS: dict[str, Callable[..., Trainer]] = {
    "digits": make_digits.make_digits,
    "emoji-pixel": make_emoji.make_pixel,
    "emoji-encoder": make_emoji.make_encoder,
    "emoji-judge": make_emoji.make_judge,
    "emoji-autoencoder": make_emoji.make_autoencoder,
    "emoji-latent": make_emoji.make_latent,
    "medical": make_medical.make_medical,
    "medical-regressor": make_medical.make_regressor,
    "medical-autoencoder": make_medical.make_autoencoder,
    **make_distilled.MAKERS,
    **make_latent_study.MAKERS,
}
LICENCES = {
    "medical": (
        "32-pixel patches of Colin27 (mricron-data); ICBM152 (nilearn) is unseen",
        "Apache-2.0; trained on Colin27 of the Montreal Neurological Institute, as Debian's mricron-data carries it "
        "(BSD-3-Clause by its copyright file)",
    ),
    "digits": ("scikit-learn digits, training split", "Apache-2.0; trained on scikit-learn's digits (BSD-3-Clause)"),
    "emoji": (
        "bundled emoji, training split (see the emoji data card)",
        "Apache-2.0; trained on Noto (Apache-2.0), Twemoji (CC-BY-4.0) and Fluent (MIT) drawings",
    ),
}


def trained(name: str, run: Path) -> tuple[Any, dict[str, Any]]:
    """The averaged player of a training in ``run``, finished or not, and what its card says of it."""
    trainer = MAKERS[name](run)
    trainer.load()
    (player,) = list(trainer.averaged().values())[:1]
    data, licence = LICENCES[name.split("-")[0]]
    facts = {
        "made by": f"sfumato zoo make {name}",
        "steps": trainer.it,
        "images seen": trainer.it * int(trainer.config["batch"]),
        "hours": round(trainer.seconds / 3600, 2),
        "data": data,
        "licence": licence,
    }
    return player, facts


def export(name: str, run: Path, out: Path) -> Path:
    """Write the model of a training as it is bundled: half-precision weights, JSON and card."""
    player, facts = trained(name, run)
    if name in ("emoji-encoder", "emoji-judge", "medical-regressor", "medical-autoencoder"):
        save_encoder(player, out, facts)
        return out
    vendors = conditioners.Text(captions.TOKENS, {"vendor": list(emoji.VENDORS)}, table=captions.TABLE)
    if name == "medical":
        return make_medical.bundle(player, facts).save(out)
    if name == "digits":
        return make_digits.bundle(player, facts).save(out)
    if name == "emoji-pixel":
        return Pipeline(player, codecs.Identity(), vendors, (32, 32), steps=20, guidance=5.0, card=facts).save(out)
    if name == "emoji-latent":
        codec = make_emoji.latent_codec(run.parent / "emoji-autoencoder")
        facts["codec"] = trained("emoji-autoencoder", run.parent / "emoji-autoencoder")[1]
        return Pipeline(player, codec, vendors, (64, 64), steps=20, guidance=3.0, card=facts).save(out)
    if name in make_distilled.MAKERS:
        if name in make_distilled.BEGINS:
            first = make_distilled.BEGINS[name]
            facts["begins with"] = trained(first, run.parent / first)[1]
        return make_distilled.bundle(player, facts, name).save(out)
    if name.startswith("emoji-study-f"):
        factor = int(name.removeprefix("emoji-study-f"))
        if factor > 1:
            codec_name = f"emoji-study-codec-f{factor}"
            facts["codec"] = trained(codec_name, run.parent / codec_name)[1]
        return make_latent_study.bundle(player, facts, run, factor).save(out)
    raise InputError(f"{name!r} is a part of another model and is not bundled by itself")


def make(name: str, run: Path, **numbers: Any) -> None:
    """Train the named model in the folder ``run``, resuming what is there."""
    if name not in MAKERS:
        raise InputError(f"no model {name!r} is made here; there are: {', '.join(MAKERS)}")
    MAKERS[name](run, **numbers).fit()
