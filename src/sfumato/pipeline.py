"""A named bundle of parts with a card: what ``sf.load`` gives and ``save`` keeps."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sfumato import acceleration, codecs, conditioners, grids, networks, processes, solvers
from sfumato import guidance as guidances
from sfumato.acceleration.keeping import digest, kept
from sfumato.core import Context, Grid, Guidance, InputError, Solver, Step, Streams, trajectory
from sfumato.denoisers import Parametrized, parametrized
from sfumato.files import bundled_models, write_atomically
from sfumato.guidance import cfg

if TYPE_CHECKING:
    from sfumato.denoisers.lora import Adapter
    from sfumato.tuning.card import SamplerCard

FORMAT = 1
CALIBRATION = 1  # a number for the way calibration sets are made: another one makes them again
OWN = "save networks of sfumato.networks, or keep the weights of your own yourself"
ELSEWHERE = ("emoji-latent-", "emoji-study", "medical")  # of the zoo, what a wheel leaves to the package sfumato-zoo


@dataclass
class Pipeline:
    """Denoiser, codec, conditioner and a default sampler; no logic of its own beyond handing them to each other.

    solver, grid  specs such as "dpm-solver++(order=3)", or objects (a pipeline with objects cannot be saved)
    guidance      a classifier-free scale, a spec such as "apg(scale=4)", or any Denoiser -> Denoiser
    size          (height, width) of the images it makes
    card          origin, licence, training, scores: JSON-able
    """

    denoiser: Parametrized
    codec: codecs.Codec
    conditioner: conditioners.Conditioner = field(default_factory=conditioners.Unconditional)
    size: tuple[int, int] = (32, 32)
    solver: str | Solver = "dpm-solver++"
    grid: str | Grid = "arctan"
    steps: int = 20
    guidance: float | str | Guidance = 1.0
    card: dict[str, Any] = field(default_factory=dict)

    @property
    def process(self) -> Any:
        """The noising law."""
        return self.denoiser.process

    def to(self, *place: Any) -> Pipeline:
        """Network and codec moved to a device or a floating dtype, in place as ``nn.Module.to`` does; the pipeline itself."""
        self.denoiser.to(*place), self.codec.to(*place)
        return self

    def guided(self, guidance: float | str | Guidance | None = None) -> Any:
        """The denoiser under this guidance (default: the pipeline's own)."""
        chosen = self.guidance if guidance is None else guidance
        if isinstance(chosen, str):
            chosen = guidances.get(chosen, load=lambda name: load(name).denoiser)
        if isinstance(chosen, (int, float)):
            return cfg(float(chosen))(self.denoiser) if chosen != 1 else self.denoiser
        guided = chosen(self.denoiser)
        codec = getattr(self.codec, "codec_name", type(self.codec).__name__)
        if codec != "identity" and any(getattr(m, "pixels", False) for m in guided.modules()):
            raise InputError(
                f"thresholding is for pixels, and this model runs on the codes of a {codec} codec: leave it out"
            )
        return guided

    def accelerated(self, by: str | Guidance) -> Pipeline:
        """The same pipeline with less work a call: a spec such as "deepcache(interval=3)" or "int8", or any Denoiser -> Denoiser.

        It is put inside guidance. ``sfumato.acceleration.names()`` lists the registered ones.
        """
        if not (isinstance(by, str) or callable(by)):
            kinds = "a spec such as 'deepcache(interval=3)' or Denoiser -> Denoiser"
            raise InputError(f"an acceleration is {kinds}, not {by!r}")
        wrap = acceleration.get(by, self.calibration) if isinstance(by, str) else by
        made: Any = wrap(self.denoiser)
        return dataclasses.replace(self, denoiser=made)

    def calibration(self, n: int = 64, steps: int = 20, seed: int = 1) -> acceleration.Calibration:
        """What the network meets in n of the pipeline's own runs, of what it knows by name: see ``acceleration.denoised``.

        It is kept in the cache folder (``$SFUMATO_CACHE``, else ``~/.cache/sfumato``), under all that it depends on, and read from
        there the next time; that of a pipeline with objects for its grid or guidance, or with a wrapped network, is not.
        """
        cond, shape = self.conditions(n, self.conditioner.in_turn(n, seed)), self.codec.shape(*self.size)

        def make() -> acceleration.Calibration:
            run: dict[str, Any] = {"cond": cond, "grid": self.grid, "steps": steps, "dropout": 0.3, "seed": seed}
            return acceleration.denoised(self.guided(), n, shape, **run)

        named = all(isinstance(given, (str, int, float)) for given in (self.grid, self.guidance))
        if not named or type(self.denoiser) is not Parametrized:
            return make()
        d = self.denoiser
        label = [str(t if d.clock is None else d.clock(t)) for t in (0.1, 0.5, 0.9)]
        facts = CALIBRATION, _fingerprint(d), d.null, d.data_std, label, self.grid, self.guidance, shape, n, steps, seed
        name = f"calibration-{digest(map(str, facts), cond)}"
        return kept(
            f"calibration on {n} runs of {steps} steps", name, lambda: make().packed(), acceleration.Calibration.of
        )

    def conditions(self, n: int, prompts: Sequence[str] | None = None, **raw: Any) -> dict[str, Any]:
        """What the network reads, for n images."""
        return self.conditioner(n, prompts, **raw)

    @torch.no_grad()
    def generate(
        self,
        prompts: int | str | Sequence[str],
        *,
        steps: int | None = None,
        solver: str | Solver | None = None,
        grid: str | Grid | None = None,
        guidance: float | str | Guidance | None = None,
        seed: int | Sequence[int] = 0,
        cond: Mapping[str, Any] | None = None,
        negative: str | Sequence[str] = (),
        also: str | Sequence[str] = (),
        regions: Sequence[tuple[Any, str]] = (),
        accelerate: str | Guidance | None = None,
        size: tuple[int, int] | None = None,
        batch: int = 32,
        sampler: SamplerCard | str | Path | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """uint8 images (B, 3, H, W) for prompts (one, or one an image), or n images without prompts.

        ``cond`` holds raw conditions by name ({"vendor": "noto"}). Image i depends on (seed, i) only: not on ``batch``.
        ``negative`` is what guidance leads away from, in all images ('perp-neg' takes several). ``also`` are further
        prompts of every image, averaged ('composed') unless the guidance says how they join: "cfg(4) | interpolated",
        'superposition', 'alternating', 'switched'. ``regions`` are prompts of parts of the picture, (where, prompt) each,
        where = (left, top, right, bottom) in shares of it or a mask (H, W) in [0, 1]. ``accelerate`` is that of
        :meth:`accelerated`. ``sampler`` is a sampler card (``sf.tune``) or its file, in the place of steps, solver and grid;
        it brings its guidance, its start where it has one ('dpm-ot', 'optimal-bc'), and refuses another model. ``progress(done, total)`` is told of each step.
        """
        card = None if sampler is None else self._card(sampler, guidance, steps, solver, grid)
        if card is not None:
            steps, solver, grid = card.steps, card.solver(), card.grid()
            guidance = card.guidance if guidance is None else guidance
        if not isinstance(prompts, (int, str, Sequence)):
            raise InputError(f"prompts = {prompts!r}: a text, several texts, or the number of images")
        texts = None if isinstance(prompts, int) else [prompts] if isinstance(prompts, str) else list(prompts)
        n = prompts if isinstance(prompts, int) else len(texts or ())
        if n < 1:
            raise InputError(f"{n} images: at least one")
        total, size = self.steps if steps is None else steps, size or self.size
        conditions = self.conditions(n, texts, **(cond or {})) | self._beside(
            n, negative, also, regions, size, cond or {}
        )
        source, chosen = self if accelerate is None else self.accelerated(accelerate), solver or self.solver
        denoiser = source._composed(guidance, bool(negative), bool(also), bool(regions))
        denoiser = denoiser if card is None else card.prepared(denoiser)
        method = solvers.registry.make(chosen) if isinstance(chosen, str) else chosen
        times = (method.grid or self.grid) if grid is None else grid
        times = grids.registry.make(times) if isinstance(times, str) else times
        weights = self._weights()
        streams, shape, out = Streams.of(seed, n), self.codec.shape(*size), []
        begin = None if card is None else card.begin()
        for low in range(0, n, batch):
            rows = slice(low, min(low + batch, n))
            part = {k: v[rows].to(weights if v.is_floating_point() else weights.device) for k, v in conditions.items()}
            place: dict[str, Any] = {"device": weights.device, "dtype": weights.dtype}
            ctx = Context(cond=part, rng=streams.select(rows), batch=rows.stop - low, **place)
            begun: dict[str, Any] = {"shape": (rows.stop - low, *shape)}
            if begin is not None and card is not None:
                begun = {"x": begin(self.process, begun["shape"], ctx), "start": card.start}
            for st in trajectory(denoiser, method, times, total, ctx=ctx, **begun):
                if progress is not None:
                    progress(low // batch * total + st.index, -(-n // batch) * total)
            x: Any = method.read(st)
            out.append(self.codec.images(x))
        return torch.cat(out)

    def _weights(self) -> Tensor:
        """Like a state: where the network is and as precise, but float32 at least for one that casts what it reads."""
        found = next((p for p in self.denoiser.parameters() if p.is_floating_point()), torch.empty(0))
        casts = any(getattr(m, "casts", False) for m in self.denoiser.modules())
        return found.new_empty(0, dtype=torch.promote_types(found.dtype, torch.float32) if casts else found.dtype)

    def _beside(
        self, n: int, negative: str | Sequence[str], also: str | Sequence[str], regions: Sequence[Any],
        size: tuple[int, int], cond: Mapping[str, Any],
    ) -> dict[str, Any]:  # fmt: skip
        """What stands beside the conditions of the pictures; further prompts and regions keep the others of their picture."""
        away, joined = ([given] if isinstance(given, str) else given for given in (negative, also))
        found = guidances.negative(*(self.conditions(n, [text] * n) for text in away if text))
        found |= guidances.also(*(self.conditions(n, [text] * n, **cond) for text in joined if text))
        placed = []
        for where, prompt in regions:
            if isinstance(where, Tensor):
                mask = where[None, None]
            else:
                left, top, right, bottom = where
                mask = guidances.box(left, top, right, bottom, size)
            placed.append((mask, self.conditions(n, [prompt] * n, **cond)))
        return found | guidances.regions(n, *placed)

    def _composed(self, guidance: float | str | Guidance | None, negative: bool, also: bool, regions: bool) -> Any:
        """The denoiser under guidance that uses what was asked, or InputError where it would be ignored."""
        denoiser = self.guided(guidance)
        kinds = [type(m) for m in denoiser.modules()]
        if negative and not any(issubclass(kind, guidances.ClassifierFree) for kind in kinds):
            raise InputError("guidance leads away from a negative prompt: give a scale above 1, or 'apg', 'perp-neg'")
        if also and not any(getattr(m, "joins", False) for m in denoiser.modules()):
            denoiser = guidances.composed()(denoiser)
        return guidances.regional()(denoiser) if regions and guidances.Regional not in kinds else denoiser

    def _card(
        self, sampler: SamplerCard | str | Path, guidance: float | str | Guidance | None, *others: Any
    ) -> SamplerCard:
        """The sampler card, if it may be used here."""
        from sfumato.tuning.card import SamplerCard

        card = SamplerCard.of(sampler)
        if any(other is not None for other in others):
            raise InputError("a sampler card brings its own steps, solver and grid: give either sampler= or those")
        if card.stop != 0.0 or (card.start != 1.0 and card.begins is None):
            raise InputError(f"this card's sampler runs from t = {card.start} to {card.stop}, not from noise to data")
        inner = next((m for m in self.denoiser.modules() if isinstance(m, Parametrized)), self.denoiser)
        card.check(inner, guidance if isinstance(guidance, (int, float, str)) else None)
        return card

    @torch.no_grad()
    def invert(
        self,
        images: Tensor,
        prompts: Sequence[str] | None = None,
        *,
        steps: int = 50,
        solver: str | Solver = "ddim",
        cond: Mapping[str, Any] | None = None,
    ) -> Step:
        """The start (t = 1) whose sampling gives these images (B, 3, H, W) back, to the solver's accuracy."""
        sampler = solvers.registry.make(solver) if isinstance(solver, str) else solver
        times = grids.registry.make(self.grid) if isinstance(self.grid, str) else self.grid
        conditions = self.conditions(len(images), prompts, **(cond or {}))
        x = self.codec.encode(images).to(self._weights())
        for st in trajectory(self.denoiser, sampler, times, steps, x=x, start=0.0, stop=1.0, cond=conditions):
            last = st
        return last.restart()

    def taught(self, denoiser: Any, **fields: Any) -> Pipeline:
        """The same pipeline with a student of its network in it, and its sampler and card."""
        return dataclasses.replace(self, denoiser=denoiser, **fields)

    def save(self, path: str | Path, *, base: str | None = None, adapter: Adapter | None = None) -> Path:
        """Write ``pipeline.json`` and ``model.safetensors`` (half precision) into the folder ``path``.

        With ``base``, the name of a bundled model, and the ``adapter`` that makes its network this one, the adapter alone is
        kept, in full precision: loading puts it into that model, and refuses another one of the same name.
        """
        from safetensors.torch import save as serialise

        description, folder = self.description(), Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        if base is not None and adapter is not None:
            description["base"] = {"model": base, "fingerprint": _fingerprint(load(base).denoiser)}
            adapter.save(folder / "model.safetensors", prefix="adapter")
            write_atomically(folder / "pipeline.json", json.dumps(description, indent=1, ensure_ascii=False).encode())
            return folder
        tensors = {f"network.{k}": v for k, v in self.denoiser.net.state_dict().items()}
        tensors |= {f"codec.{k}": v for k, v in self.codec.state_dict().items()}
        half = {k: (v.half() if v.is_floating_point() else v).contiguous().clone() for k, v in tensors.items()}
        write_atomically(folder / "model.safetensors", serialise(half))
        write_atomically(folder / "pipeline.json", json.dumps(description, indent=1, ensure_ascii=False).encode())
        return folder

    def description(self) -> dict[str, Any]:
        """All but the weights, JSON-able."""
        if not isinstance(self.denoiser, Parametrized):
            around = type(self.denoiser).__name__
            raise InputError(f"a {around} around the network is not kept: save the pipeline without it")
        net: Any = self.denoiser.net
        if not hasattr(net, "network_name"):
            raise InputError(f"a {type(net).__name__} cannot be made again from a name: {OWN}")
        with torch.device("meta"):
            named = networks.build(net.network_name, net.config)
        if {k: v.shape for k, v in named.state_dict().items()} != {k: v.shape for k, v in net.state_dict().items()}:
            what = f"the network is no longer the {net.network_name} of its configuration (quantised or pruned)"
            raise InputError(f"{what}, and is not kept: save the pipeline without that")
        for name in ("solver", "grid", "guidance"):
            given = getattr(self, name)
            if not isinstance(given, (str, int, float)):
                raise InputError(f"to save a pipeline give its {name} as a spec, not as a {type(given).__name__}")
        return {
            "format": FORMAT,
            "network": {"name": net.network_name, "config": net.config},
            "predicts": self.denoiser.predicts,
            "data_std": self.denoiser.data_std,
            "null": dict(self.denoiser.null),
            "process": {"name": type(self.process).__name__, "numbers": dataclasses.asdict(self.process)},
            "codec": {"name": self.codec.codec_name, "config": self.codec.config},
            "conditioner": {"name": self.conditioner.name, "config": dict(self.conditioner.config)},
            "size": list(self.size),
            "solver": self.solver,
            "grid": self.grid,
            "steps": self.steps,
            "guidance": self.guidance,
            "card": self.card,
        }


def load(name_or_path: str | Path) -> Pipeline:
    """A bundled model by name (``sfumato zoo`` lists them), or a folder that ``Pipeline.save`` or a training wrote."""
    folder = find(name_or_path)
    try:
        d = json.loads((folder / "pipeline.json").read_text())
    except json.JSONDecodeError as error:
        raise InputError(f"{folder / 'pipeline.json'} is not JSON ({error}): the file is damaged") from error
    if d.get("format") != FORMAT:
        raise InputError(f"{folder} has format {d.get('format')!r}; this version reads format {FORMAT}")
    if "base" in d:
        net, codec = _adapted(folder, d["base"])
    else:
        net = networks.build(d["network"]["name"], d["network"]["config"])
        codec = codecs.build(d["codec"]["name"], d["codec"]["config"])
        _fill({"network": net, "codec": codec}, folder / "model.safetensors")
    numbers = {k: tuple(v) if isinstance(v, list) else v for k, v in d["process"]["numbers"].items()}
    process = getattr(processes, d["process"]["name"])(**numbers)
    denoiser = parametrized(net.eval(), process, d["predicts"], null=d["null"], data_std=d["data_std"])
    conditioner = conditioners.registry.get(d["conditioner"]["name"], **d["conditioner"]["config"])
    fields = {k: d[k] for k in ("solver", "grid", "steps", "guidance", "card")}
    if isinstance(fields["guidance"], str):
        guidances.get(fields["guidance"])  # says at once where it is none
    return Pipeline(denoiser, codec.eval(), conditioner, tuple(d["size"]), **fields)


def _adapted(folder: Path, base: Mapping[str, str]) -> tuple[Any, Any]:
    """(network, codec) of a bundled model with the adapter of this folder in it."""
    from sfumato.denoisers import lora

    source = load(base["model"])
    found = _fingerprint(source.denoiser)
    if found != base["fingerprint"]:
        raise InputError(
            f"{folder} is an adapter of {base['model']} with the fingerprint {base['fingerprint']}; the installed one has {found}: "
            "make it again from this one"
        )
    return lora.merge(source.denoiser, lora.load(folder / "model.safetensors", source.denoiser)).net, source.codec


def _fingerprint(denoiser: Any) -> str:
    from sfumato.tuning.card import fingerprint

    return fingerprint(denoiser)


def find(name_or_path: str | Path) -> Path:
    """The folder of a saved pipeline: a bundled name, the folder itself, or a training's output."""
    for folder in (Path(name_or_path), Path(name_or_path) / "pipeline"):
        if (folder / "pipeline.json").exists():
            return folder
    models = bundled_models("pipeline.json")
    if str(name_or_path) in models:
        return models[str(name_or_path)]
    beside = "; it comes with the package sfumato-zoo, beside the wheel"
    hint = beside if str(name_or_path).startswith(ELSEWHERE) else ""
    if (Path(name_or_path) / "model_index.json").is_file():
        hint = ": it is a pipeline of diffusers, which sf.from_diffusers reads"
    raise FileNotFoundError(
        f"no model {str(name_or_path)!r}{hint}: give a saved folder or one of {', '.join(models) or 'none'}"
    )


def bundled() -> list[str]:
    """Names of the models that came with the installation."""
    return list(bundled_models("pipeline.json"))


def _fill(modules: Mapping[str, torch.nn.Module], path: Path) -> None:
    """Load the weights of each module, as float32; a missing, foreign or truncated tensor is one clear error."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} cannot be read ({error}): the file is missing or damaged") from error
    for name, module in modules.items():
        state = {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}
        state = {k: v.float() if v.is_floating_point() else v for k, v in state.items()}
        try:
            module.load_state_dict(state)
        except RuntimeError as error:
            raise InputError(f"{path} does not fit the {name} that pipeline.json describes: {error}") from error
