"""The studio: pictures are those of the library and of diffusers, alone, in batches, and when they are drawn again."""

import io
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import imgadapt
from imgadapt import LoHa, LoRA, demo, live
from imgadapt.errors import ConfigError
from imgadapt.file import AdapterFile
from imgadapt.methods import DoRA, LoKr
from imgadapt.playground import samplers
from imgadapt.playground.drawing.studio import Drawn, Studio, alike
from imgadapt.playground.library.bases import Base
from imgadapt.playground.library.library import Card
from imgadapt.playground.requests import GenerateRequest, Use
from imgadapt.playground.settings import Limits, Settings
from imgadapt.training import families
from imgadapt.training.families import FAMILIES, Family, StableDiffusion
from tests import tiny

DEMO = Base("demobase0", "the embedded base", "demo", "demo")
FIRST, SECOND, OTHERS = "firstfirst", "secondsecond", "othermethods"


class Files:
    """What the studio asks of a library and an album: files by id."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, id: str, owner: str | None = None) -> Any:
        if (picture := self.folder / f"{id}.png").exists():
            with Image.open(picture) as image:
                return SimpleNamespace(path=picture, width=image.width, height=image.height)
        return Card(id=id, name=id, folder="", path=self.folder / f"{id}.safetensors", size=0, modified=0.0)

    named = get

    def file(self, id: str) -> AdapterFile:
        return imgadapt.load(self.folder / f"{id}.safetensors")


def write(path: Path, method: Any, seed: int, targets: Any = ("attention", "text_encoder*q_proj")) -> None:
    """An adapter of the embedded base that changes what it draws."""
    pipe = demo.pipeline()
    torch.manual_seed(seed)
    imgadapt.attach(pipe, method, targets=list(targets))
    for parameter in imgadapt.parameters(pipe):
        parameter.data = torch.randn(parameter.shape) * 0.1
    imgadapt.save(imgadapt.collect(pipe), path)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("files")
    write(folder / f"{FIRST}.safetensors", LoRA(rank=4), 1)
    write(folder / f"{SECOND}.safetensors", LoRA(rank=2), 2)
    mixed: Mapping[str, Any] = {
        "unet*to_q": LoHa(rank=2),
        "unet*to_k": LoKr(rank=2, factor=8),
        "unet*to_v": DoRA(LoRA(rank=2)),
    }
    write(folder / f"{OTHERS}.safetensors", mixed, 3, list(mixed))
    noise = np.random.default_rng(0).integers(0, 255, (4, 4, 3)).repeat(16, 0).repeat(16, 1)
    Image.fromarray(noise.astype(np.uint8)).save(folder / "pictureone.png")
    mask = Image.new("L", (64, 64))
    mask.save(folder / "emptymask.png")
    mask.paste(255, (0, 0, 64, 32))
    mask.resize((32, 32)).save(folder / "uppermask.png")
    return Files(folder)


def made(files: Files, **limits: int) -> Studio:
    given: Any = files
    studio = Studio(Settings(files.folder, limits=replace(Limits(), **limits)), given, given)
    studio.load(DEMO)
    return studio


@pytest.fixture(scope="module")
def studio(files: Files) -> Studio:
    return made(files)


def nothing(done: int, total: int, preview: bytes | None) -> None:
    pass


def one(studio: Studio, watch: Callable[[int, int, bytes | None], None] = nothing, **said: Any) -> Drawn:
    values: dict[str, Any] = {"prompt": "a fox", "seed": 5, "steps": 4, **said}
    return studio.draw([studio.settle(GenerateRequest(**values))], watch)[0]


def pixels(image: Any) -> Any:
    return np.asarray(image.image if isinstance(image, Drawn) else image).astype(int)


def same(a: Any, b: Any) -> bool:
    return bool((pixels(a) == pixels(b)).all())


def plain(files: Files, weights: Mapping[str, Any]) -> Any:
    """What `imgadapt.attach` and the family draw."""
    pipe = demo.pipeline()
    for id, weight in weights.items():
        imgadapt.attach(pipe, files.file(id), name=id, weight=weight)
    return StableDiffusion(pipe, torch.device("cpu"), torch.float32).draw(["a fox"], [5], steps=4)[0]


def test_a_picture_is_that_of_attach_to_the_bit_and_waiting_adapters_change_nothing(
    studio: Studio, files: Files
) -> None:
    base = plain(files, {})
    assert same(one(studio), base)
    uses = (Use(adapter=FIRST, weight=0.7, text=0.4), Use(adapter=SECOND, weight=-0.3))
    drawn = one(studio, adapters=uses)
    assert same(drawn, plain(files, {FIRST: {"text_encoder*": 0.4, "*": 0.7}, SECOND: -0.3}))
    assert not same(drawn, base)
    assert same(one(studio, adapters=uses[::-1]), plain(files, {SECOND: -0.3, FIRST: {"text_encoder*": 0.4, "*": 0.7}}))
    assert same(one(studio), base)
    assert same(one(studio, adapters=(Use(adapter=FIRST, weight=0.0),)), base)


def test_tags_join_the_stack_and_an_adapter_that_is_in_both_is_refused(studio: Studio) -> None:
    settled = studio.settle(GenerateRequest(prompt=f"a fox <lora:{FIRST}:0.5:0.25>", adapters=(Use(adapter=SECOND),)))
    assert settled.prompt == "a fox"
    assert [(use.adapter, use.weight, use.text) for use in settled.adapters] == [
        (SECOND, 1.0, None),
        (FIRST, 0.5, 0.25),
    ]
    assert (settled.width, settled.height, settled.guidance, settled.base) == (64, 64, 4.0, DEMO.id)
    assert 0 <= settled.seed < 2**32
    with pytest.raises(ConfigError, match="is used twice"):
        studio.settle(GenerateRequest(prompt=f"<lora:{FIRST}:1>", adapters=(Use(adapter=FIRST),)))


@pytest.mark.parametrize("adapter", [FIRST, OTHERS])
def test_a_picture_of_a_batch_is_drawn_alone_again_to_the_bit(studio: Studio, adapter: str) -> None:
    rows = [("a fox", 1, 0.5, 0.2), ("a cat", 1, 0.0, 0.0), ("a dog", 3, 1.0, -1.0), ("a fox", 4, -0.5, 0.7)]
    asked = [
        studio.settle(
            GenerateRequest(
                prompt=prompt,
                seed=seed,
                steps=3,
                adapters=(Use(adapter=adapter, weight=weight), Use(adapter=SECOND, weight=other)),
            )
        )
        for prompt, seed, weight, other in rows
    ]
    together = studio.draw(asked, nothing)
    for row, drawn in enumerate(together):
        layout = drawn.request.layout
        assert layout is not None
        assert (layout.rows, layout.row, layout.by_sample) == (4, row, True)
        assert same(studio.draw([drawn.request], nothing)[0], drawn)
    bare = [request.model_copy(update={"adapters": ()}) for request in asked]
    assert same(studio.draw(bare, nothing)[1], together[1])  # at weight 0 it is the base, beside others that are not


def test_weights_that_are_the_same_in_a_batch_are_scalars(studio: Studio) -> None:
    asked = [studio.settle(GenerateRequest(seed=k, steps=2, adapters=(Use(adapter=FIRST),))) for k in range(2)]
    assert [drawn.request.layout.by_sample for drawn in studio.draw(asked, nothing) if drawn.request.layout] == [
        False
    ] * 2
    assert alike(asked[0]) == alike(asked[1])
    with pytest.raises(ConfigError, match="not alike"):
        studio.draw([asked[0], asked[1].model_copy(update={"steps": 3})], nothing)


def test_start_and_stop_are_steps_of_the_denoiser(studio: Studio) -> None:
    whole = one(studio, adapters=(Use(adapter=FIRST, text=0.0),))
    assert same(one(studio, adapters=(Use(adapter=FIRST, text=0.0, start=0, stop=4),)), whole)
    assert same(one(studio, adapters=(Use(adapter=FIRST, text=0.0, start=4),)), one(studio))
    early: dict[str, Any] = {"adapter": FIRST, "text": 0.0, "stop": 2}
    late: dict[str, Any] = {"adapter": FIRST, "text": 0.0, "start": 2}
    first, last = one(studio, adapters=(Use(**early),)), one(studio, adapters=(Use(**late),))
    assert not same(first, whole)
    assert not same(last, whole)
    assert not same(first, last)


def test_an_adapter_that_starts_after_the_last_step_is_said_to_do_nothing(studio: Studio) -> None:
    for start, count in ((3, 0), (4, 1)):
        notes = one(studio, adapters=(Use(adapter=FIRST, start=start),)).notes
        assert len(notes) == count
        assert all("starts at step 4, and the last is 3" in note for note in notes)


def test_blocks_are_factors_of_layers_and_wrong_ones_are_refused(studio: Studio) -> None:
    drawn = one(studio, adapters=(Use(adapter=FIRST, weight=0.8, blocks="MIDD"),))
    assert not same(drawn, one(studio, adapters=(Use(adapter=FIRST, weight=0.8),)))
    assert same(one(studio, adapters=(Use(adapter=FIRST, weight=0.8, blocks="NONE"),)), one(studio))
    assert same(one(studio, adapters=(Use(adapter=FIRST, blocks="ALL"),)), one(studio, adapters=(Use(adapter=FIRST),)))
    with pytest.raises(ConfigError, match="no block preset 'NOSUCH'"):
        one(studio, adapters=(Use(adapter=FIRST, blocks="NOSUCH"),))


def test_prompts_are_encoded_once_and_adapters_attached_once(files: Files) -> None:
    studio = made(files)
    for weight in (0.2, 0.4, 0.4, 0.6):
        one(studio, steps=1, adapters=(Use(adapter=FIRST, weight=weight, text=0.0),))
    assert (studio.counts["encodes"], studio.counts["attaches"], studio.counts["swaps"]) == (1, 1, 1)
    assert studio.counts["calls"] == 4
    one(studio, steps=1, adapters=(Use(adapter=FIRST, weight=0.2),))
    assert studio.counts["encodes"] == 2


def test_the_adapter_used_longest_ago_is_taken_off(files: Files) -> None:
    studio = made(files, attached=1)
    one(studio, steps=1, adapters=(Use(adapter=FIRST), Use(adapter=SECOND)))
    assert studio.attached == [FIRST, SECOND]
    one(studio, steps=1, adapters=(Use(adapter=SECOND),))
    assert studio.attached == [SECOND]
    assert live.adapters(studio.family.pipeline) == [SECOND]


def test_a_file_that_changed_is_read_again(files: Files, studio: Studio) -> None:
    path = files.folder / "changeable.safetensors"
    write(path, LoRA(rank=2), 5)
    before = one(studio, adapters=(Use(adapter="changeable"),))
    write(path, LoRA(rank=2), 6)
    os.utime(path, ns=(1, 1))
    after = one(studio, adapters=(Use(adapter="changeable"),))
    assert not same(before, after)
    assert same(after, plain(files, {"changeable": 1.0}))
    path.unlink()
    with pytest.raises(ConfigError, match="gone from the library"):
        one(studio, adapters=(Use(adapter="changeable"),))
    assert same(one(studio), plain(files, {}))


def test_an_adapter_of_another_base_is_refused_with_numbers_and_leaves_nothing(files: Files, studio: Studio) -> None:
    own = files.file(FIRST).parts
    deeper = {name.replace("encoder.layers.1.", "encoder.layers.7."): part for name, part in own.items()}
    imgadapt.save(AdapterFile(deeper), files.folder / "foreignone.safetensors")
    with pytest.raises(ConfigError, match=r"foreignone does not go on this base: 1 of the file's \d+ layers"):
        one(studio, adapters=(Use(adapter=FIRST), Use(adapter="foreignone")))
    assert "foreignone" not in live.adapters(studio.family.pipeline)
    assert same(one(studio), plain(files, {}))


def test_cancelling_within_a_step_leaves_the_base_as_it_was(files: Files, studio: Studio) -> None:
    seen: list[int] = []

    def stop(done: int, total: int, preview: bytes | None) -> None:
        seen.append(done)
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        one(studio, stop, steps=8, sampler="DPM++ 2M", adapters=(Use(adapter=FIRST),))
    assert seen == [0, 1, 2]
    assert all(not slot.on for _, _, slot in live.slots(studio.family.pipeline))
    assert same(one(studio), plain(files, {}))


def test_the_last_preview_is_the_picture(studio: Studio) -> None:
    seen: list[tuple[int, int, bytes | None]] = []
    drawn = one(studio, lambda *news: seen.append(news))
    assert [news[:2] for news in seen] == [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4)]
    assert seen[-1][2] is not None
    preview = Image.open(io.BytesIO(seen[-1][2]))
    assert (preview.format, preview.size) == ("WEBP", (256, 256))
    assert np.abs(pixels(preview.resize((64, 64))) - pixels(drawn)).mean() < 8


@pytest.mark.parametrize("sampler", ["Euler", "DPM++ 2M", "UniPC"])
def test_samplers_without_noise_agree_where_steps_are_many(studio: Studio, sampler: str) -> None:
    reference = _REFERENCE.setdefault("base", pixels(one(studio, steps=40)))
    assert np.abs(pixels(one(studio, steps=40, sampler=sampler)) - reference).mean() < 1


_REFERENCE: dict[str, Any] = {}


@pytest.mark.parametrize("sampler", ["Euler a", "DPM++ 2M SDE", "LCM"])
def test_samplers_with_noise_draw_a_seed_alike_in_any_batch(studio: Studio, sampler: str) -> None:
    asked = [studio.settle(GenerateRequest(prompt="a fox", seed=k, steps=3, sampler=sampler)) for k in (5, 6)]
    alone = one(studio, steps=3, sampler=sampler)
    assert np.abs(pixels(studio.draw(asked, nothing)[0]) - pixels(alone)).max() <= 1


def test_what_a_base_cannot_be_drawn_with_is_refused(studio: Studio) -> None:
    assert "Heun" not in samplers.for_base(studio.family)
    with pytest.raises(ConfigError, match="noise alone"):
        one(studio, sampler="DPM++ 2M Karras")
    with pytest.raises(ConfigError, match="LCM takes 50 steps at most"):
        one(studio, sampler="LCM", steps=60)


def test_a_batch_larger_than_any_is_not_drawn_for_one_picture_of_it(files: Files) -> None:
    studio = made(files, drawn_together=2 * 64 * 64)
    layout = {"rows": 2, "row": 1}
    assert one(studio, steps=1, layout=layout).request.layout is not None
    with pytest.raises(ConfigError, match="3 rows of 64 x 64 pixels are more than one batch"):
        one(studio, steps=1, layout={**layout, "rows": 3})
    assert one(studio, steps=1, width=128, height=128, layout={"rows": 1}).image.size == (128, 128)


def test_a_prompt_that_is_too_long_is_said_to_be_cut(studio: Studio) -> None:
    notes = one(studio, steps=1, prompt="a fox " * 20 + "zebra", negative="blue", guidance=1.0).notes
    assert "18 tokens" in notes[0]
    assert notes[0].endswith("zebra")
    assert "no effect" in notes[1]
    assert one(studio, steps=1, negative="blue").notes == []


def test_image_to_image_is_diffusers_own(files: Files, studio: Studio) -> None:
    from diffusers import StableDiffusionImg2ImgPipeline

    absent: Any = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    theirs: Any = StableDiffusionImg2ImgPipeline(**{**demo.pipeline().components, **absent})
    theirs.set_progress_bar_config(disable=True)
    with Image.open(files.folder / "pictureone.png") as image:
        wanted = theirs(
            "a fox",
            image=image,
            strength=0.5,
            num_inference_steps=8,
            guidance_scale=4.0,
            generator=torch.Generator().manual_seed(5),
        ).images[0]
    drawn = one(studio, steps=8, init="pictureone", denoise=0.5)
    assert np.abs(pixels(drawn) - pixels(wanted)).mean() < 0.5
    assert not same(drawn, one(studio, steps=8))


@pytest.mark.parametrize("sampler", ["base", "Euler", "DPM++ 2M"])
def test_outside_of_the_mask_a_picture_stays_as_it_is(files: Files, studio: Studio, sampler: str) -> None:
    with Image.open(files.folder / "pictureone.png") as image:
        before = pixels(image)
    after = pixels(one(studio, init="pictureone", mask="uppermask", denoise=1.0, sampler=sampler))
    assert (after[34:] == before[34:]).all()
    assert np.abs(after[:30] - before[:30]).mean() > 20
    empty = one(studio, init="pictureone", mask="emptymask", sampler=sampler)
    assert same(empty, before.astype(np.uint8))
    assert empty.notes == ["the mask is empty: nothing was redrawn"]


def test_sides_are_the_bases_or_those_of_the_picture_to_begin_from(studio: Studio, files: Files) -> None:
    Image.new("RGB", (90, 45)).save(files.folder / "widepicture.png")
    Image.new("RGBA", (900, 300)).save(files.folder / "largepicture.png")
    assert one(studio, steps=1, init="widepicture").image.size == (88, 48)
    assert one(studio, steps=1, init="largepicture").image.size == (112, 40)
    assert one(studio, steps=1, width=64, height=96).image.size == (64, 96)


@pytest.mark.parametrize("kind", ["sd1", "sdxl", "sd3", "flux"])
def test_every_family_draws_what_it_draws_by_itself(kind: str, files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(place: str, *, device: str, dtype: torch.dtype) -> Family:
        torch.manual_seed(0)
        pipeline = tiny.PIPELINES[place]()
        return FAMILIES[type(pipeline).__name__](pipeline, torch.device(device), dtype)

    monkeypatch.setattr(families, "load", load)
    given: Any = files
    studio = Studio(Settings(files.folder), given, given)
    studio.load(Base("tinytiny", kind, kind, kind))
    side = 32 if kind == "flux" else 16
    wanted = studio.family.draw(["a fox"], [5], steps=3, side=side)[0]
    seen: list[bytes | None] = []
    assert same(one(studio, lambda *news: seen.append(news[2]), steps=3, width=side, height=side), wanted)
    assert seen[-1] is not None
    said: dict[str, Any] = {"init": "pictureone", "width": 32, "height": 64, "sampler": "Heun", "denoise": 0.5}
    begun, bare = one(studio, **said, mask="uppermask"), one(studio, **said, mask="emptymask")
    assert (pixels(begun)[34:] == pixels(bare)[34:]).all()
    assert np.abs(pixels(begun)[:30] - pixels(bare)[:30]).mean() > 5


def test_a_base_that_fails_to_load_leaves_none(files: Files) -> None:
    studio = made(files)
    studio.load(DEMO)
    with pytest.raises(ConfigError):
        studio.load(Base("nosuchbase", "none", "sd1", str(files.folder / "none")))
    assert studio.base is None
    with pytest.raises(ConfigError, match="no base is loaded"):
        studio.settle(GenerateRequest())
