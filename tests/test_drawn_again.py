"""Pictures to the bit: weight 0 is the base, and a PNG draws its picture again, whatever was drawn in between."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import imgadapt
from imgadapt import LoRA, demo
from imgadapt.embeddings import Embedding
from imgadapt.file import AdapterFile
from imgadapt.methods import DoRA, LoKr
from imgadapt.playground.desk import Progress
from imgadapt.playground.pictures.album import Picture
from imgadapt.playground.requests import GenerateRequest
from imgadapt.playground.session import Playground
from imgadapt.playground.settings import Limits, Settings

NAMES = ("plain", "convs", "decomposed", "pivotal", "word")
MODES: dict[str, dict[str, Any]] = {
    "base": {},
    "base, 5 pictures in batches of 3": {"count": 5},
    "Euler a, 5 pictures": {"sampler": "Euler a", "count": 5},
    "DPM++ 2M SDE": {"sampler": "DPM++ 2M SDE", "negative": "blue zork"},
    "LCM, without guidance": {"sampler": "LCM", "guidance": 1.0},
    "image to image": {"init": "init", "denoise": 0.5, "sampler": "Euler a"},
    "inpainting": {"init": "init", "mask": "mask", "sampler": "DPM++ 2M SDE", "count": 2},
}


def _write(folder: Path) -> None:
    """Adapters of the embedded base: with text encoders, on convolutions, of weights' directions, and with words."""
    on_text = ["attention", "text_encoder*q_proj"]
    rows = [("plain", LoRA(rank=4), on_text), ("convs", LoKr(rank=2, factor=8), ["convolution"])]
    rows = [*rows, ("decomposed", DoRA(LoRA(rank=2)), on_text)]
    for seed, (name, method, targets) in enumerate(rows):
        pipe = demo.pipeline()
        torch.manual_seed(seed)
        imgadapt.attach(pipe, method, targets=targets)
        for parameter in imgadapt.parameters(pipe):
            parameter.data = torch.randn(parameter.shape) * 0.1
        imgadapt.save(imgadapt.collect(pipe), folder / f"{name}.safetensors")
    width = int(demo.pipeline().text_encoder.config.hidden_size)
    parts = imgadapt.load(folder / "plain.safetensors").parts
    for name, own, token in (("pivotal", parts, "zork"), ("word", {}, "grue")):
        vectors = {"clip_l": torch.randn(2, width)}
        imgadapt.save(AdapterFile(own, embeddings={token: Embedding(token, vectors)}), folder / f"{name}.safetensors")


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    home = tmp_path_factory.mktemp("home")
    (home / "adapters").mkdir()
    _write(home / "adapters")
    return Settings(home, limits=Limits(drawn_together=3 * 64 * 64))


@pytest.fixture(scope="module")
def playground(settings: Settings) -> Iterator[Playground]:
    made = Playground(settings)
    yield made
    made.close()


@pytest.fixture(scope="module")
def given(playground: Playground) -> dict[str, str]:
    """Ids of a picture to begin from, and of a mask."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8))
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 64, 30))
    ids: dict[str, str] = {}
    for name, image in {"init": picture, "mask": mask}.items():
        file = io.BytesIO()
        image.save(file, "PNG")
        ids[name] = playground.album.accept(file.getvalue()).id
    return ids


def _drawn(playground: Playground, given: dict[str, str], mode: str, *uses: dict[str, Any]) -> list[Picture]:
    """uses: of adapters, by their names."""
    said: dict[str, Any] = {"prompt": "a fox, zork, grue", "seed": 5, "steps": 3, **MODES[mode]}
    said |= {name: given[name] for name in ("init", "mask") if name in said}
    adapters = [{**use, "adapter": playground.library.named(use["adapter"]).id} for use in uses]
    return playground.generate(GenerateRequest.of({**said, "adapters": adapters})).result()


def _pixels(picture: Picture) -> Any:
    with Image.open(picture.path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def _apart(some: list[Picture], others: list[Picture]) -> int:
    """The largest difference, in levels of 255."""
    return max(int(np.abs(_pixels(a) - _pixels(b)).max()) for a, b in zip(some, others, strict=True))


def _redrawn(playground: Playground, picture: Picture) -> list[Picture]:
    restored = playground.restore(picture.path.read_bytes())
    assert (restored.lacks, restored.exact) == ((), True)
    return playground.generate(restored.request).result()


STACK = (
    {"adapter": "pivotal", "weight": 0.7, "start": 1},
    {"adapter": "decomposed", "text": 0.3, "stop": 2},
    {"adapter": "word"},
)


@pytest.mark.parametrize("mode", MODES)
def test_weight_zero_is_the_base_and_a_png_draws_its_picture_again(
    playground: Playground, given: dict[str, str], mode: str
) -> None:
    base = _drawn(playground, given, mode)
    stacked = _drawn(playground, given, mode, *STACK)
    assert _apart(base, stacked) > 20
    off = [{"adapter": name, "weight": 0.0} for name in NAMES]
    assert _apart(base, _drawn(playground, given, mode, *off)) == 0
    assert _apart(base, _drawn(playground, given, mode, *({**use, "weight": 0.0, "text": 0.0} for use in STACK))) == 0
    last = len(base) - 1
    assert _apart(_redrawn(playground, stacked[last]), stacked[last:]) == 0
    assert _apart(_redrawn(playground, base[last]), base[last:]) == 0


def test_words_are_read_only_where_their_adapter_acts(playground: Playground, given: dict[str, str]) -> None:
    base = _drawn(playground, given, "base")
    for name in ("word", "pivotal"):
        acts = _drawn(playground, given, "base", {"adapter": name, "weight": 0.01})
        assert _apart(base, acts) > 20
        assert _apart(base, _drawn(playground, given, "base", {"adapter": name, "weight": 0.0})) == 0
        assert _apart(base, _drawn(playground, given, "base", {"adapter": name, "blocks": "NONE"})) == 0
        assert _apart(acts, _drawn(playground, given, "base", {"adapter": name, "weight": 0.01})) == 0
        studied = _drawn(playground, given, "base", {"adapter": name, "weight": 0.0, "text": 0.01})
        assert _apart(base, studied) > 20


def test_a_png_draws_its_picture_again_after_a_cancel_another_base_and_in_another_playground(
    playground: Playground, settings: Settings, given: dict[str, str]
) -> None:
    kept = [_drawn(playground, given, mode, *STACK)[-1] for mode in MODES]
    ticket = playground.generate(
        GenerateRequest(prompt="zork", steps=50, adapters=tuple(_uses(playground, "convs", "pivotal", "plain")))
    )
    for event in ticket.events():
        if isinstance(event, Progress) and event.done == 2:
            ticket.cancel()
    assert all(_apart(_redrawn(playground, picture), [picture]) == 0 for picture in kept[:3])
    first = playground.studio.base
    assert first is not None
    playground.desk.submit(lambda ticket: setattr(playground.studio, "_loaded", None)).result()
    playground.switch(first.id).result()
    assert all(_apart(_redrawn(playground, picture), [picture]) == 0 for picture in kept[3:5])

    other = Playground(settings)
    try:
        stack = tuple(_uses(other, *reversed(NAMES)))
        other.generate(GenerateRequest(prompt="zork grue", steps=1, seed=1, adapters=stack)).result()
        assert all(_apart(_redrawn(other, picture), [picture]) == 0 for picture in kept)
    finally:
        other.close()


def _uses(playground: Playground, *names: str) -> list[Any]:
    adapters = [{"adapter": playground.library.named(name).id} for name in names]
    return list(GenerateRequest.of({"adapters": adapters}).adapters)
