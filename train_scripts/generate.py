"""Draw prompts with a base and any adapters.

    imgadapt generate "a fox" "a red apple" --adapter out/adapter.safetensors:0.8 --output fox.png
    imgadapt generate "a fox <lora:ink:0.7>" --adapters loras/ --seeds 1 2 3

Several --adapter stack, each with its strength after a colon; prompts may have <lora:name:weight> tags, of files in
--adapters and of those that come along (ink, duotone, ... for the embedded base). A row a seed, a column a prompt. The
picture says how it was made, as A1111's do; the playground restores all of it from the file.
"""

import argparse
import io
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from imgadapt.atomic import write_bytes
from imgadapt.cli import adapter, program
from imgadapt.errors import ConfigError, DataError, FormatError
from imgadapt.playground.drawing.studio import Drawn, Studio, alike
from imgadapt.playground.library.bases import Bases
from imgadapt.playground.library.library import Library
from imgadapt.playground.pictures import infotext, record
from imgadapt.playground.pictures.album import Album
from imgadapt.playground.requests import GenerateRequest, Use
from imgadapt.playground.samplers import SAMPLERS
from imgadapt.playground.settings import Settings
from imgadapt.progress import bar
from imgadapt.stopping import scratch
from imgadapt.training import pictures


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", nargs="+", metavar="PROMPT")
    parser.add_argument("--base", default="demo", help="'demo', a diffusers folder, or a checkpoint file [demo]")
    parser.add_argument("--adapter", action="append", type=adapter, default=[], metavar="FILE[:STRENGTH]")
    parser.add_argument("--adapters", action="append", type=Path, default=[], metavar="DIR", help="for <lora:...> tags")
    parser.add_argument("--output", type=Path, default=Path("picture.png"), help="PNG to write [picture.png]")
    parser.add_argument("--negative", default="", help="what not to draw")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="a row each; -1: any [0]")
    parser.add_argument("--steps", type=int, default=20, help="sampler steps [20]")
    parser.add_argument("--guidance", type=float, help="classifier-free guidance [the base's own]")
    parser.add_argument(
        "--sampler", default="base", help=f"{', '.join(SAMPLERS)} (those that the base takes) [base: its own]"
    )
    parser.add_argument("--width", type=int, help="pixels [the base's own]")
    parser.add_argument("--height", type=int, help="pixels [the base's own]")
    parser.add_argument("--init", type=Path, metavar="PICTURE", help="a picture to start from")
    parser.add_argument("--mask", type=Path, metavar="PICTURE", help="where it is redrawn: white")
    parser.add_argument("--denoise", type=float, default=0.75, help="how much of it is redrawn, 0 to 1 [0.75]")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="of the base [fp32]")
    args = parser.parse_args(argv)
    for path in args.adapters:
        if not path.exists():
            raise FormatError(f"{path}: no such folder")
    with scratch() as home:
        for path, strength in args.adapter:
            if not path.exists():
                tag = in_library(path, strength, Settings(home, adapters=tuple(args.adapters), base=args.base))
                raise FormatError(
                    f"{path}: no such file{f'; of the library, write {tag} in the prompt' if tag else ''}"
                )
        draw(args, home)


def in_library(path: Path, strength: float, settings: Settings) -> str:
    """The tag for what was taken for a file, where an adapter is called so; "" where none is."""
    try:
        return f"<lora:{Library(settings).named(str(path)).name}:{strength:g}>"
    except ConfigError:
        return ""


def draw(args: argparse.Namespace, home: Path) -> None:
    """home: a folder for what is gone afterwards."""
    settings = Settings(
        home, adapters=(*(path.absolute() for path, _ in args.adapter), *args.adapters), base=args.base, hub=True,
        device="cuda" if torch.cuda.is_available() else "cpu", dtype=args.dtype,
    )  # fmt: skip
    limits, library = settings.limits, Library(settings)
    album = Album(home, home / "given", most_bytes=limits.upload, most_pixels=limits.upload_pixels)
    asked = {
        "negative": args.negative, "steps": args.steps, "guidance": args.guidance, "sampler": args.sampler,
        "width": args.width, "height": args.height, "denoise": args.denoise, "adapters": stack(args, library),
        "init": given(args.init, album), "mask": given(args.mask, album),
    }  # fmt: skip
    said = {name: value for name, value in asked.items() if value is not None}
    cells = [{**said, "prompt": prompt, "seed": seed} for seed in args.seeds for prompt in args.prompts]
    requests = [GenerateRequest.of(cell) for cell in cells]

    studio = Studio(settings, library, album)
    studio.load(base := Bases(settings).first)
    many = f"{len(requests)} picture{'s' * (len(requests) != 1)}"
    print(f"drawing {many} in {args.steps} steps on {settings.device}", flush=True)
    drawn = all_of([studio.settle(request) for request in requests], studio, limits.drawn_together)
    about = record.about(base, settings)
    records = [record.of(one.request, library, about, one.seconds, one.notes, album) for one in drawn]
    images, columns = [one.image for one in drawn], len(args.prompts)
    rows = [images[k : k + columns] for k in range(0, len(images), columns)]
    names = [f"seed {one.request.seed}" for one in drawn[::columns]]
    scale = max(1, 128 // images[0].width)
    made = images[0] if len(images) == 1 else pictures.sheet(rows, names, args.prompts, scale=scale)
    file = io.BytesIO()
    chunks = infotext.chunks(records[0] if len(records) == 1 else {"version": infotext.VERSION, "pictures": records})
    made.save(file, "PNG", optimize=True, pnginfo=chunks)
    write_bytes(args.output, file.getvalue())
    for note in dict.fromkeys(note for one in drawn for note in one.notes):
        print(f"note: {note}")
    print(f"{args.output}: {made.width} x {made.height}")


def stack(args: argparse.Namespace, library: Library) -> list[dict[str, object]]:
    """The adapters that were named by their files."""
    made: list[dict[str, object]] = []
    for path, strength in args.adapter:
        card = library.at(path)
        use = Use.of({"adapter": card.id, "weight": strength})
        file = library.file(card.id)
        said = [f"{len(file.parts)} layers"] if file.parts or not file.prompts else []
        said += [file.prompts.kind.name] if file.prompts else []
        print(f"{path}: {' and '.join(said)} at {strength:g}")
        made.append(use.model_dump(exclude_none=True))
    return made


def given(path: Path | None, album: Album) -> str | None:
    """The id of a picture that was named by its file."""
    try:
        return None if path is None else album.accept(path.read_bytes()).id
    except (OSError, DataError) as error:
        raise DataError(f"{path}: {error.strerror if isinstance(error, OSError) else error}") from None


def all_of(settled: Sequence[GenerateRequest], studio: Studio, most: int) -> list[Drawn]:
    """Pictures in the order of the requests; those that may are drawn together, up to `most` pixels."""
    made: list[Drawn] = []
    with bar("step") as progress:
        for _, group in itertools.groupby(settled, alike):
            same = list(group)
            if same[0].width is None or same[0].height is None:
                raise ConfigError("a settled request has sides")
            together = max(1, most // (same[0].width * same[0].height))
            for k in range(0, len(same), together):
                what = f"{len(made) + 1} of {len(settled)}"
                made += studio.draw(same[k : k + together], lambda done, of, _, what=what: progress(what, done, of))
    return made


if __name__ == "__main__":
    program(main, sys.argv[1:])
