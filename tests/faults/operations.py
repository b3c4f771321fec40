"""Everything that imgadapt writes, as operations on a folder; what they read is elsewhere, unless that is tried."""

import copy
import io
import runpy
import shutil
import tempfile
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from PIL import Image
from safetensors.torch import save_file

from imgadapt import AdapterFile, LoRA, attach, cli, collect, detach, load, plan, save
from imgadapt.embeddings import Embedding
from imgadapt.errors import ImgadaptError
from imgadapt.formats import FORMATS, Part
from imgadapt.playground.converting import Converter, ConvertRequest
from imgadapt.playground.grids.cells import Grid, GridRequest
from imgadapt.playground.grids.shelf import Shelf
from imgadapt.playground.library.bringing import bring
from imgadapt.playground.library.library import Library
from imgadapt.playground.merges.lab import Lab, MergeRequest
from imgadapt.playground.pictures import owners
from imgadapt.playground.pictures.album import Album
from imgadapt.playground.serving import accounts
from imgadapt.playground.serving.sessions import Guests
from imgadapt.playground.session import Playground
from imgadapt.playground.settings import Settings
from imgadapt.playground.trainings.datasets import Datasets
from imgadapt.playground.trainings.trainings import Record, Training
from imgadapt.playground.trainings.watching import Watch
from imgadapt.training import checkpoint, evidence, families, fit
from imgadapt.training.cache import Cache
from tests.faults.driver import Operation

HERE = Path(__file__).parent
Q, V = (f"unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_{x}" for x in "qv")
FEW = [
    "--steps=2", "--checkpoint-every=1", "--batch-size=2", "--rank=2", "--targets=unet.mid_block*attn1.to_v",
    "--evaluate-every=1", "--held-out-count=1", "--resolution=16", "--sample-prompts=fox", "--log-with",
]  # fmt: skip
RUN = (
    ".lock",
    "*.jsonl",
    "status.json",
    "checkpoints/*",
    "cache/*/*",
    "snapshots/*",
    "samples/*",
    "results.json",
    "*.png",
)


def adapter(seed: int) -> AdapterFile:
    """Two layers of SD 1.x."""
    generator = torch.Generator().manual_seed(seed)
    parts = {
        name: Part(
            LoRA(2, 1.0 + seed),
            {"down": torch.randn(2, 8, generator=generator), "up": torch.randn(6, 2, generator=generator)},
        )
        for name in (Q, V)
    }
    return AdapterFile(parts, {"seed": f"{seed}"})


def words(seed: int) -> AdapterFile:
    """A word of two vectors."""
    vectors = torch.randn(2, 768, generator=torch.Generator().manual_seed(seed))
    return AdapterFile({}, embeddings={"<ant>": Embedding("<ant>", {"text_encoder": vectors})})


def program(name: str, *arguments: str) -> None:
    """Call a program's main in this process; what it says before it ends with a status is its error.

    Raises:
        ImgadaptError: its own, or that.
    """
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            runpy.run_path(str(cli._folder() / cli.PROGRAMS[name][0]), run_name="tried")["main"](list(arguments))
    except SystemExit as end:
        raise ImgadaptError(said.getvalue()) from end


def by(name: str, *arguments: str) -> Callable[[Path], None]:
    """The same, as an operation; {} in arguments is its folder."""
    return lambda folder: program(name, *(argument.replace("{}", str(folder)) for argument in arguments))


class Inputs:
    """What operations read, made once in a folder outside of the one that is watched."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._once = folder, dict[str, Any]()
        torch.manual_seed(0)
        self._tiny: Any = SimpleNamespace(**runpy.run_path(str(HERE.parent / "tiny.py")))
        self.pipe = self._tiny.sd1()
        self.pictures = folder / "pictures"
        self.pictures.mkdir()
        for k, name in enumerate(("ant", "bee", "cat")):
            Image.effect_mandelbrot((16, 16), (-2 + 0.2 * k, -1.5, 1, 1.5), 60).save(self.pictures / f"{name}.png")
            (self.pictures / f"{name}.txt").write_text(f"a {name}\n")
        self.adapters = [self._on_demo(folder / f"{name}.safetensors", k) for k, name in enumerate(("ink", "clay"))]
        self._share()

    def _on_demo(self, path: Path, seed: int) -> Path:
        torch.manual_seed(seed)
        attach(self.pipe, LoRA(2, 1.0), targets=["unet.mid_block*attn1.to_[qv]"])
        file = collect(self.pipe)
        detach(self.pipe)
        changed = {
            n: replace(p, tensors={k: t + 0.1 * torch.randn_like(t) for k, t in p.tensors.items()})
            for n, p in file.parts.items()
        }
        return save(replace(file, parts=changed), path, format="kohya")

    def _share(self) -> None:
        """Programs have one tiny base for the embedded one, draw in one step, measure at one noise level, and foresee
        memory once: what they compute does not matter here.
        """

        def opened(base: str, **options: Any) -> families.Family:
            if base != "demo" or options.get("dtype", torch.float32) != torch.float32 or options.get("quantise"):
                return usual(base, **options)
            return families.StableDiffusion(copy.deepcopy(self.pipe), torch.device("cpu"), torch.float32)

        usual, families.load = families.load, opened
        evidence.held_out_losses = partial(evidence.held_out_losses, timesteps=1)
        family, predictor = cast(Any, families.Family), cast(Any, fit.Predictor)
        draw, need = family.draw, predictor.need
        family.draw = lambda *a, **k: draw(*a, **{**k, "steps": 1})
        predictor.need = lambda *a: self._kept("need", lambda: need(*a))

    def _kept(self, name: str, make: Callable[[], Any]) -> Any:
        if name not in self._once:
            self._once[name] = make()
        return self._once[name]

    @cached_property
    def checkpoints(self) -> tuple[Path, Path, Path, Path]:
        """A block of a narrow SDXL and one that was tuned, an adapter for it; a small folder of diffusers'."""
        tools: Any = SimpleNamespace(**runpy.run_path(str(HERE.parent / "checkpoints.py")))
        base, tuned, on = (self.folder / f"{name}.safetensors" for name in ("base", "tuned", "on_base"))
        torch.manual_seed(0)
        weights = tools.prefixed(tools.native_checkpoint("sdxl", tools.model_of("sdxl")), "model.diffusion_model.")
        weights = {key: tensor for key, tensor in weights.items() if ".input_blocks.4." in key}
        save_file(weights, base)
        save_file({k: t + 0.01 * torch.randn_like(t) if "attn2.to_k" in k else t for k, t in weights.items()}, tuned)
        program("extract", str(tuned), str(base), str(on), "--rank", "2", "--no-whole")
        torch.manual_seed(0)
        self._tiny.sd1().save_pretrained(self.folder / "sd1")
        return base, tuned, on, self.folder / "sd1"


def nothing(_: Path) -> None:
    """There is nothing before."""


def saving() -> list[Operation]:
    def twice(form: str, name: str, make: Callable[[int], AdapterFile], **more: Any) -> Operation:
        return Operation(
            f"save {name}", lambda f: save(make(1), f / form, **more), lambda f: save(make(2), f / form, **more)
        )

    able = [form.name for form in FORMATS if all(step.loss != "impossible" for step in plan(adapter(1), form.name))]
    made = [twice("x.safetensors", form, adapter, format=form) for form in able]
    made += [
        twice("x.safetensors", f"words {form}", words, format=form) for form in ("diffusers", "kohya", "onetrainer")
    ]
    files = ("x/adapter_model.safetensors", "x/adapter_config.json")

    def with_more(folder: Path) -> None:
        save(adapter(1), folder / "x", format="peft")
        (folder / "x" / "README.md").write_text("mine")

    def with_folders(folder: Path) -> None:
        with_more(folder)
        (folder / "x" / "inner").mkdir()
        (folder / "x" / "inner" / "mine.txt").write_text("mine")

    write = lambda f: save(adapter(2), f / "x", format="peft")  # noqa: E731
    made += [
        Operation("save peft folder, anew", nothing, write, together=files),
        Operation("save peft folder, over one", with_more, write, together=files),
        Operation("save peft folder, no exchange", with_folders, write, away=files[1:]),
        Operation("checkpoint", lambda f: [_checkpoint(f, k) for k in (1, 2)], lambda f: _checkpoint(f, 3)),
        Operation("cache", nothing, lambda f: Cache(f / "cache").get(lambda: {"x": torch.ones(99)}, "key")),
    ]
    return made


def _checkpoint(folder: Path, step: int) -> None:
    parameter = torch.nn.Parameter(torch.full((50,), float(step)))
    optimizer = torch.optim.AdamW([parameter])
    parameter.grad = torch.ones(50)
    optimizer.step()
    checkpoint.save(folder / "checkpoints", step, {"0": parameter}, {"optimizer": optimizer}, {"rank": "2"})


def programs(inputs: Inputs) -> list[Operation]:
    a, b = (str(path) for path in inputs.adapters)
    base, tuned, on, sd1 = (str(path) for path in inputs.checkpoints)

    def old(f: Path) -> None:
        save(adapter(1), f / "x.safetensors")

    def baking(f: Path) -> None:
        program("bake", base, on, "--output", str(f / "x.safetensors"))

    def many(f: Path) -> None:
        folder = inputs.folder / "many"
        if not folder.is_dir():
            for name in ("a", "b", "deep/c"):
                save(adapter(3), folder / f"{name}.safetensors", format="kohya")
        program("convert", str(folder), str(f / "out"), "--to", "diffusers")

    def recipe(f: Path) -> None:
        program("merge", a, f"{b}:0.5", "--output", str(f / "x.safetensors"), "--save-recipe", str(f / "x.toml"))

    few = ["--base", "demo", "--steps", "1", "--width", "16", "--height", "16"]
    return [
        Operation("merge", old, recipe),
        Operation("bake, a file", old, baking),
        Operation("bake, a folder", nothing, by("bake", sd1, _on_sd1(inputs), "--output", "{}/out"), once=True),
        Operation("extract", old, by("extract", tuned, base, "{}/x.safetensors", "--rank", "2", "--no-whole")),
        Operation("resize", old, by("resize", a, "{}/x.safetensors", "--rank", "1")),
        Operation("convert, a file", old, by("convert", a, "{}/x.safetensors", "--to", "comfyui")),
        Operation("convert, a folder", lambda f: save(adapter(1), f / "out" / "a.safetensors"), many),
        Operation(
            "generate",
            lambda f: (f / "x.png").write_bytes(b"old"),
            by("generate", "a fox", *few, "--output", "{}/x.png"),
            loose=("*.png",),
            dear=True,
        ),
        Operation(
            "grid",
            nothing,
            by("grid", "a fox", *few, "--x", "seed=1..2", "--output", "{}/x.zip"),
            loose=("*.zip",),
            dear=True,
        ),
        Operation(
            "check",
            nothing,
            by("check", str(inputs.pictures), "--base", "demo", "--no-step", "--output", "{}/out"),
            dear=True,
        ),
    ]


def _on_sd1(inputs: Inputs) -> str:
    path = inputs.folder / "on_sd1.safetensors"
    if not path.exists():
        part = Part(LoRA(2, 1.0), {"down": torch.ones(2, 4, 3, 3), "up": torch.ones(8, 2, 1, 1)}, shape=(8, 4, 3, 3))
        save(AdapterFile({"unet.conv_in": part}), path)
    return str(path)


def trainings(inputs: Inputs) -> list[Operation]:
    data = str(inputs.pictures)
    few = ["--steps", "2", "--batch-size", "2", "--log-with", "--resolution", "16", "--output", "{}/out"]
    plan = ["--base", "demo", "--kind", "style", *FEW, "--checkpoint-every=2", "--strengths=1", "--output", "{}/out"]
    word = ["--word", "<ant>", "--initial", "fox", "--no-report", *few]
    zipping = ["--prompts-a", "a fox", "--prompts-b", "a bee", "--pictures", "1", "--sampler-steps", "1"]
    zipping += ["--base", "demo", "--steps", "1", "--batch-size", "1", "--output", "{}/x.safetensors"]
    a, b = (str(path) for path in inputs.adapters)
    told = (*RUN, "report.html", "*.toml")
    return [
        Operation("style", nothing, by("style", data, *FEW, "--no-report", "--output", "{}/out"), loose=RUN, dear=True),
        Operation("train, with a report", nothing, by("train", data, *plan), loose=told, dear=True),
        Operation("textual_inversion", nothing, by("textual_inversion", data, *word), loose=RUN, dear=True),
        Operation("zip", nothing, by("zip", a, b, *zipping), dear=True),
    ]


def rooms(inputs: Inputs) -> list[Operation]:
    """What the playground keeps."""
    data, shapes = inputs.adapters[0].read_bytes(), {"labels": (("a",), ("",), ("",))}
    picture = Image.effect_mandelbrot((16, 16), (-2, -1.5, 1, 1.5), 60)
    file = io.BytesIO()
    picture.save(file, "PNG")

    def album(f: Path) -> Album:
        return Album(f / "outputs", f / "uploads", most_bytes=2**20, most_pixels=2**20)

    def with_adapter(f: Path) -> None:
        home(f)
        shutil.copy(inputs.adapters[0], f / "adapters")

    def lab(f: Path) -> None:
        playground = Playground(Settings(f, adapters=(inputs.folder,)))
        try:
            uses = [{"adapter": playground.library.at(path).id, "weight": 1.0} for path in inputs.adapters]
            Lab(playground).save(MergeRequest.of({"adapters": uses, "name": "both"})).result()
        finally:
            playground.close()

    def bringing(f: Path) -> None:
        settings = Settings(f)
        bring(settings, Library(settings), "ink.safetensors", data)

    def converting(f: Path, form: str) -> None:
        playground = Playground(Settings(f, adapters=(inputs.folder,)))
        try:
            card = playground.library.at(inputs.adapters[0])
            Converter(playground).convert(ConvertRequest(adapter=card.id, format=form)).result()
        finally:
            playground.close()

    def shelf(f: Path) -> None:
        request = GridRequest.of({"common": {"prompt": "a fox"}, "x": {"kind": "seed", "values": "1"}})
        Shelf(f / "grids", album(f)).write(Grid("0" * 16, request, shapes["labels"], [], "ann"))  # pyright: ignore[reportArgumentType]

    def record(f: Path, steps: int = 20) -> None:
        (f / "run").mkdir(exist_ok=True)
        Training(Record("a", "run", "ann", 1.0, {}, 10), Watch(f / "run", album(f)), lambda _: None).keep(steps=steps)

    def given(f: Path) -> None:
        Datasets(Settings(f)).add("mine", [("a.png", file.getvalue()), ("a.txt", b"a thing")], "ann")

    def before(f: Path) -> None:
        Datasets(Settings(f)).add("theirs", [("b.png", file.getvalue())], "bob")

    homes = ("outputs", "adapters", "runs", "data", "uploads")
    home = lambda f: [(f / name).mkdir() for name in homes]  # noqa: E731
    return [
        Operation(
            "album, a picture kept",
            nothing,
            lambda f: album(f).keep(picture, {"version": 1}, owner="ann"),
            loose=("*.png", ".owners"),
        ),
        Operation(
            "album, a picture given",
            nothing,
            lambda f: album(f).accept(file.getvalue(), owner="ann"),
            loose=("*.png", ".owners"),
        ),
        Operation("library's memory", with_adapter, lambda f: Library(Settings(f)).scan(), loose=("*.json",)),
        Operation("an adapter brought", home, bringing, loose=("*.json",)),
        Operation("lab, a merge", home, lab, public=True, loose=("*.json", "*.safetensors"), dear=True),
        Operation(
            "converter, kohya",
            home,
            partial(converting, form="kohya"),
            public=True,
            loose=("*",),
            dear=True,
        ),
        Operation(
            "converter, peft",
            home,
            partial(converting, form="peft"),
            public=True,
            loose=("*",),
            dear=True,
        ),
        Operation("shelf, a grid", nothing, shelf, loose=("grid.json",)),
        Operation("a run's record", partial(record, steps=5), record),
        Operation("a data set", before, given, loose=("data/mine*/*", ".owners.json")),
        Operation(
            "accounts",
            lambda f: accounts.add(f / "users", "ann", "password"),
            lambda f: accounts.add(f / "users", "bob", "password"),
            loose=("users",),
        ),
        Operation("the guests' secret", nothing, lambda f: Guests.kept_in(f / "secret"), loose=("secret",)),
        Operation(
            "owners, a line",
            lambda f: owners.add(f / "owners", "0" * 16, "ann"),
            lambda f: owners.add(f / "owners", "1" * 16, "bob"),
            loose=("owners",),
        ),
    ]


def reading(inputs: Inputs) -> list[Operation]:
    """What is read lies in the folder; nothing is written there."""
    out = inputs.folder / "read"
    base, _, on, _ = inputs.checkpoints

    def copies(*files: Path) -> Callable[[Path], object]:
        return lambda f: (
            [shutil.copytree(one, f / one.name) if one.is_dir() else shutil.copy(one, f) for one in files]
        )

    peft = save(adapter(1), inputs.folder / "peft_folder", format="peft")
    x = str(out / "x.safetensors")
    rows: list[tuple[str, Callable[[Path], object], Callable[[Path], object]]] = [
        ("load", copies(inputs.adapters[0]), lambda f: load(f / "ink.safetensors")),
        ("load, peft's folder", copies(peft), lambda f: load(f / "peft_folder")),
        ("show", copies(inputs.adapters[0]), by("show", "{}/ink.safetensors")),
        ("convert", copies(inputs.adapters[0]), by("convert", "{}/ink.safetensors", x, "--to", "comfyui")),
        ("merge", copies(*inputs.adapters), by("merge", "{}/ink.safetensors", "{}/clay.safetensors", "--output", x)),
        ("bake", copies(base, on), by("bake", f"{{}}/{base.name}", f"{{}}/{on.name}", "--output", x)),
        ("a checkpoint", lambda f: [_checkpoint(f, k) for k in (1, 2)], _resumed),
    ]
    dear = [
        (
            "train, pictures",
            copies(inputs.pictures),
            _trained,
        ),
        (
            "generate, an adapter",
            copies(inputs.adapters[0]),
            by("generate", "a fox", "--steps", "1", "--adapter", "{}/ink.safetensors", "--output", str(out / "x.png")),
        ),
    ]
    made = [Operation(f"read: {name}", prepare, run, reads=True) for name, prepare, run in rows]
    return made + [
        Operation(f"read: {name}", prepare, run, reads=True, dear=True, public=name == "generate, an adapter")
        for name, prepare, run in dear
    ]


def _trained(folder: Path) -> None:
    """Into a folder that is anew each time."""
    with tempfile.TemporaryDirectory() as out:
        program("style", str(folder / "pictures"), *FEW, "--no-report", "--output", f"{out}/run")


def _resumed(folder: Path) -> None:
    parameter = torch.nn.Parameter(torch.zeros(50))
    step = checkpoint.resume(
        folder / "checkpoints", {"0": parameter}, {"optimizer": torch.optim.AdamW([parameter])}, {"rank": "2"}
    )
    assert parameter[0] < step
    assert parameter[0] > step - 0.1
