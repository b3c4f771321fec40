"""Gallery: the same prompts and seeds drawn by the base, and by a run's snapshots at several strengths."""

import base64
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from imgadapt import attaching, live
from imgadapt.errors import ConfigError, ImgadaptError
from imgadapt.file import load
from imgadapt.training import pictures
from imgadapt.training.families import Family

PROMPTS, SNAPSHOTS = 6, 4  # at most
SIDE = 384  # pixels of a picture in the page, at most
_AT_ONCE = 768**2  # pixels drawn together: some more small pictures, or one large one
_NAME = re.compile(r"step-(\d+)\.safetensors")


@dataclass(frozen=True)
class Snapshot:
    """An adapter of a run. name: "step 50"; notes: "best", "last"."""

    name: str
    path: Path
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Row:
    """One picture a prompt. strength: None for the base alone."""

    snapshot: Snapshot | None
    strength: float | None
    images: Sequence[Image.Image]


def snapshots(folder: Path, best: int | None, trained: Path) -> list[Snapshot]:
    """The first, middle, best and last of a folder's, each once, by step; where there are none, the trained file."""
    found = {int(m[1]): p for p in folder.glob("step-*.safetensors") if (m := _NAME.fullmatch(p.name))}
    steps = sorted(found)
    if not steps:
        return [Snapshot("the adapter", trained)]
    notes: dict[int, list[str]] = {steps[0]: [], steps[len(steps) // 2]: []}
    if best in found:
        notes.setdefault(best, []).append("best")
    notes.setdefault(steps[-1], []).append("last")
    return [Snapshot(f"step {step:,}", found[step], tuple(notes[step])) for step in sorted(notes)]


def draw(
    family: Family, chosen: Sequence[Snapshot], strengths: Sequence[float], prompts: Sequence[str], side: int
) -> tuple[list[Row], list[tuple[Snapshot, str]]]:
    """(rows, snapshots that could not be drawn, and why): the base first, then each snapshot at each strength.

    Prompt k has seed k in all rows. family: its pipeline is bare, and is so again afterwards. side: pixels.
    """
    rows, unseen = [Row(None, None, _drawn(family, prompts, side))], list[tuple[Snapshot, str]]()
    for snapshot in tqdm(chosen, "pictures of the report", leave=False, dynamic_ncols=True):
        try:
            file = load(snapshot.path)
            attaching.attach(family.pipeline, file, name="shown")
        except ImgadaptError as error:
            unseen.append((snapshot, str(error)))
            continue
        try:
            for strength in strengths if file.parts or file.prompts else [1.0]:  # words are there or not
                if file.parts or file.prompts:
                    try:
                        live.set_weights(family.pipeline, {"shown": strength})
                    except ConfigError:  # learned prompts of SD3 and Flux are there or not
                        continue
                rows.append(Row(snapshot, strength, _drawn(family, prompts, side)))
        finally:
            attaching.detach(family.pipeline, "shown")
    return rows, unseen


def _drawn(family: Family, prompts: Sequence[str], side: int) -> list[Image.Image]:
    some = max(1, _AT_ONCE // side**2)
    seeds = list(range(len(prompts)))
    return [
        image
        for k in range(0, len(prompts), some)
        for image in family.draw(prompts[k : k + some], seeds[k : k + some], side=side)
    ]


def embedded(image: Image.Image) -> str:
    """The picture as a `data:` address: small ones exactly, large ones as JPEG with sides of at most `SIDE` pixels."""
    image = image.convert("RGB")
    if max(image.size) <= SIDE // 2:
        return f"data:image/png;base64,{base64.b64encode(pictures.png(image)).decode()}"
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
