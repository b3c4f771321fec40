"""Render emoji sets to 64 x 64 pixels and name what they show: the data of the embedded base.

    mkdir NPM && cp train_scripts/demo_base/package.json NPM && npm install --prefix NPM
    python train_scripts/demo_base/data.py NPM/node_modules DATA

Names come from emojibase-data, drawings from iconify's packages; resvg-py 0.5.0 draws them. DATA/concepts.json lists
the concepts, DATA/<set>.npz holds a set's pictures (imgadapt/demo/emoji.py reads both). core.txt names the concepts
that the base learns, dropped.txt those of concrete subgroups that are near doubles, scenes, or too fine for 64 pixels.
"""

import argparse
import io
import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import resvg_py
from PIL import Image

from imgadapt.demo import emoji

SETS = ("noto", "noto-v1", "fxemoji", "fluent-emoji-flat", "fluent-emoji-high-contrast")
DRAWN, FIT = 256, 58  # pixels: at which the SVG is drawn, and of the longer side in the picture
GROUPS = ("smileys-emotion", "animals-nature", "food-drink", "travel-places", "activities", "objects")
PEOPLE = [  # subgroups of people-body that come without gender and skin tone
    "hand-fingers-open", "hand-fingers-partial", "hand-single-finger", "hand-fingers-closed", "hands", "hand-prop",
    "body-parts", "person-fantasy",
]  # fmt: skip
CONCRETE = [
    "animal-mammal", "animal-bird", "animal-marine", "animal-bug", "animal-reptile", "animal-amphibian",
    "plant-flower", "plant-other", "food-fruit", "food-vegetable", "food-prepared", "food-asian", "food-sweet",
    "drink", "dishware", "transport-ground", "transport-air", "transport-water", "sky-weather", "sport", "game",
    "musical-instrument", "clothing", "tool", "face-smiling", "face-hat", "face-glasses", "face-costume", "cat-face",
    "monkey-face", "person-fantasy", "place-building", "place-geographic", "light-video", "science", "event",
]  # fmt: skip
UNUSED = re.compile("o.clock|thirty|speech|anger bubble|stone")  # "stone" by an old slip; without it, every id moves
ONE_WAY = ("award-medal", "game")  # subgroups with writing, wrong in a mirror
Icon = dict[str, Any]  # as in IconifyJSON: body, width, height, perhaps hFlip


def clean(text: str) -> str:
    """Lower case, ASCII letters and digits, single spaces: the spelling of labels, names and tags."""
    text = re.sub(r"\bemoji\b", "", text.lower().replace("\u2019", "'"))
    text = re.sub(r"[^a-z0-9' ]", " ", text).replace("'", "")
    return " ".join(text.split())


def read_concepts(package: Path) -> tuple[list[emoji.Concept], list[str]]:
    """The concepts in emojibase's order, and their code points, `1f98a`-like."""
    messages = json.loads((package / "en/messages.json").read_text())
    groups = {group["order"]: group["key"] for group in messages["groups"]}
    subgroups = {group["order"]: group["key"] for group in messages["subgroups"]}
    here = Path(__file__).parent
    core, dropped = ((here / name).read_text().splitlines() for name in ("core.txt", "dropped.txt"))
    concepts: list[emoji.Concept] = []
    codes: list[str] = []
    for entry in json.loads((package / "en/data.json").read_text()):
        group, subgroup = groups.get(entry.get("group")), subgroups.get(entry.get("subgroup"))
        person = subgroup in PEOPLE and not entry["label"].startswith(("man ", "woman "))
        if not (group in GROUPS or person) or UNUSED.search(entry["label"]):
            continue
        label = clean(entry["label"])
        concepts.append({
            "label": label, "names": [], "tags": [clean(tag) for tag in entry.get("tags", [])],
            "flip": subgroup not in ONE_WAY, "core": label in core,
            "concrete": subgroup in CONCRETE and label not in dropped,
        })  # fmt: skip
        codes.append(code_points(entry["hexcode"]))
    found = [concept for concept in concepts if concept["core"]]
    if missing := set(core) - {concept["label"] for concept in found}:
        raise ValueError(f"core.txt: emojibase-data has no {', '.join(sorted(missing))}; is it the pinned version?")
    add_names(found)
    return concepts, codes


def add_names(core: list[emoji.Concept]) -> None:
    """Call a core concept also by those of its tags that no other core concept has, as label or tag."""
    labels = {concept["label"] for concept in core}
    uses = Counter(tag for concept in core for tag in concept["tags"])
    for concept in core:
        concept["names"] = sorted(t for t in concept["tags"] if uses[t] == 1 and t not in labels and len(t) > 2)


def code_points(name: str) -> str:
    """A hex code in lower case without the variation selector fe0f, which the packages set or leave at will."""
    return "-".join(part for part in name.lower().split("-") if part != "fe0f")


def read_icons(package: Path, concepts: list[emoji.Concept], codes: list[str]) -> dict[int, Icon]:
    """Concept id -> its icon, found by code point where the package lists them, else by name."""
    found = json.loads((package / "icons.json").read_text())
    listed = package / "chars.json"
    by_code = {code_points(k): name for k, name in json.loads(listed.read_text()).items()} if listed.exists() else {}
    by_name = {re.sub("[^a-z0-9]", "", name): name for name in [*found.get("aliases", {}), *found["icons"]]}
    icons: dict[int, Icon] = {}
    for i, (concept, code) in enumerate(zip(concepts, codes, strict=True)):
        name = by_code.get(code) or by_name.get(concept["label"].replace(" ", ""))
        alias = found.get("aliases", {}).get(name, {"parent": name})
        if icon := found["icons"].get(alias["parent"]):
            icons[i] = {"width": found["width"], "height": found["height"], **icon, **alias}
    return icons


def render(icon: Icon) -> npt.NDArray[np.uint8]:
    """Premultiplied RGBA (64, 64, 4), the drawing centred and its longer side `FIT` pixels."""
    width, height, body = icon["width"], icon["height"], icon["body"].replace("currentColor", "#111111")
    if icon.get("hFlip"):
        body = f'<g transform="translate({width} 0) scale(-1 1)">{body}</g>'
    space = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    svg = f'<svg {space} viewBox="0 0 {width} {height}" width="{DRAWN}" height="{DRAWN}">{body}</svg>'
    png = resvg_py.svg_to_bytes(svg_string=svg, width=DRAWN, height=DRAWN)
    pixels = np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGBA"))
    y, x = np.where(pixels[..., 3] > 8)
    pixels = pixels[y.min() : y.max() + 1, x.min() : x.max() + 1].astype(np.float32)
    pixels[..., :3] = (pixels[..., :3] * (pixels[..., 3:] / 255.0)).round()
    scale = FIT / max(pixels.shape[:2])
    rows, columns = (max(1, round(side * scale)) for side in pixels.shape[:2])
    kind = Image.Resampling.BOX if scale < 0.5 else Image.Resampling.LANCZOS
    small = Image.fromarray(pixels.astype(np.uint8)).resize((columns, rows), kind)
    picture = np.zeros((emoji.SIZE, emoji.SIZE, 4), np.uint8)
    top, left = (emoji.SIZE - rows) // 2, (emoji.SIZE - columns) // 2
    picture[top : top + rows, left : left + columns] = np.asarray(small)
    return picture


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("node_modules", type=Path, help="where npm put the packages")
    parser.add_argument("data", type=Path, help="folder to write")
    parser.add_argument("--sets", nargs="+", default=list(SETS), help="names of @iconify-json packages")
    args = parser.parse_args()
    args.data.mkdir(parents=True, exist_ok=True)
    concepts, codes = read_concepts(args.node_modules / "emojibase-data")
    (args.data / "concepts.json").write_text(json.dumps(concepts))
    print(f"{len(concepts)} concepts, {sum(concept['core'] for concept in concepts)} of them core")
    for name in args.sets:
        icons = read_icons(args.node_modules / "@iconify-json" / name, concepts, codes)
        images = np.stack([render(icon) for icon in icons.values()])
        np.savez_compressed(args.data / f"{name}.npz", images=images, ids=np.array(list(icons)))
        print(f"{name:28} {len(icons):5} pictures, {sum(concepts[i]['core'] for i in icons)} core", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
