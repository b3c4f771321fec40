"""Report: one page, complete in itself, that says what a run was, how it went, what it learnt and how to repeat it."""

import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jinja2
import torch
from markupsafe import Markup
from PIL import Image, ImageOps
from tqdm import tqdm

from imgadapt import __version__
from imgadapt.atomic import write_bytes
from imgadapt.errors import ConfigError
from imgadapt.file import AdapterFile, load
from imgadapt.training import flags
from imgadapt.training.config import DreamBoothConfig, InversionConfig, TrainConfig
from imgadapt.training.evidence import Evidence
from imgadapt.training.families import Family
from imgadapt.training.material import Material
from imgadapt.training.metadata import _PERSONAL as PERSONAL
from imgadapt.training.report import gallery, norms, readings, scores
from imgadapt.training.report.charts import Chart, Line, number, svg
from imgadapt.training.report.readings import Readings
from imgadapt.training.report.verdicts import verdicts

_PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "safetensors")
_HIDDEN = (*PERSONAL, "score_with")


@dataclass(frozen=True)
class Outcome:
    """What a finished job has: its files, the trained one first; what it was trained on; the largest difference between
    the predictions of the files, read back, and the live model's; in how many pieces a batch was computed in the end.
    """

    paths: Sequence[Path]
    material: Material
    worst: float
    pieces: int


def write(config: TrainConfig, family: Family, evidence: Evidence, outcome: Outcome) -> Path:
    """Write OUTPUT/report.html: from the logs in OUTPUT, and from pictures that are drawn now.

    family: its pipeline is bare, and is so again afterwards. A log that is not there is said so in the page. The same
    run gives the same bytes: there is no date in it. With `private` it has no words, names or paths of the user's.

    Raises:
        OutputError: it cannot be written.
    """
    path = config.output / "report.html"
    write_bytes(path, page(config, family, evidence, outcome).encode())
    return path


def page(config: TrainConfig, family: Family, evidence: Evidence, outcome: Outcome) -> str:
    """The page as HTML; see `write`."""
    log = readings.read(config.output)
    file = load(outcome.paths[0])
    measured = norms.measure(family.pipeline, file)
    examples = list(dict.fromkeys(view.example for view in outcome.material.views))
    wanted = list(dict.fromkeys(evidence.wanted()))[: gallery.PROMPTS]
    best = None if log.best is None else int(log.best["step"])
    shown = gallery.snapshots(evidence.snapshots, best, outcome.paths[0])
    rows, unseen = gallery.draw(family, shown, config.strengths, wanted, evidence.side) if wanted else ([], [])
    counts = {name: len(material.views) for name, material in evidence.materials.items()}
    bins = readings.bins(log, evidence.objective.schedule.total)
    scored, unscored = _scores(config, family, rows, wanted, examples)
    said = [f"prompt {k + 1}" for k in range(len(wanted))] if config.private else wanted
    return _template().render(
        title="adapter" if config.private else config.title or config.output.resolve().name,
        verdicts=verdicts(
            log, measured, pictures=counts, max_grad_norm=config.max_grad_norm, pieces=(config.pieces, outcome.pieces)
        ),
        facts=_facts(config, family, log, file, outcome),
        remarks=log.remarks,
        charts=_charts(config, log),
        smoothed=readings.window(len(log.steps)),
        bins=[(row, _bin_chart(row)) for row in bins] if log.losses else [],
        counts=counts,
        evaluations=log.evaluations,
        best=best,
        prompts=said,
        left_out=len(set(evidence.wanted())) - len(wanted),
        rows=[(row, [gallery.embedded(image) for image in row.images], _label(row)) for row in rows],
        unseen=[
            f"{s.name} is not shown: " + ("its file cannot be read." if config.private else why) for s, why in unseen
        ],
        pixelated=evidence.side <= gallery.SIDE // 2,
        scores=scored,
        unscored="a model cannot be read." if unscored and config.private else unscored,
        blocks=norms.blocks(measured),
        largest=norms.largest(measured),
        large=norms.LARGE,
        program=_program(config),
        changed=_toml(config, changed=True),
        settings=_toml(config, changed=False),
        private=config.private,
    )


def _template() -> jinja2.Template:
    made = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    made.filters |= {"number": number, "share": _share}
    return made.from_string(Path(__file__).with_name("page.html").read_text("utf-8"))


def _share(value: float) -> str:
    return f"{value:.2%}" if value < float("inf") else "of nothing"


def _facts(
    config: TrainConfig, family: Family, log: Readings, file: AdapterFile, outcome: Outcome
) -> list[tuple[str, str]]:
    """(name, value) of what the run was."""
    tensors = [t for part in file.parts.values() for t in part.tensors.values()]
    learned = [t for own in (file.prompts.tensors.values() if file.prompts else ()) for t in own.values()]
    ranks = sorted({p.method.file_rank for p in file.parts.values() if p.method.file_rank is not None})
    scales = sorted({p.method.scale for p in file.parts.values()})
    views = outcome.material.views
    sizes = [f"{width} x {height}" for width, height in sorted({view.size for view in views})]
    count = len({view.example for view in views})
    done = f"{log.seconds / 60:.1f} min" if log.seconds >= 120 else f"{log.seconds:.0f} s"
    pace = f", {len(log.steps) * config.batch_size / log.seconds:.3g} pictures a second" if log.seconds else ""
    memory = _peak(config.output / "status.json")
    method = config.method + "".join(f", {glob}: {text}" for glob, text in config.methods.items())
    rows = [
        ("method", method if file.parts or file.prompts else ""),
        ("rank", _span(ranks)),
        ("scale (alpha / rank)", _span(scales)),
        ("layers", f"{len(file.parts):,}, {sum(t.numel() for t in tensors):,} numbers" if file.parts else ""),
        ("learned prompt", f"{sum(t.numel() for t in learned):,} numbers" if learned else ""),
        ("words", f"{len(file.embeddings):,}" if file.embeddings else ""),
        ("files", ", ".join(f"{path.name} ({path.stat().st_size / 1e6:.2f} MB)" for path in outcome.paths)),
        ("read back", f"predictions differ by at most {outcome.worst:.1e} from those of the live model"),
        ("pictures", f"{count:,} at {', '.join(sizes)}"),
        ("steps", f"{config.steps:,} of {config.batch_size} pictures"),
        ("time", done + pace if log.steps else ""),
        ("peak memory", f"{memory:,} MB" if memory else ""),
        ("optimiser", f"{config.optimizer}, learning rate {number(config.learning_rate)}, {config.schedule}"),
        ("base", "" if config.private else config.base),
        ("precision", config.precision + (f", {config.quantise}" if config.quantise else "")),
        ("device", _device(family.device)),
        ("versions", ", ".join(_versions())),
        ("seed", str(config.seed)),
    ]  # fmt: skip
    return [(name, value) for name, value in rows if value]


def _span(values: Sequence[float]) -> str:
    return "" if not values else f"{values[0]:g}" if len(values) == 1 else f"{values[0]:g} to {values[-1]:g}"


def _peak(status: Path) -> int:
    """Megabytes that a status file tells; 0 where it does not."""
    try:
        return int(json.loads(status.read_text("utf-8"))["peak_memory_mb"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device}, {torch.cuda.get_device_name(device)}"
    return f"{device}, {platform.system()} {platform.machine()}"


def _versions() -> list[str]:
    found = [f"imgadapt {__version__}", f"python {platform.python_version()}"]
    for name in _PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} unknown")
    return found


def _charts(config: TrainConfig, log: Readings) -> dict[str, Markup]:
    """The curves over time, by name: those that there are numbers for."""
    made: dict[str, Markup] = {}
    if log.steps:
        loss, wide = log.figures["loss"], readings.window(len(log.steps))
        even = readings.smooth(loss, wide)
        said = (
            f"Training loss over {len(loss)} steps: from {number(even[min(wide, len(even)) - 1])} to {number(even[-1])}"
        )
        made["loss"] = svg(Chart(said, [Line("", log.steps, even)], (log.steps, loss)))
        for name, values in log.further.items():
            line = Line("", log.steps, readings.smooth(values, wide))
            made[name] = svg(Chart(f"{name} over the steps", [line], (log.steps, values), size=(330, 150)))
        rate = Line("", log.steps, log.figures["lr"], look=3)
        made["rate"] = svg(Chart("Learning rate over the steps", [rate], size=(330, 150)))
        norm = Line("", log.steps, readings.smooth(log.figures["grad_norm"], wide), look=3)
        made["norm"] = svg(
            Chart("Gradient norm over the steps", [norm], (log.steps, log.figures["grad_norm"]), size=(330, 150))
        )
    curves = [_curve(log, *row) for row in (("held_out", "held-out pictures", 1), ("seen", "training pictures", 2))]
    if lines := [line for line in curves if line]:
        best = None if log.best is None else (log.best["step"], f"best: step {int(log.best['step']):,}")
        said = "; ".join(f"{line.name}: {number(line.y[-1])} at the end" for line in lines)
        made["watched"] = svg(Chart(f"Loss minus the base's. {said}", lines, levels=[(0, "the base")], mark=best))
    return made


def _curve(log: Readings, name: str, called: str, look: int) -> Line | None:
    """Loss minus the base's: minus the gain, from nothing at step 0."""
    rows = log.followed(name)
    if not rows:
        return None
    y, low, high = ([0.0, *(-row[f"{name}_gain{end}"] for row in rows)] for end in ("", "_high", "_low"))
    return Line(called, [0.0, *(row["step"] for row in rows)], y, low, high, look)


def _bin_chart(row: readings.Bin) -> Markup:
    even = readings.smooth(row.losses, readings.window(len(row.losses)))
    title = f"Loss at times {number(row.low)} to {number(row.high)}"
    return svg(Chart(title, [Line("", row.at, even)] if even else [], (row.at, row.losses), size=(200, 110)))


def _label(row: gallery.Row) -> str:
    if row.snapshot is None:
        return "base"
    return row.snapshot.name + (f" at {row.strength:g}" if row.strength is not None else "")


def _scores(
    config: TrainConfig, family: Family, rows: Sequence[gallery.Row], prompts: Sequence[str], examples: Sequence[Any]
) -> tuple[list[tuple[str, list[scores.Score]]], str]:
    """(row of the gallery, what each model says) for each row; and why there are none, where they are wanted."""
    if not config.score_with:
        return [], ""
    if not rows:
        return [], "there are no pictures to score."
    trained: list[Image.Image] = []
    try:
        for example in examples:
            with Image.open(example.path) as image:
                trained.append(ImageOps.exif_transpose(image).convert("RGB"))
        found = scores.score(config.score_with, [row.images for row in rows], prompts, trained, family.device)
    except (ConfigError, OSError) as error:  # the training is done: its report is not to be lost over this
        tqdm.write(f"imgadapt: no scores in the report: {error}")
        return [], str(error)
    names = [*map(_label, rows), "training pictures among themselves"]
    return list(zip(names, found, strict=False)), ""


def _program(config: TrainConfig) -> str:
    kinds = {DreamBoothConfig: "dreambooth", InversionConfig: "textual_inversion"}
    return next((name for kind, name in kinds.items() if isinstance(config, kind)), "style")


def _toml(config: TrainConfig, *, changed: bool) -> str:
    """The settings as TOML: those that are not the defaults, or all; without what is personal, with `private`."""
    fields = type(config).model_fields
    lines: list[str] = []
    for line in flags.write_toml(config).splitlines():
        key = line.removeprefix("# ").partition(" ")[0]
        if config.private and key in _HIDDEN:
            continue
        if not changed:
            lines.append(line)
        elif getattr(config, key) != fields[key].default:
            lines.append(line.removesuffix(f"  # {fields[key].description}"))
    return "\n".join(lines)
