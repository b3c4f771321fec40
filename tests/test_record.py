"""Records: what a picture says of itself, and the settings that come back out of it."""

import hashlib
import io
import json
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from imgadapt import LoRA, attach, collect, detach, save
from imgadapt.errors import DataError
from imgadapt.playground.pictures import infotext, record
from imgadapt.playground.requests import GenerateRequest, Use
from imgadapt.playground.session import Playground
from imgadapt.playground.settings import Settings


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, _loaded: Any) -> Path:
    """A home with two adapters of the embedded base, `red fox` and `b`."""
    home = tmp_path_factory.mktemp("home")
    for k, name in enumerate(("red fox", "b")):
        torch.manual_seed(k)
        attach(_loaded, LoRA(rank=2, alpha=1), targets=["to_q", "to_v", "q_proj", "v_proj"])
        file = collect(_loaded)
        detach(_loaded)
        for part in file.parts.values():
            for tensor in part.tensors.values():
                if tensor.ndim == 2:
                    tensor.normal_(0, 0.3)
        save(file, home / "adapters" / f"{name}.safetensors", format="kohya")
    return home


@pytest.fixture(scope="module")
def ground(home: Path) -> Iterator[Playground]:
    made = Playground(Settings(home=home))
    yield made
    made.close()


def pixels(path: Path) -> np.ndarray[Any, Any]:
    with Image.open(path) as image:
        return np.asarray(image)


def told(texts: Mapping[str, str]) -> bytes:
    """A PNG that says this."""
    info, file = PngImagePlugin.PngInfo(), io.BytesIO()
    for key, text in texts.items():
        info.add_itxt(key, text)
    Image.new("RGB", (8, 8)).save(file, "PNG", pnginfo=info)
    return file.getvalue()


def commented(text: bytes, form: str) -> bytes:
    """A picture with an EXIF comment, as A1111 writes it into JPEG and WebP."""
    exif, file = Image.Exif(), io.BytesIO()
    exif.get_ifd(0x8769)[0x9286] = text
    Image.new("RGB", (8, 8)).save(file, form, exif=exif)
    return file.getvalue()


def changed(path: Path, change: Mapping[str, Any]) -> bytes:
    """A picture of ours whose record says something else."""
    with Image.open(path) as image:
        said = infotext.ours(image.info)
    assert said is not None
    return told({"imgadapt": json.dumps({**said, **change})})


@pytest.fixture(scope="module")
def drawn(ground: Playground) -> Any:
    """Three pictures drawn together, with both adapters."""
    prompt = "a fox <lora:red fox:0.8:0.5> <lora:b:-0.3:start=1:stop=3>"
    asked = {
        "prompt": prompt,
        "negative": "blue, a: b",
        "seed": 7,
        "count": 3,
        "steps": 4,
        "sampler": "DPM++ 2M",
    }
    return ground.generate(GenerateRequest.of(asked)).result()


def test_a_picture_restores_itself_to_the_bit_out_of_the_middle_of_a_batch(ground: Playground, drawn: Any) -> None:
    for picture in drawn[1:]:
        back = ground.restore(picture.path.read_bytes())
        assert (back.lacks, back.exact) == ((), True)
        again = ground.generate(back.request).result()
        assert len(again) == 1
        assert np.array_equal(pixels(again[0].path), pixels(picture.path))
    assert not np.array_equal(pixels(drawn[1].path), pixels(drawn[2].path))


def test_a_picture_drawn_from_another_restores_itself_to_the_bit(ground: Playground, drawn: Any) -> None:
    mask = Image.new("L", (64, 64))
    mask.paste(255, (16, 16, 48, 64))
    file = io.BytesIO()
    mask.save(file, "PNG")
    given = ground.album.accept(drawn[0].path.read_bytes()), ground.album.accept(file.getvalue())
    asked = {"prompt": "an owl", "seed": 1, "steps": 4, "init": given[0].id, "mask": given[1].id, "denoise": 0.6}
    (picture,) = ground.generate(GenerateRequest.of(asked)).result()
    back = ground.restore(picture.path.read_bytes())
    assert (back.lacks, back.exact) == ((), True)
    (again,) = ground.generate(back.request).result()
    assert np.array_equal(pixels(again.path), pixels(picture.path))

    ground.album.remove(given[1].id)
    back = ground.restore(picture.path.read_bytes())
    assert (back.lacks, back.exact) == (("its mask is not here; give it again",), False)
    assert (back.request.init, back.request.mask) == (given[0].id, None)
    ground.album.remove(given[0].id)
    back = ground.restore(picture.path.read_bytes())
    assert back.lacks[0] == "the picture that it began from is not here; give it again"
    assert (back.request.init, back.request.mask) == (None, None)


def test_the_text_is_what_a1111_and_forge_write(ground: Playground, drawn: Any) -> None:
    with Image.open(drawn[1].path) as image:
        text = image.info["parameters"]
    hashes: list[str] = []
    for name in ("red fox", "b"):
        data = (ground.settings.home / "adapters" / f"{name}.safetensors").read_bytes()
        tensors = data[8 + struct.unpack("<Q", data[:8])[0] :]
        hashes.append(hashlib.sha256(tensors).hexdigest()[:12])
    assert text.split("\n") == [
        "a fox <lora:red fox:te=0.5:unet=0.8> <lora:b:-0.3:start=1:stop=3>",
        "Negative prompt: blue, a: b",
        "Steps: 4, Sampler: DPM++ 2M, CFG scale: 4, Seed: 8, Size: 64x64, Model: demo, "
        f'Lora hashes: "red fox: {hashes[0]}, b: {hashes[1]}", Version: imgadapt 0.1.0',
    ]


def test_the_a1111_text_alone_brings_the_same_settings_back(ground: Playground, drawn: Any) -> None:
    with Image.open(drawn[1].path) as image:
        text = image.info["parameters"]
    back, ours = ground.restore(told({"parameters": text})), ground.restore(drawn[1].path.read_bytes())
    assert (back.lacks, back.exact) == ((), False)
    assert back.request == ours.request.model_copy(update={"layout": None})


def test_the_record_names_files_by_digest_and_versions_and_device(ground: Playground, drawn: Any) -> None:
    said = drawn[0].record
    (home,) = (ground.settings.home,)
    digests = {row["name"]: row["sha256"] for row in said["adapters"].values()}
    assert digests == {
        name: hashlib.sha256((home / "adapters" / f"{name}.safetensors").read_bytes()).hexdigest()
        for name in ("red fox", "b")
    }
    assert said["versions"]["torch"] == torch.__version__
    assert set(said["versions"]) == {"imgadapt", "torch", "diffusers", "transformers"}
    assert (said["dtype"], said["threads"]) == ("fp32", torch.get_num_threads())
    assert said["device"].startswith("cpu ")
    assert str(home) not in json.dumps(said)


@pytest.mark.parametrize(
    "change",
    [{"threads": 64}, {"device": "cuda H"}, {"dtype": "bf16"}, {"versions": {"torch": "1.0"}}, {"threads": "2"}],
    ids=str,
)
def test_another_machine_or_version_is_not_promised_the_same_bits(
    ground: Playground, drawn: Any, change: Mapping[str, Any]
) -> None:
    back = ground.restore(changed(drawn[0].path, change))
    assert (back.lacks, back.exact) == ((), False)
    name, was = next(iter(change.items()))
    wanted = {
        "threads": f"threads: {was!r} there, {torch.get_num_threads()} here",
        "dtype": "numbers: bf16 there, fp32 here",
    }
    if name == "versions":
        assert f"torch: 1.0 there, {torch.__version__} here" in back.differs
        assert "imgadapt: not said there, " in "; ".join(back.differs)
    elif name == "device":
        assert [line.partition(" there, cpu ")[0] for line in back.differs] == ["device: cuda H"]
    else:
        assert back.differs == (wanted[name],)


def test_a_base_that_changed_or_is_not_here_is_said(ground: Playground, drawn: Any) -> None:
    back = ground.restore(changed(drawn[0].path, {"base": {"name": "demo", "print": "0" * 64}}))
    assert (back.lacks, back.exact) == (("the base 'demo' may be another here than the picture's",), False)
    assert back.request.base == ground.bases.first.id
    back = ground.restore(changed(drawn[0].path, {"base": {"name": "owner/base"}}))
    assert (back.lacks, back.request.base) == (("the base 'owner/base' is not here",), None)


def test_an_adapter_is_found_under_another_name_and_missed_by_name(
    ground: Playground, drawn: Any, tmp_path: Path
) -> None:
    data = drawn[0].path.read_bytes()
    here = ground.settings.home / "adapters" / "red fox.safetensors"
    elsewhere = Playground(Settings(home=tmp_path))
    folder = elsewhere.settings.folder("adapters")
    (folder / "renamed.safetensors").write_bytes(here.read_bytes())
    (folder / "b.safetensors").write_bytes(here.read_bytes())
    elsewhere.library.scan()
    back = elsewhere.restore(data)
    names = [elsewhere.library.get(use.adapter).name for use in back.request.adapters]
    assert back.lacks == ("the adapter 'b' is another file here than the picture's",)
    assert names[0] in ("renamed", "b")
    (folder / "b.safetensors").unlink()
    elsewhere.library.scan()
    back = elsewhere.restore(data)
    assert back.lacks == ("the adapter 'b' is not here",)
    assert [elsewhere.library.get(use.adapter).name for use in back.request.adapters] == ["renamed"]
    assert back.request.adapters[0].weight == 0.8
    with Image.open(drawn[0].path) as image:
        back = elsewhere.restore(told({"parameters": image.info["parameters"]}))
    assert back.lacks == ("the adapter 'b' is not here",)
    assert [elsewhere.library.get(use.adapter).name for use in back.request.adapters] == ["renamed"]
    elsewhere.close()


FORGE = """1girl, (masterpiece:1.2), <lora:red fox:0.4:0.9> looking
at viewer <lora:none here:1>
Negative prompt: lowres, Steps: bad
text
Steps: 28, Sampler: Euler a, Schedule type: Automatic, CFG scale: 6.5, Seed: 4294967295, Size: 832x1216, \
Model hash: 6ce0161689, Model: demo, Lora hashes: "red fox: abc, none here: 123", ADetailer prompt: "a \\"b\\", c: d", \
Version: f2.0.1"""


def test_forges_text_is_read_with_its_order_of_weights(ground: Playground) -> None:
    back = ground.restore(told({"parameters": FORGE}))
    fox = ground.library.named("red fox").id
    assert back.request == GenerateRequest(
        prompt="1girl, (masterpiece:1.2), looking\nat viewer",
        negative="lowres, Steps: bad\ntext",
        adapters=(Use(adapter=fox, weight=0.9, text=0.4),),
        seed=2**32 - 1, steps=28, guidance=6.5, sampler="Euler a", width=832, height=1216,
        base=ground.bases.first.id,
    )  # fmt: skip
    assert back.lacks == (
        "the adapter 'red fox' is another file here than the picture's",
        "the adapter 'none here' is not here",
    )
    assert not back.exact


UNICODE = {
    "be": b"UNICODE\0" + FORGE.encode("utf-16-be"),
    "le": b"UNICODE\0" + FORGE.encode("utf-16-le"),
    "ascii": b"ASCII\0\0\0" + FORGE.encode(),
}


@pytest.mark.parametrize("form", ["JPEG", "WEBP"])
@pytest.mark.parametrize("code", UNICODE)
def test_jpeg_and_webp_say_it_in_their_exif(ground: Playground, form: str, code: str) -> None:
    back = ground.restore(commented(UNICODE[code], form))
    assert (back.request.steps, back.request.sampler, back.request.width) == (28, "Euler a", 832)


def test_swarmuis_json_is_read(ground: Playground) -> None:
    said = {
        "prompt": "a fox <lora:b:0.5:0.1>", "negativeprompt": "blue", "model": "Some/demo.safetensors", "seed": 5,
        "steps": 12, "cfgscale": 3.5, "width": 640, "height": 512, "sampler": "dpmpp_2m", "scheduler": "karras",
        "loras": ["styles/red fox"], "loraweights": ["0.7"],
    }  # fmt: skip
    back = ground.restore(told({"parameters": json.dumps({"sui_image_params": said}, indent=2)}))
    fox, b = ground.library.named("red fox").id, ground.library.named("b").id
    assert back.lacks == ()
    assert back.request == GenerateRequest(
        prompt="a fox", negative="blue", seed=5, steps=12, guidance=3.5, width=640, height=512,
        sampler="DPM++ 2M Karras", base=ground.bases.first.id,
        adapters=(Use(adapter=b, weight=0.5, text=0.1), Use(adapter=fox, weight=0.7)),
    )  # fmt: skip


def test_values_out_of_range_are_left_out_and_said(ground: Playground) -> None:
    text = "a\nSteps: 999999, Sampler: Restart, Schedule type: Exponential, CFG scale: nan, Seed: 1e400, Size: 7x99999"
    back = ground.restore(told({"parameters": text}))
    assert back.request == GenerateRequest(prompt="a")
    assert back.lacks == (
        "the sampler 'Restart' is not here; the base's own is taken",
        "steps: must be 200 or less (it is 999999): left out",
        "guidance: must be a number (it is 'nan'): left out",
        "seed: must be a number (it is '1e400'): left out",
        "width: must be 8 or more (it is 7): left out",
        "height: must be 4,096 or less (it is 99999): left out",
    )


def test_a_record_of_ours_with_wrong_values_keeps_what_is_right(ground: Playground, drawn: Any) -> None:
    wrong = {
        "prompt": {"a": 1}, "negative": "x" * 9000, "steps": 999_999, "seed": True, "count": [1], "sampler": 3,
        "adapters": [{"adapter": "../../x"}, 7, None], "init": "/etc/passwd", "mask": {}, "guidance": 3.5,
        "extra": "<b>", "layout": {"rows": 10**9}, "width": "64", "denoise": 2,
    }  # fmt: skip
    back = ground.restore(changed(drawn[0].path, {"request": wrong, "adapters": [1], "versions": 3, "given": "x"}))
    assert back.request == GenerateRequest(guidance=3.5, base=ground.bases.first.id)
    assert len(back.lacks) == 14
    assert max(len(line) for line in back.lacks) < 220
    assert not back.exact


def test_a_record_of_thousands_of_settings_and_adapters_is_read_at_once_and_answered_shortly(
    ground: Playground, drawn: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[str] = []
    named = ground.library.named
    monkeypatch.setattr(ground.library, "named", lambda name: looked.append(name) or named(name))
    uses = [{"adapter": f"a{k}"} for k in range(3000)]
    about = {f"a{k}": {"name": f"nobody's {k}", "sha256": "0" * 64, "size": 1} for k in range(3000)}
    request = {**{f"key {k}": k for k in range(3000)}, "seed": 3, "adapters": uses}
    back = ground.restore(changed(drawn[0].path, {"request": request, "adapters": about}))
    assert back.request.seed == 3
    assert len(looked) == 16
    assert len(back.lacks) == 18
    assert "it has 3,000 adapters; those beyond 16 are left out" in back.lacks
    assert "key 0, key 1, key 2 and 2997 more: no settings here: left out" in back.lacks


def test_hashes_that_say_nothing_are_passed_by(ground: Playground) -> None:
    text = 'a <lora:b:1>\nSteps: 4, Sampler: Euler, Seed: 1, Lora hashes: "b: , red fox: 12, : 3, x"'
    back = ground.restore(told({"parameters": text}))
    assert [use.adapter for use in back.request.adapters] == [ground.library.named("b").id]


NOTHING: dict[str, tuple[Mapping[str, str], str]] = {
    "no text": ({}, "does not say how it was made"),
    "prose": ({"parameters": "a picture of a fox"}, "not A1111's: it has no line of settings"),
    "too few settings": ({"parameters": "a\nSteps: 3, Seed: 4"}, "not A1111's: it has no line of settings"),
    "comfyui": ({"prompt": "{}", "workflow": '{"nodes": []}'}, "is of ComfyUI, whose settings are not read"),
    "invokeai": ({"invokeai_metadata": "{}"}, "is of InvokeAI, whose settings are not read"),
    "other json": ({"parameters": '{"a": 1}'}, "JSON of another tool than SwarmUI"),
    "json that is a list": ({"parameters": '{"sui_image_params": [1]}'}, "JSON of another tool than SwarmUI"),
    "nested json": ({"parameters": '{"a":' * 100_000}, "JSON of another tool than SwarmUI"),
    "nested json of ours": ({"imgadapt": '{"a":' * 100_000}, "does not say how it was made"),
    "our json is a list": ({"imgadapt": "[1]"}, "does not say how it was made"),
    "huge": ({"parameters": "Steps: 1, " * 200_000}, "has 2,000,000 characters; 1,048,576 are allowed"),
}


@pytest.mark.parametrize("name", NOTHING)
def test_a_picture_that_says_nothing_or_nothing_readable_is_refused_in_a_line(ground: Playground, name: str) -> None:
    texts, said = NOTHING[name]
    with pytest.raises(DataError) as caught:
        ground.restore(told(texts))
    assert said in str(caught.value)
    assert len(str(caught.value)) < 150


def test_what_unpacks_to_gigabytes_and_what_is_no_picture_is_refused(ground: Playground) -> None:
    bomb = b"parameters\0\0" + zlib.compress(bytes(2**25))
    chunk = struct.pack(">I", len(bomb)) + b"zTXt" + bomb + struct.pack(">I", zlib.crc32(b"zTXt" + bomb))
    plain = told({})
    for data in (plain[:33] + chunk + plain[33:], b"", b"<svg/>", plain[:20]):
        with pytest.raises(DataError):
            ground.restore(data)


@pytest.mark.parametrize(
    "line",
    [
        'Steps: 4, Sampler: "Euler, CFG scale: 3, Seed: 5',
        'Steps: 4, A: "' + "\\" * 99 + ", Seed: 5, C: 1",
        "Steps: 4,,,:,: :, B: 2, Seed: 5",
    ],
)  # fmt: skip
def test_broken_quotes_lose_no_more_than_their_own_value(line: str) -> None:
    table = infotext.settings(line)
    assert (table["Steps"], table["Seed"]) == ("4", "5")


def test_a_value_with_signs_of_the_text_survives_it() -> None:
    name = 'a: "b", c\nd'
    said = {"request": {"prompt": "x"}, "base": {"name": name}}
    assert infotext.split(infotext.parameters(said))[2]["Model"] == name


def test_a_karras_schedule_is_said_apart_as_a1111_does(ground: Playground) -> None:
    said = {"request": {"prompt": "x", "sampler": "DPM++ 2M Karras", "seed": 1}}
    text = infotext.parameters(said)
    assert text == "x\nSteps: 20, Sampler: DPM++ 2M, Schedule type: Karras, Seed: 1, Version: imgadapt"
    assert ground.restore(told({"parameters": text})).request.sampler == "DPM++ 2M Karras"


def test_long_lines_are_read_in_one_pass() -> None:
    for line in ("a: " * 300_000, 'a: "' * 200_000, "a: b, " * 150_000, ":" * 10**6):
        assert len(infotext.settings(line)) <= 150_000


def test_a_fingerprint_sees_a_changed_end_and_a_renamed_file(tmp_path: Path) -> None:
    from imgadapt.playground.pictures.provenance import fingerprint

    data = bytes(3 * 2**20)
    prints: list[str] = []
    for name, end in (("a", b"x"), ("a", b"yz"), ("b", b"yz")):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / f"{name}.safetensors").write_bytes(data + end)
        prints.append(fingerprint(str(tmp_path / name)))
    assert len(set(prints)) == 3
    assert fingerprint(str(tmp_path / "none")) == ""
    assert fingerprint("demo") == fingerprint("demo") != ""


def test_what_the_program_draws_is_restored_and_drawn_the_same_in_the_playground(
    ground: Playground, run: Callable[[str, list[str]], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    red, one, sheet = (tmp_path / f"{name}.png" for name in ("red", "one", "sheet"))
    Image.new("RGB", (64, 48), "red").save(red)
    file = ground.settings.home / "adapters" / "b.safetensors"
    more = ["--steps", "3", "--seeds", "5", "--sampler", "Euler"]
    flags = ["--adapter", f"{file}:0.3", "--adapters", str(file.parent), *more]
    run("generate", ["an owl <lora:red fox:0.4>", *flags, "--negative", "blue", "--output", str(one)])
    assert "b.safetensors: 68 layers at 0.3" in capsys.readouterr().out
    back = ground.restore(one.read_bytes())
    assert (back.lacks, back.exact) == ((), True)
    assert [ground.library.get(use.adapter).name for use in back.request.adapters] == ["b", "red fox"]
    assert (back.request.seed, back.request.sampler, back.request.negative) == (5, "Euler", "blue")
    (again,) = ground.generate(back.request).result()
    assert np.array_equal(pixels(again.path), pixels(one))

    run("generate", ["an owl", "a fox", "--steps", "2", "--init", str(red), "--denoise", "0.5", "--output", str(sheet)])
    back = ground.restore(sheet.read_bytes())
    assert back.lacks == (
        "it is a sheet of 2 pictures; these are the settings of the first",
        "the picture that it began from is not here; give it again",
    )
    assert (back.request.prompt, back.request.width, back.request.height, back.request.denoise) == (
        "an owl",
        64,
        48,
        0.5,
    )


def test_gently_keeps_a_mask_with_its_picture() -> None:
    lacks: list[str] = []
    request = record.gently({"init": "a" * 16, "mask": "b" * 16, "count": 2, "layout": {}}, lacks)
    assert (request.init, request.mask, request.count, request.layout) == ("a" * 16, None, 1, None)
    assert lacks == ["layout is for one picture: left out"]
