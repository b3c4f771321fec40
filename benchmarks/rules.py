"""What merging rules keep of a style and of a character: held-out losses on the embedded base.

    python benchmarks/rules.py --output rules          # two trainings, then every rule of the table, tuned alike

Two adapters, the demo style and the character of benchmarks/character.py, are merged by each rule at three strengths,
and at two settings of the rule where it has one. "Kept" is the part of an adapter's own gain (the fall of the loss on
pictures that it has not seen) that the merged one has. The setting is chosen on one half of the pictures by the smaller
of the two parts, and what is printed is of the other half. One training each.
"""

import argparse
import json
import runpy
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from imgadapt import AdapterFile, attach, demo, detach, load
from imgadapt.atomic import write_bytes
from imgadapt.cli import program
from imgadapt.combining.combine import combine_inputs, in_memory
from imgadapt.combining.recipe import Entry, MergeRecipe
from imgadapt.combining.rules import RULES
from imgadapt.combining.rules.rule import Rule
from imgadapt.errors import ConfigError
from imgadapt.training import families, objective, pictures
from imgadapt.training.config import TrainConfig
from imgadapt.training.data import scan
from imgadapt.training.evaluate import held_out_losses
from imgadapt.training.material import Material

ROOT = Path(__file__).parents[1]
WEIGHTS = (0.6, 0.8, 1.0)
SETTINGS = {"density": (0.3, 0.7), "flatten": (0.3, 1.0), "mu": (0.5, 4.0), "strength": (0.5, 1.0)}
SKIPPED = (
    "legacy_factor_sum",
    "concat",
    "compose",
    "polar",
    "geodesic",
    "ortho",
)  # concat is weighted; four are for rotations
PROMPTS = ["ohwx elephant", "ohwx elephant on a blue background", "a fox", "a bicycle"]


def train(output: Path) -> None:
    """The two adapters, where they are not there yet."""
    character: Any = runpy.run_path(str(ROOT / "benchmarks" / "character.py"))
    seen, held_out = output / "pictures", output / "held_out"
    if not held_out.exists():
        character["draw_character"](seen, ["white", "blue", "green", "yellow", "purple"], 12, 0)
        character["draw_character"](held_out, ["white", "orange", "pink", "red"], 12, 1)
    common = ["--base", "demo", "--no-report", "--log-with"]
    if not (output / "style" / "adapter.safetensors").exists():
        style = [str(demo.STYLE / "train"), "--steps", "125", "--batch-size", "16", "--output", str(output / "style")]
        style += ["--learning-rate", "2e-3"]
        runpy.run_path(str(ROOT / "train_scripts" / "style.py"))["main"]([*style, *common])
    if not (output / "character" / "adapter.safetensors").exists():
        own = [str(seen), "--trigger", "ohwx", "--class-prompt", "an elephant", "--output", str(output / "character")]
        rest = ["--preservation", "class-free", "--rank", "8", "--targets", "transformer", "convolution"]
        rest += ["--learning-rate", "1e-3", "--batch-size", "8", "--steps", "200"]
        runpy.run_path(str(ROOT / "train_scripts" / "dreambooth.py"))["main"]([*own, *rest, *common])


def settings(rule: Rule) -> Iterator[dict[str, Any]]:
    """What is tried of a rule: weights, or where only their shares count, its scale; and one of its own settings."""
    own = next((name for name in SETTINGS if name in rule.options), None)
    for weight in WEIGHTS:
        strength = {"weight": 1.0, "scale": 2 * weight} if rule.relative else {"weight": weight}
        for value in SETTINGS[own] if own else (None,):
            yield {**strength, **({} if own is None else {own: value})}


class Study:
    """Both tasks' held-out pictures, in halves."""

    def __init__(self, output: Path) -> None:
        self.family = families.load("demo")
        folders = {"style": demo.STYLE / "held_out", "character": output / "held_out"}
        self.materials: dict[tuple[str, int], Material] = {}
        for task, folder in folders.items():
            config = TrainConfig.of({"folder": folder, "cache": output / "cache"})
            found = scan(folder)[:48]
            for half in (0, 1):
                self.materials[task, half] = Material(config, self.family, found[half::2], fixed=True)
            self.asked = objective.of(config, self.family.schedule, objective.Sampling())

    def losses(self, file: AdapterFile | None, half: int) -> dict[str, Tensor]:
        if file is not None:
            attach(self.family.pipeline, file)
        try:
            return {
                task: held_out_losses(self.family, self.asked, self.materials[task, half])
                for task in ("style", "character")
            }
        finally:
            if file is not None:
                detach(self.family.pipeline)

    def draw(self, file: AdapterFile | None) -> list[Any]:
        if file is not None:
            attach(self.family.pipeline, file)
        drawn = self.family.draw(PROMPTS, range(len(PROMPTS)))
        if file is not None:
            detach(self.family.pipeline)
        return [*drawn]


def merged(files: Mapping[str, AdapterFile], rule: str, setting: Mapping[str, Any]) -> tuple[AdapterFile, float]:
    options = {key: value for key, value in setting.items() if key != "weight"}
    rank = 16 if rule == "svd" else None
    recipe = MergeRecipe(tuple(Entry(name, setting["weight"]) for name in files), rule, options, rank=rank)
    inputs = [in_memory(file, name, lambda _: setting["weight"]) for name, file in files.items()]
    made, report = combine_inputs(recipe, inputs)
    return made, report.residual


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=[rule.name for rule in RULES])
    args = parser.parse_args(argv)
    train(args.output)
    files = {name: load(args.output / name / "adapter.safetensors") for name in ("style", "character")}
    study = Study(args.output)
    base = [study.losses(None, half) for half in (0, 1)]
    own = [{name: study.losses(file, half)[name] for name, file in files.items()} for half in (0, 1)]

    def kept(losses: Mapping[str, Tensor], half: int) -> dict[str, float]:
        return {
            task: float((base[half][task] - losses[task]).mean() / (base[half][task] - own[half][task]).mean())
            for task in files
        }

    rows: dict[str, Any] = {}
    names = ["base", *files]
    sheet = [study.draw(file) for file in (None, *files.values())]
    for name in args.only or [rule.name for rule in RULES if rule.name not in SKIPPED]:
        tried: list[tuple[float, dict[str, Any]]] = []
        for setting in settings(next(rule for rule in RULES if rule.name == name)):
            try:
                file, _ = merged(files, name, setting)
            except ConfigError as error:  # it is for other inputs
                print(f"{name}: {error}", file=sys.stderr)
                break
            tried.append((min(kept(study.losses(file, 0), 0).values()), setting))
        if not tried:
            continue
        setting = max(tried, key=lambda row: row[0])[1]
        file, residual = merged(files, name, setting)
        parts = kept(study.losses(file, 1), 1)
        rows[name] = {"setting": setting, "kept": parts, "residual": residual}
        said = ", ".join(f"{key} {value}" for key, value in setting.items())
        print(f"{name:<18} style {parts['style']:.3f}  character {parts['character']:.3f}   {said}", flush=True)
        names.append(name)
        sheet.append(study.draw(file))
        write_bytes(args.output / "rules.json", json.dumps(rows, indent=1).encode())
    made = pictures.sheet(sheet, names, PROMPTS, scale=1)
    write_bytes(args.output / "sheet.png", pictures.png(made))


if __name__ == "__main__":
    program(main, sys.argv[1:])
