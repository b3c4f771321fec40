"""bake_files: a recipe's adapters into its base, and metadata of the checkpoint that says what it was made of."""

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from threading import Thread

from imgadapt import __version__
from imgadapt.combining.checkpoints.baking import Baked, Baking, Progress, bake
from imgadapt.combining.checkpoints.base import BaseFile, open_base
from imgadapt.combining.checkpoints.streams import layout_of
from imgadapt.combining.combine import about, common_architecture, row_of
from imgadapt.combining.engine import Engine
from imgadapt.combining.files import base_digest, metadata_of, opened
from imgadapt.combining.layers import Input
from imgadapt.combining.recipe import MergeRecipe
from imgadapt.combining.recipes import public
from imgadapt.combining.report import Report
from imgadapt.errors import ConfigError, FormatError, ImgadaptError

ROUNDING = "imgadapt_rounding"
"""Metadata: how sums were rounded, where that was not to the nearest value."""
_AMOUNTS = ("rank", "error", "energy", "size")
_TOLD = ("merged_from", "modelspec.merged_from", "imgadapt_recipe")
_UNKNOWN = "0" * 64  # as long as a hash
_TITLE, _WORDS = "modelspec.title", "modelspec.trigger_phrase"


def bake_files(
    recipe: MergeRecipe,
    output: Path,
    how: Baking | None = None,
    *,
    hash_base: bool = False,
    progress: Progress | None = None,
) -> tuple[Baked, Report]:
    """Write the recipe's base with its adapters added: see `bake`. how.metadata is added to what is said of the inputs.
    hash_base: take the base's SHA-256, too, which is as much work as the baking; it is taken where the recipe has one.

    Raises:
        ConfigError: no base, the output is an input, a recipe that says how much an adapter's file keeps; see `bake`.
        FormatError, ShapeError, StateError, OutputError: see `combine` and `bake`.
    """
    how = how or Baking()
    if recipe.base is None:
        raise ConfigError("bake into what? the recipe names no base")
    if given := [name for name in _AMOUNTS if getattr(recipe, name) is not None]:
        raise ConfigError(
            f"the recipe has {given[0]}, which is of adapters; a checkpoint takes the whole sum: leave it out, "
            "or merge the adapters first and bake the result"
        )
    for entry in recipe.inputs:
        if output.resolve() == Path(entry.path).resolve():
            raise ConfigError(f"{output} is an input; wanted another name")
    base = open_base(recipe.base)
    digest = _Digest(base, recipe.base_sha256) if hash_base or recipe.base_sha256 else None
    settled, inputs, _ = opened(replace(recipe, base=None, base_sha256="", dtype=None, format=None))
    recipe = replace(settled, base=recipe.base, base_sha256="" if digest is None else _UNKNOWN)
    engine = Engine(recipe, inputs, base.architecture or common_architecture(inputs), base)
    more = how.metadata

    def metadata(sha256: str) -> dict[str, str]:
        return {**_metadata(replace(recipe, base_sha256=sha256), inputs, base, how), **more}

    late = None if digest is None else lambda: metadata(digest.value())
    own = replace(how, seed=recipe.seed, metadata=metadata(recipe.base_sha256), late=late)
    made = bake(engine, base, output, own, progress=progress)
    recipe = recipe if digest is None else replace(recipe, base_sha256=digest.value())
    layers = [len(i.file.parts) for i in inputs]
    report = Report(recipe, [i.name for i in inputs], engine.skipped, layers, about=[about(i) for i in inputs])
    for merged in sorted(made.layers, key=lambda merged: merged.name):
        report.add(replace(row_of(merged), who=tuple(engine.order[k] for k in merged.who)))
    return made, report


class _Digest:
    """SHA-256 of a base, worked out beside the baking: of a large one it takes as long."""

    def __init__(self, base: BaseFile, wanted: str) -> None:
        self._base, self._wanted = base, wanted
        self._found: Future[str] = Future()
        Thread(target=self._work, daemon=True).start()  # where the baking fails nothing waits for it

    def _work(self) -> None:
        try:
            self._found.set_result(base_digest(self._base))
        except (ImgadaptError, OSError) as error:
            self._found.set_exception(error)

    def value(self) -> str:
        """Raises FormatError: it cannot be read, or is not the one that the recipe has."""
        found = self._found.result()
        if self._wanted not in ("", found):
            raise FormatError(
                f"{self._base.path} is not the base that the recipe means: "
                f"its SHA-256 is {found[:12]}..., not {self._wanted[:12]}..."
            )
        return found


def _metadata(recipe: MergeRecipe, inputs: Sequence[Input], base: BaseFile, how: Baking) -> dict[str, str]:
    """What the checkpoint says of its making: `merged_from` begins with the base; the rest of the base's stays true."""
    told: Mapping[str, str] = metadata_of(recipe, inputs, __version__)
    own = layout_of(next(iter(base.files))).metadata
    made = {key: told[key] for key in _TOLD if key in told}
    name = public(str(recipe.base))
    row: dict[str, object] = {"name": name, "base": True}
    said = own.get("modelspec.hash_sha256")  # of its tensors, by its maker
    row |= ({"sha256": recipe.base_sha256} if recipe.base_sha256 else {}) | ({"hash_sha256": said} if said else {})
    rows = [row, *json.loads(told["merged_from"])]
    made["merged_from"] = json.dumps(rows, ensure_ascii=False)
    sign = "" if told.get(_TITLE, "-").startswith("-") else "+ "
    made[_TITLE] = f"{own.get(_TITLE) or Path(name).stem} {sign}{told.get(_TITLE, '')}".strip()
    words = [text for data in (own, told) for text in data.get(_WORDS, "").split(", ") if text]
    made |= {_WORDS: ", ".join(dict.fromkeys(words))} if words else {}
    return made | ({ROUNDING: how.rounding} if how.rounding != "nearest" else {})
