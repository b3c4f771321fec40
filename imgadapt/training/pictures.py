"""Sheets of pictures with labels, as PNG."""

import io
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from imgadapt.training.families import Family


def sheet(
    rows: Sequence[Sequence[Image.Image]], names: Sequence[str], titles: Sequence[str], *, scale: int = 1
) -> Image.Image:
    """Rows of equally large pictures, `names` at the left of the rows, `titles` above the columns.

    scale: whole factor by which small pictures are enlarged, pixel by pixel.
    """
    width, height = (side * scale for side in rows[0][0].size)
    font = ImageFont.load_default(13)
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    margin = round(max((measure.textlength(name, font) for name in names), default=0)) + 16 if any(names) else 4
    wrapped = [_wrap(title, width - 6, font) for title in titles]
    top = 8 + 15 * max((text.count("\n") + 1 for text in wrapped), default=0) if any(titles) else 4
    made = Image.new("RGB", (margin + (width + 4) * max(map(len, rows)), top + (height + 4) * len(rows)), "white")
    draw = ImageDraw.Draw(made)
    for x, text in enumerate(wrapped):
        draw.multiline_text((margin + x * (width + 4) + 3, 4), text, "black", font, spacing=1)
    for y, (row, name) in enumerate(zip(rows, names, strict=True)):
        draw.text((6, top + y * (height + 4) + height // 2 - 8), name, "black", font)
        for x, image in enumerate(row):
            large = image.convert("RGB").resize((width, height), Image.Resampling.NEAREST)
            made.paste(large, (margin + x * (width + 4), top + y * (height + 4)))
    return made


def mosaic(tiles: Sequence[Image.Image], columns: int) -> Image.Image:
    """Pictures of any sizes, row by row; each place is as large as the largest."""
    width, height = max(t.width for t in tiles), max(t.height for t in tiles)
    rows = -(-len(tiles) // columns)
    made = Image.new("RGB", (width * columns, height * rows), "white")
    for k, tile in enumerate(tiles):
        made.paste(tile, (width * (k % columns), height * (k // columns) + height - tile.height))
    return made


def png(image: Image.Image) -> bytes:
    """The picture as PNG bytes."""
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return file.getvalue()


def samples(
    family: Family, prompts: Sequence[str], *, seeds: Sequence[int] = (0, 1), side: int | None = None
) -> Image.Image:
    """A sheet of the prompts as the model draws them now, a row a seed. side: pixels."""
    rows = [family.draw(prompts, [seed] * len(prompts), side=side) for seed in seeds]
    return sheet(rows, [f"seed {seed}" for seed in seeds], prompts)


def _wrap(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return "\n".join(lines)
