"""The playground's inspector and converter: what a file is, what of it goes on the base, and what it becomes."""

import json
import sys
import threading
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from imgadapt import LoRA, attach, collect, demo, detach, load, save
from imgadapt.atomic import folder_atomically
from imgadapt.errors import ConfigError, FormatError, ImgadaptError
from imgadapt.file import AdapterFile
from imgadapt.methods import DoRA
from imgadapt.playground import inspecting
from imgadapt.playground.converting import Converter, ConvertRequest
from imgadapt.playground.drawing.studio import Studio
from imgadapt.playground.inspecting import Inspector, Match
from imgadapt.playground.library.telling import training
from imgadapt.playground.session import Playground
from imgadapt.playground.settings import Settings
from imgadapt.summary import norm_of
from imgadapt.tensors import read_tensors, write_tensors
from tests import tiny


@pytest.fixture(scope="module")
def adapter() -> AdapterFile:
    """A LoRA for the embedded base that changes something."""
    base = demo.pipeline()
    torch.manual_seed(0)
    attach(base, LoRA(rank=2, alpha=3.0), targets="attention")
    made = collect(base)
    detach(base)
    for part in made.parts.values():
        part.tensors["up"].normal_(std=0.1)
    return made


@pytest.fixture(scope="module")
def playground(tmp_path_factory: pytest.TempPathFactory, adapter: AdapterFile) -> Iterator[Playground]:
    home = tmp_path_factory.mktemp("home")
    save(adapter, home / "adapters/style.safetensors", format="kohya")
    playground = Playground(Settings(home=home))
    playground.switch(playground.bases.first.id).result()
    yield playground
    playground.close()


def card(playground: Playground, name: str) -> str:
    playground.library.scan()
    return playground.library.named(name).id


def put(playground: Playground, name: str, tensors: Mapping[str, torch.Tensor], said: Mapping[str, str] = {}) -> str:
    write_tensors(playground.settings.home / f"adapters/{name}.safetensors", tensors, said)
    return card(playground, name)


def kohya(playground: Playground) -> dict[str, torch.Tensor]:
    tensors, _ = read_tensors(playground.settings.home / "adapters/style.safetensors")
    return {key: tensor.clone() for key, tensor in tensors.items()}


def matched(playground: Playground, id: str) -> Match:
    found = Inspector(playground).look(id).match
    assert found is not None
    return found


# --- inspecting


def test_details_are_those_of_the_file(playground: Playground, adapter: AdapterFile) -> None:
    found = Inspector(playground).look(card(playground, "style"))
    assert found.match == Match("demo", len(adapter.parts), len(adapter.parts), {}, {}, "all")
    norms = [norm_of(part) or 0.0 for part in adapter.parts.values()]
    assert sum(norm**2 for norm in found.norms.values()) == pytest.approx(sum(norm**2 for norm in norms), rel=1e-4)
    assert set(found.norms) > {"unet.down_blocks.0", "unet.up_blocks.3"}
    assert found.sha256 == playground.library.digest(found.card.id)
    assert found.recipe == ""


def test_what_matches_is_what_attach_takes(playground: Playground) -> None:
    id = card(playground, "ink")
    assert matched(playground, id).verdict == "all"
    attach(demo.pipeline(), playground.library.file(id))


def test_a_file_for_another_base_matches_nothing(playground: Playground) -> None:
    flux = {
        "transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": torch.ones(2, 3072),
        "transformer.single_transformer_blocks.0.attn.to_q.lora_B.weight": torch.ones(3072, 2),
    }
    found = matched(playground, put(playground, "flux", flux))
    assert (found.verdict, found.matched, found.total) == ("none", 0, 1)
    assert list(found.unmatched.values()) == ["demo has no transformer"]


def test_a_file_for_sd1_has_the_names_and_not_the_sizes(playground: Playground) -> None:
    stem = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    sd1 = {f"{stem}.lora_down.weight": torch.ones(2, 320), f"{stem}.lora_up.weight": torch.ones(320, 2)}
    found = matched(playground, put(playground, "sd1", sd1))
    assert found.verdict == "none"
    assert "320" in next(iter(found.unmatched.values()))
    with pytest.raises(ImgadaptError):
        attach(demo.pipeline(), playground.library.file(card(playground, "sd1")))


def test_a_corrupt_key_is_told_and_the_rest_matched(playground: Playground) -> None:
    tensors = kohya(playground)
    key = next(key for key in tensors if key.endswith("lora_up.weight"))
    tensors[key.replace("lora_unet", "lora_unwt")] = tensors.pop(key)
    id = put(playground, "corrupt", tensors)
    assert "keys" in playground.library.get(id).fault
    found = matched(playground, id)
    assert found.verdict == "some"
    assert found.matched == found.total == len(tensors) // 3 - 1
    whole = [key, key.replace("lora_up", "lora_down"), key.replace("lora_up.weight", "alpha")]
    assert set(found.unknown) == {key.replace("lora_unet", "lora_unwt"), *whole[1:]}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_layer_that_is_not_finite_does_not_match(playground: Playground, value: float) -> None:
    tensors = kohya(playground)
    key = next(key for key in tensors if key.endswith("lora_up.weight"))
    tensors[key][0, 0] = value
    id = put(playground, "diverged", tensors)
    found = Inspector(playground).look(id)
    assert found.match is not None
    assert (found.match.verdict, found.match.matched) == ("some", found.match.total - 1)
    assert "NaN" in next(iter(found.match.unmatched.values()))
    assert all(norm == norm and norm != float("inf") for norm in found.norms.values())
    with pytest.raises(FormatError, match="NaN"):
        attach(demo.pipeline(), playground.library.file(id))


def test_words_match_by_their_width(playground: Playground) -> None:
    good = put(playground, "good-word", {"emb_params": torch.ones(2, 128)})
    bad = put(playground, "bad-word", {"emb_params": torch.ones(2, 768)})
    assert matched(playground, good).verdict == "all"
    found = matched(playground, bad)
    assert (found.verdict, found.total) == ("none", 1)
    assert "768 wide" in found.unmatched["word 'bad-word'"]


def test_adapters_on_the_base_do_not_change_what_matches(playground: Playground, adapter: AdapterFile) -> None:
    pipeline = playground.studio.family.pipeline
    attach(pipeline, adapter, name="other")
    try:
        assert matched(playground, card(playground, "style")).verdict == "all"
    finally:
        detach(pipeline, "other")


def test_looking_while_the_desk_works_harms_nobody(playground: Playground, adapter: AdapterFile) -> None:
    pipeline = playground.studio.family.pipeline
    id, stop, wrong = card(playground, "style"), threading.Event(), []

    def look() -> None:
        try:
            while not stop.is_set():
                assert matched(playground, id).verdict == "all"
        except BaseException as error:
            wrong.append(error)

    thread = threading.Thread(target=look)
    thread.start()
    for _ in range(5):
        attach(pipeline, adapter, name="busy")
        detach(pipeline, "busy")
    stop.set()
    thread.join()
    assert wrong == []


class _Loaded:
    """A family, as far as it is looked at."""

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline


def test_a_base_is_known_by_more_than_its_place_in_memory(
    playground: Playground, monkeypatch: pytest.MonkeyPatch
) -> None:
    inspector, ink = Inspector(playground), playground.library.named("ink").id
    monkeypatch.setattr(inspecting, "id", lambda _: 7, raising=False)  # as of one that was made where another had been
    verdicts: list[str] = []
    for pipe in (playground.studio.family.pipeline, tiny.sd1()):
        monkeypatch.setattr(Studio, "family", _Loaded(pipe))
        found = inspector.look(ink).match
        assert found is not None
        verdicts.append(found.verdict)
    assert verdicts == ["all", "none"]


def test_without_a_base_there_is_no_match(tmp_path: Path) -> None:
    playground = Playground(Settings(home=tmp_path))
    try:
        assert Inspector(playground).look(playground.library.named("ink").id).match is None
    finally:
        playground.close()


def test_a_changed_file_is_looked_at_again(playground: Playground) -> None:
    inspector = Inspector(playground)
    first = inspector.look(put(playground, "changing", kohya(playground)))
    doubled = {k: t * 2 if k.endswith("lora_up.weight") else t for k, t in kohya(playground).items()}
    again = inspector.look(put(playground, "changing", {**doubled, "lora_te_x.who": torch.ones(1)}))
    assert again.sha256 != first.sha256
    assert all(again.norms[block] == pytest.approx(2 * norm, rel=1e-5) for block, norm in first.norms.items())


def test_sd_scripts_metadata_is_told_in_words() -> None:
    said = {
        "ss_num_train_images": "40", "ss_num_epochs": "10", "ss_epoch": "7", "ss_max_train_steps": "1000",
        "ss_learning_rate": "0.0001", "ss_text_encoder_lr": "5e-05", "ss_resolution": "(512, 768)",
        "ss_bucket_info": json.dumps({"buckets": {"0": {}, "1": {}}}), "ss_optimizer": "torch.optim.AdamW",
        "ss_dataset_dirs": json.dumps({"10_fox": {"n_repeats": 10, "img_count": 4}}), "ss_noise_offset": "None",
        "ss_tag_frequency": json.dumps({"10_fox": {"fox": 4, "snow": 9}}), "ss_training_started_at": "0",
        "ss_training_finished_at": "5400", "ss_network_module": "networks.lora", "ss_network_dim": "8",
    }  # fmt: skip
    told = dict(training(said))
    assert told["Pictures"] == "40"
    assert (told["Epochs"], told["Steps"], told["Took"]) == ("7 of 10", "1000", "1.5 h")
    assert told["Learning rate"] == "0.0001, text 5e-05"
    assert told["Resolution"] == "512 x 768, 2 shapes"
    assert told["Folders (pictures x repeats)"] == "10_fox: 4 x 10"
    assert told["Frequent tags"] == "snow (9), fox (4)"
    assert told["Network"] == "networks.lora, rank 8"
    assert "Noise offset" not in told


BROKEN = ("", "[]", "{", "[" * 100_000, "null", '{"a": 5}', '{"a": {"b": "c"}}', '{"a": {"b": 1e999}}', "\x00\u202e",
          "9" * 5000)  # fmt: skip


@pytest.mark.parametrize("value", BROKEN, ids=range(len(BROKEN)))
def test_no_metadata_breaks_the_telling(value: str) -> None:
    keys = ("ss_tag_frequency", "ss_dataset_dirs", "ss_bucket_info", "software", "training_info", "ss_resolution",
            "ss_training_started_at", "ss_training_finished_at", "ss_learning_rate", "modelspec.title")  # fmt: skip
    for name, shown in training(dict.fromkeys(keys, value)):
        assert shown.isprintable()
        assert 0 < len(shown) <= 500, name


def test_metadata_comes_as_it_is_and_bounded(playground: Playground) -> None:
    evil = "<img src=x onerror=alert(1)>"
    id = put(playground, "said", kohya(playground), {"ss_training_comment": evil, evil: "x" * 30_000})
    found = Inspector(playground).look(id)
    assert found.metadata["ss_training_comment"] == evil
    assert found.metadata[evil].endswith("… (10,000 more characters)")
    assert ("Comment", evil) in found.training


# --- converting


def converted(playground: Playground, converter: Converter, **request: Any) -> Any:
    return converter.convert(ConvertRequest.of(request)).result()


def test_the_formats_are_those_of_the_library(playground: Playground) -> None:
    names = [name for name, _ in Converter(playground).formats()]
    assert {"kohya", "diffusers", "peft", "comfyui", "imgadapt"} <= set(names)


@pytest.mark.parametrize("format", ["diffusers", "comfyui", "imgadapt", "lycoris"])
def test_a_converted_file_draws_the_same(playground: Playground, adapter: AdapterFile, format: str) -> None:
    converter = Converter(playground)
    id = card(playground, "style")
    plan = converter.plan(ConvertRequest.of({"adapter": id, "format": format}))
    assert (set(plan.losses), sum(plan.losses.values()), plan.possible) == ({"exact"}, len(adapter.parts), "")
    made = converted(playground, converter, adapter=id, format=format)
    assert (made.name, made.plan, converter.get(made.id)) == (f"style.{format}.safetensors", plan, made)
    assert made.path.is_relative_to(playground.settings.home / "outputs/converted")
    back = load(made.path)
    assert back.parts.keys() == adapter.parts.keys()
    for name, part in adapter.parts.items():
        assert back.parts[name].method.scale == part.method.scale
        assert all(torch.equal(back.parts[name].tensors[key], tensor) for key, tensor in part.tensors.items())


def test_the_format_that_is_offered_can_hold_the_adapter(playground: Playground) -> None:
    converter, lokr, lora = Converter(playground), card(playground, "ink"), card(playground, "style")
    assert converter.plan(ConvertRequest.of({"adapter": lokr, "format": "kohya"})).possible
    assert converter.fitting(lokr, "kohya") == "lycoris"
    assert (converter.fitting(lora, "kohya"), converter.fitting(lora, "peft")) == ("kohya", "peft")
    assert not converter.plan(ConvertRequest.of({"adapter": lokr, "format": "lycoris"})).possible


def test_a_dtype_is_written(playground: Playground) -> None:
    made = converted(playground, Converter(playground), adapter=card(playground, "style"), format="kohya", dtype="fp16")
    tensors, _ = read_tensors(made.path)
    assert {t.dtype for key, t in tensors.items() if "lora" in key.rpartition(".")[0][-10:]} == {torch.float16}


def test_pefts_two_files_come_as_one(playground: Playground, adapter: AdapterFile, tmp_path: Path) -> None:
    made = converted(playground, Converter(playground), adapter=card(playground, "style"), format="peft")
    assert made.name == "style.peft.zip"
    with zipfile.ZipFile(made.path) as archive:
        archive.extractall(tmp_path)
    assert load(tmp_path / "style.peft").parts.keys() == adapter.parts.keys()
    assert [path.name for path in made.path.parent.iterdir()] == [made.name]


def test_what_a_format_has_no_word_for_is_said_before_and_nothing_is_written(playground: Playground) -> None:
    base = demo.pipeline()
    attach(base, DoRA(LoRA(rank=2)), targets="attention")
    save(collect(base), playground.settings.home / "adapters/dora.safetensors", format="imgadapt")
    converter = Converter(playground)
    request = {"adapter": card(playground, "dora"), "format": "kohya-oft"}
    plan = converter.plan(ConvertRequest.of(request))
    assert plan.possible
    before = sorted((playground.settings.home / "outputs").rglob("*"))
    with pytest.raises(ImgadaptError, match="cannot be written as"):
        converted(playground, converter, **request)
    assert sorted((playground.settings.home / "outputs").rglob("*")) == before


def test_a_request_for_nothing_known_is_refused(playground: Playground) -> None:
    converter = Converter(playground)
    id = card(playground, "style")
    with pytest.raises(ConfigError, match="no format 'exe'"):
        converter.plan(ConvertRequest.of({"adapter": id, "format": "exe"}))
    with pytest.raises(ConfigError, match="not in the library"):
        converter.convert(ConvertRequest.of({"adapter": "0" * 16, "format": "kohya"}))
    with pytest.raises(ConfigError):
        ConvertRequest.of({"adapter": "../../x", "format": "kohya"})
    with pytest.raises(ConfigError, match="not kept any more"):
        converter.get("0123456789abcdef")


def test_a_faulty_adapter_is_not_converted(playground: Playground) -> None:
    id = put(playground, "broken", {"who.knows": torch.ones(1)})
    with pytest.raises(ImgadaptError, match="broken cannot be used"):
        converted(playground, Converter(playground), adapter=id, format="kohya")


@pytest.mark.skipif(sys.platform == "win32", reason="files are not locked there")
def test_what_a_killed_process_left_goes_at_the_start_and_what_is_being_written_stays(playground: Playground) -> None:
    folder = playground.settings.folder("outputs") / "converted"
    dead = folder / ".0123456789abcdef.0.tmp"
    dead.mkdir(parents=True)
    (dead / "half.safetensors").write_bytes(b"half")
    with folder_atomically(folder / "fedcba9876543210") as inside:
        Converter(playground)
        assert inside.is_dir()
        assert not dead.exists()


def test_fifty_files_are_kept(playground: Playground, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("imgadapt.playground.converting._KEPT", 2)
    converter, id = Converter(playground), card(playground, "style")
    made = [converted(playground, converter, adapter=id, format="kohya") for _ in range(3)]
    with pytest.raises(ConfigError, match="not kept"):
        converter.get(made[0].id)
    assert converter.get(made[2].id).path.is_file()
    folders = list((playground.settings.home / "outputs/converted").iterdir())
    assert {folder.name for folder in folders} == {made[1].id, made[2].id}


def test_a_disk_that_cannot_be_written_fails_with_a_message_and_leaves_nothing(
    playground: Playground, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    id = card(playground, "style")
    monkeypatch.setattr("imgadapt.atomic.os.fsync", full)
    with pytest.raises(ImgadaptError, match="No space left") as error:
        converted(playground, Converter(playground), adapter=id, format="kohya")
    assert str(playground.settings.home) not in str(error.value)
