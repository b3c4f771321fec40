"""What the trainer sees of each picture, to look at before a run: the crop, and what its mask leaves out."""

from collections.abc import Sequence

from PIL import Image, ImageChops, ImageDraw, ImageFont

from imgadapt.errors import DataError, printable
from imgadapt.training.buckets import View
from imgadapt.training.framing import Crop, Masking, Options, Placement, flat, mask_of, placement, upright

TILE = 176  # pixels of a side, of the picture on a tile
_TEXT = 12
_PADDING, _OUTLINE, _UNTRAINED = (128, 128, 128), (255, 64, 0), (220, 0, 160)


def contact_sheet(
    views: Sequence[View],
    crop: Crop = "centre",
    *,
    use_mask: Masking = "none",
    variants: int = 1,
    seed: int = 0,
    limit: int = 48,
) -> Image.Image:
    """A tile a picture, the most cut first: the whole picture, darkened outside of the crop, its mask tinted.

    Below it are the file's name, the bucket, how much is cut and, if so, by what factor it is enlarged. A picture in
    several buckets is shown in the one that cuts most.

    crop, use_mask, seed: as in `Options`. variants: random crops to outline. limit: tiles; the rest is not shown.

    Raises:
        DataError: there are no views, or a picture cannot be read.
    """
    if not views:
        raise DataError("no pictures: there is nothing for a contact sheet")
    order = sorted(range(len(views)), key=lambda k: (-views[k].cut, k))
    worst: dict[str, View] = {}
    for view in (views[k] for k in order):
        worst.setdefault(str(view.example.path), view)
    shown = list(worst.values())[:limit]
    tiles = [_tile(view, crop, use_mask, variants if crop == "random" else 1, seed) for view in shown]
    columns = min(8, len(tiles))
    width, height = TILE + 8, TILE + 8 + 2 * (_TEXT + 3)
    head = 2 * _TEXT + 14
    made = Image.new("RGB", (width * max(columns, 3), head + height * -(-len(tiles) // columns)), "white")
    text = f"{len(shown)} of {len(worst)} pictures, the most cut first. Dark: cut off; purple: not trained (mask);"
    text += "\ngrey: padding; the orange frame: what is trained; x1.5: the picture is enlarged so much"
    ImageDraw.Draw(made).multiline_text((6, 4), text, "black", ImageFont.load_default(_TEXT), spacing=2)
    for k, tile in enumerate(tiles):
        made.paste(tile, (width * (k % columns), head + height * (k // columns)))
    return made


def _tile(view: View, crop: Crop, use_mask: Masking, variants: int, seed: int) -> Image.Image:
    image = upright(view.example, about=2 * TILE)
    mask = mask_of(view.example, image, use_mask)
    places = [placement(view, Options(crop, variant, seed)) for variant in range(variants)]
    picture = _seen(flat(image), mask, places)
    made = Image.new("RGB", (TILE + 8, TILE + 8 + 2 * (_TEXT + 3)), "white")
    made.paste(picture, ((TILE + 8 - picture.width) // 2, (TILE + 8 - picture.height) // 2))
    draw, font = ImageDraw.Draw(made), ImageFont.load_default(_TEXT)
    draw.text((4, TILE + 7), _short(printable(view.example.path.name), font), "black", font)
    share = f"{'pad' if crop == 'pad' else 'cut'} {view.cut:.0%}"
    larger = f", x{view.enlarged:.2f}" if view.enlarged > 1 else ""
    draw.text((4, TILE + 10 + _TEXT), f"{view.size[0]} x {view.size[1]}, {share}{larger}", "black", font)
    return made


def _seen(picture: Image.Image, mask: Image.Image | None, places: Sequence[Placement]) -> Image.Image:
    """The picture at the size of a tile, with its crops and its mask."""
    target, inside = places[0].target, places[0].inside
    padded = inside != target
    outer = target if padded else places[0].original
    inner = inside if padded else outer
    factor = TILE / max(outer)
    small = picture.resize(_scaled(inner, factor), Image.Resampling.BILINEAR)
    if mask is not None:
        tint = Image.blend(small, Image.new("RGB", small.size, _UNTRAINED), 0.6)
        small = Image.composite(small, tint, mask.resize(small.size, Image.Resampling.BILINEAR))
    if padded:
        made = Image.new("RGB", _scaled(outer, factor), _PADDING)
        made.paste(small, ((made.width - small.width) // 2, (made.height - small.height) // 2))
        return made
    boxes = [_box(place, small) for place in places]
    seen = Image.new("L", small.size, 0)
    for box in boxes:
        ImageDraw.Draw(seen).rectangle(box, 255)
    made = Image.composite(small, ImageChops.multiply(small, Image.new("RGB", small.size, (70, 70, 70))), seen)
    for box in boxes:
        ImageDraw.Draw(made).rectangle(box, outline=_OUTLINE)
    return made


def _scaled(sides: tuple[int, int], factor: float) -> tuple[int, int]:
    """(height, width) as Pillow's (width, height)."""
    return max(1, round(sides[1] * factor)), max(1, round(sides[0] * factor))


def _box(place: Placement, image: Image.Image) -> tuple[int, int, int, int]:
    left, top, right, bottom = place.window
    first = round(left * image.width), round(top * image.height)
    last = round(right * image.width - 1), round(bottom * image.height - 1)
    return *first, max(first[0], last[0]), max(first[1], last[1])  # of a long strip, less than a pixel is seen


def _short(name: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """The name, with its middle left out where it is wider than a tile."""
    if font.getlength(name) <= TILE:
        return name
    kept = next(
        n for n in range(len(name) - 1, 0, -1) if font.getlength(f"{name[: n - n // 2]}…{name[-(n // 2) :]}") <= TILE
    )
    return f"{name[: kept - kept // 2]}…{name[-(kept // 2) :]}"
