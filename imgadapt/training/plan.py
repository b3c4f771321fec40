"""Plan: what a training should be, of a folder of pictures and the little that a user says, with reasons.

The figures per base are starting points that the field's trainers share (ai-toolkit's, OneTrainer's and sd-scripts' own
defaults); those of the embedded base were measured, see docs/training.md.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch

from imgadapt.errors import ConfigError
from imgadapt.methods import DoRA, LoRA, Method
from imgadapt.prompting import Prompting
from imgadapt.training import rates, spelling, subject, words
from imgadapt.training.config import DreamBoothConfig, InversionConfig, TrainConfig
from imgadapt.training.data import Example, scan
from imgadapt.training.families import folder as base_folder
from imgadapt.training.families import hub, single_file

Kind = Literal["style", "character", "concept"]
PROGRAMS: Mapping[Kind, tuple[str, type[TrainConfig]]] = {
    "style": ("style", TrainConfig),
    "character": ("dreambooth", DreamBoothConfig),
    "concept": ("textual_inversion", InversionConfig),
}
"""What each kind is trained by, and its settings."""


@dataclass(frozen=True)
class Usual:
    """What is usual for a kind of base.

    passes: how often each picture is seen; least, most: samples in all. text: rate of the text encoder, None: none.
    """

    rank: Mapping[str, int]
    rate: float
    passes: Mapping[str, int]
    least: int
    most: int
    batch: int
    min_snr: bool = False
    text: float | None = None
    convolutions: bool = False
    precision: Literal["fp32", "bf16"] = "bf16"


_RANKS, _PASSES = {"character": 16, "style": 32, "concept": 8}, {"character": 80, "style": 60, "concept": 100}
USUAL: Mapping[str, Usual] = {
    "demo": Usual({"character": 8, "style": 8, "concept": 4}, 2e-3, {"character": 60, "style": 50, "concept": 60}, 800,
                  2000, 16, convolutions=True, precision="fp32"),
    "sd1": Usual(_RANKS, 1e-4, _PASSES, 1500, 12000, 4, min_snr=True, text=5e-5),
    "sd2": Usual(_RANKS, 1e-4, _PASSES, 1500, 12000, 4, min_snr=True, text=5e-5),
    "sdxl": Usual(_RANKS, 1e-4, _PASSES, 1500, 12000, 2, min_snr=True),
    "sd3": Usual(_RANKS, 1e-4, _PASSES, 1500, 12000, 2),
    "flux": Usual({"character": 16, "style": 16, "concept": 8}, 1e-4, _PASSES, 1000, 8000, 1),
}  # fmt: skip
_FILES = {"v1": "sd1", "v2": "sd2", "xl_base": "sdxl", "sd3": "sd3", "sd35_medium": "sd3", "sd35_large": "sd3",
          "flux-dev": "flux", "flux-schnell": "flux"}  # fmt: skip
_CLASSES = {"StableDiffusionXLPipeline": "sdxl", "StableDiffusion3Pipeline": "sd3", "FluxPipeline": "flux"}


@dataclass(frozen=True)
class Plan:
    """A whole config, the kind of training, and why its values are what they are."""

    config: TrainConfig
    kind: Kind
    why: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def program(self) -> str:
        """The program that runs it."""
        return PROGRAMS[self.kind][0]

    @property
    def rows(self) -> list[tuple[str, str, str]]:
        """(setting, value, reason) of what was planned, in words."""
        values = {"kind": self.kind, **self.config.model_dump()}
        return [(name, _in_words(values[name]), reason) for name, reason in self.why.items()]

    def __str__(self) -> str:
        shown = self.rows
        wide = [max((len(row[k]) for row in shown), default=0) for k in (0, 1)]
        return "\n".join(f"  {n:<{wide[0]}}  {v:<{min(wide[1], 40)}}  {reason}" for n, v, reason in shown)


def _in_words(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, cast("Sequence[object]", value)))
    if isinstance(value, dict):
        return ", ".join(f"{key} {one}" for key, one in cast("Mapping[str, object]", value).items())
    return str(value)


def kind_of_base(base: str) -> str:
    """A key of USUAL, from names and config files only; "sd1" where nothing tells.

    Raises:
        ConfigError: there is no such base, or its settings cannot be read.
    """
    if base == "demo":
        return "demo"
    if base in hub.NAMES:
        return next(kind for kind in USUAL if base.startswith(kind))
    path = Path(base).expanduser()
    if path.is_file():
        return _FILES[single_file.kind_of(path, single_file.shapes(path))]
    folder = path if path.is_dir() else hub.folder(base)
    index, unet = folder / "model_index.json", folder / "unet" / "config.json"
    if not index.is_file():
        raise ConfigError(
            f"base {base} has no model_index.json; wanted 'demo', a diffusers folder, or a checkpoint file"
        )
    return _of_class(str(base_folder.read(index).get("_class_name")), base_folder.read(unet) if unet.is_file() else {})


def _of_class(name: str, unet: Mapping[str, Any]) -> str:
    if name in _CLASSES:
        return _CLASSES[name]
    side = unet.get("sample_size")
    if isinstance(side, int) and 0 < side < 32:
        return "demo"  # so small a base learns as the embedded one does
    return "sd2" if unet.get("cross_attention_dim") == 1024 else "sd1"


def of(given: Mapping[str, Any], kind: Kind | None = None) -> Plan:
    """The plan for what a user gave: settings by name, and the kind, which is guessed where it is not said.

    Raises:
        ConfigError: see `TrainConfig.of`, `kind_of_base`. DataError: see `scan`.
    """
    if "folder" not in given:
        raise ConfigError("'folder' is not given: imgadapt train ./pictures")
    shared = {name: value for name, value in given.items() if name in TrainConfig.model_fields}
    said = TrainConfig.of(shared)
    given = {**given, **{name: getattr(said, name) for name in shared}}
    why: dict[str, str] = {}
    examples = scan(Path(given["folder"]), given.get("caption") or _stand_in(given, kind), given.get("trigger"))
    if kind is None:
        kind, why["kind"] = _guess(given, examples)
    settings = PROGRAMS[kind][1]
    base = kind_of_base(str(given.get("base", "demo")))
    chosen = _choices(given, kind, base, examples)
    values = {name: value for name, (value, _) in chosen.items() if name in settings.model_fields}
    config = settings.of({**values, **given})
    if isinstance(config, DreamBoothConfig):  # what their programs will say, before anything is planned
        subject.with_caption(config)
    if isinstance(config, InversionConfig):
        words.settled(config)
    why |= {name: chosen[name][1] for name in values if name not in given}
    return Plan(config, kind, why)


def _stand_in(given: Mapping[str, Any], kind: Kind | None) -> str | None:
    """A caption for pictures without one, where the kind will give them one."""
    return "a picture" if kind == "concept" or given.get("class_prompt") else None


def _guess(given: Mapping[str, Any], examples: Sequence[Example]) -> tuple[Kind, str]:
    if "word" in given:
        return "concept", "a word is given"
    if "class_prompt" in given or "preservation" in given:
        return "character", "it has a class; ask for kind style otherwise"
    if given.get("trigger") and len(examples) <= 60:
        return "character", f"a trigger word and {len(examples)} pictures; ask for kind style otherwise"
    return "style", "no trigger word; a subject takes kind character and a trigger word"


def _choices(
    given: Mapping[str, Any], kind: Kind, base: str, examples: Sequence[Example]
) -> dict[str, tuple[Any, str]]:
    """Setting -> (value, reason)."""
    usual, count = USUAL[base], sum(example.repeats for example in examples)
    named = {"demo": "the embedded base", "sd1": "SD1", "sd2": "SD2", "sdxl": "SDXL", "sd3": "SD3", "flux": "Flux"}[
        base
    ]
    batch = int(given.get("batch_size", usual.batch))
    samples = min(max(usual.passes[kind] * count, usual.least), usual.most)
    steps = max(20, -(-samples // batch))
    taken = int(given.get("steps", steps))
    held_out = 0 if given.get("held_out") or count < 20 or kind == "concept" else min(4, count // 10)
    text = None
    if usual.text and kind == "character" and _takes_text(given):
        text = float(f"{usual.text * rates.over_lora(given)[0]:.3g}")
    targets = ["transformer", *(["convolution"] if usual.convolutions else []), *(["text"] if text else [])]
    of_targets = (
        "attention and feed-forward layers" + ", convolutions" * usual.convolutions + ", the text encoder" * bool(text)
    )
    if _for_norms(given):
        targets, of_targets = ["norm*"], "the layers that it is for"
    rank = usual.rank[kind]
    chosen: dict[str, tuple[Any, str]] = {
        "output": (Path(f"{Path(given['folder']).resolve().name}-{kind}"), "named after the folder"),
        "targets": (targets, of_targets),
        "learning_rate": _rate(given, usual, named),
        "batch_size": (batch, f"usual on {named}; computed in pieces where memory is short"),
        "steps": (steps, f"{count} pictures, each seen {samples / count:.0f} times"),
        "warmup_steps": (min(100, max(5, taken // 20)), "a twentieth, 5 at least"),
        "checkpoint_every": (max(20, min(250, taken // 10)), "the last two are kept"),
        "precision": _precision(usual),
        "sample_prompts": _prompts(given, kind, examples),
        "flip": (kind == "style", "a style has no sides" if kind == "style" else "faces and writing have sides"),
    }  # fmt: skip
    if not given.get("held_out"):
        reason = "tells which snapshot is best" if held_out else "too few pictures to spare one"
        chosen["held_out_count"] = (held_out, reason)
    if _ranked(given):
        chosen["rank"] = (rank, f"usual for a {kind} on {named}")
    if text:
        chosen["learning_rates"] = ({"text_encoder*": text}, f"usual for the text encoder of {named}")
    if kind == "style" and usual.min_snr and not given.get("debiased"):
        chosen["min_snr_gamma"] = (5.0, "learns a style in fewer steps (arXiv 2303.09556)")
    if given.get("optimizer") == "schedule-free":
        chosen["schedule"] = ("constant", "a schedule-free optimiser averages instead")
    if kind == "character":
        chosen["preservation"] = ("class-free", "keeps the rest of the class, without class pictures")
    if kind == "concept" and not given.get("adapter"):  # the word's own rate is another setting
        for name in ("targets", "learning_rate", "rank"):
            chosen.pop(name, None)
    if isinstance(spelling.method(str(given.get("method", "lora")), {}), Prompting):  # which has no layers
        for name in ("targets", "learning_rates"):
            chosen.pop(name, None)
    return chosen


def _for_norms(given: Mapping[str, Any]) -> bool:
    made = spelling.method(str(given.get("method", "lora")), {})
    return isinstance(made, Method) and made.kinds == ("norm",)


def _takes_text(given: Mapping[str, Any]) -> bool:
    """Whether text encoders may be trained, and at a rate of their own."""
    made = spelling.method(str(given.get("method", "lora")), {})
    if given.get("optimizer") == "prodigy" or (isinstance(made, Method) and made.timed):
        return False  # the one has one rate for all, and text encoders know no time
    return "targets" not in given or any(target.startswith("text") for target in given["targets"])


def _ranked(given: Mapping[str, Any]) -> bool:
    """Whether the method is low-rank in the way that the usual ranks are for, and says none itself."""
    text = str(given.get("method", "lora"))
    made = spelling.method(text, {})
    return "rank=" not in text.replace(" ", "") and isinstance(made.inner if isinstance(made, DoRA) else made, LoRA)


def _rate(given: Mapping[str, Any], usual: Usual, named: str) -> tuple[float, str]:
    if given.get("optimizer") == "prodigy":
        return 1.0, "prodigy finds the rate; this is a factor"
    factor, why = rates.over_lora(given)
    return float(f"{usual.rate * factor:.6g}"), ", ".join([f"usual on {named} with AdamW", *why])


def _precision(usual: Usual) -> tuple[str, str]:
    if usual.precision == "fp32":
        return "fp32", "the base is small"
    if torch.cuda.is_available() and not torch.cuda.is_bf16_supported():
        return "fp16", "this GPU has no bf16"
    return "bf16", "half the memory; the adapter itself is fp32"


def _prompts(given: Mapping[str, Any], kind: Kind, examples: Sequence[Example]) -> tuple[list[str], str]:
    if kind == "style":
        spread = examples[:: max(1, len(examples) // 3)][:3]
        return list(dict.fromkeys(example.captions[0] for example in spread)), "captions of yours"
    name = str(given.get("word") or given.get("trigger") or "")
    other = str(given.get("class_prompt", ""))
    subject = f"{name} {other.removeprefix('a ').removeprefix('an ')}".strip() or examples[0].captions[0]
    return [subject, f"{subject} on a beach", *([other] if other else [])], "the subject, elsewhere, and its class"
