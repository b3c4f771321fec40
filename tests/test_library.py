"""The playground's library and bases: whatever lies in the folders, a card each, and none opened that must not be."""

import io
import json
import os
import struct
import threading
import time
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageFile

from imgadapt import LoRA, attach, collect, detach, save
from imgadapt.errors import ConfigError, DataError, FormatError
from imgadapt.header import MOST_BYTES
from imgadapt.playground.library import library as library_module
from imgadapt.playground.library.bases import Bases
from imgadapt.playground.library.cards import Reader, plain
from imgadapt.playground.library.library import Card, Library
from imgadapt.playground.library.naming import Row, names
from imgadapt.playground.library.scanning import Found, Scan
from imgadapt.playground.settings import Settings
from imgadapt.tensors import write_tensors
from tests import tiny

ALPHA = torch.tensor(2.0)
LAYER = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


def lora(rank: int = 4, width: int = 320, layer: str = LAYER) -> dict[str, torch.Tensor]:
    """An SD1 LoRA of one layer, in kohya's names."""
    return {
        f"{layer}.lora_down.weight": torch.ones(rank, width),
        f"{layer}.lora_up.weight": torch.ones(width, rank),
        f"{layer}.alpha": ALPHA.clone(),
    }


def put(path: Path, tensors: Mapping[str, torch.Tensor] | None = None, metadata: Mapping[str, str] = {}) -> Path:
    write_tensors(path, tensors if tensors is not None else lora(), metadata)
    return path


def raw(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def png(width: int = 40, height: int = 30, colour: str = "red") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(file, "PNG")
    return file.getvalue()


def bomb(side: int) -> bytes:
    """A PNG that says it has side x side pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "home" / "adapters").mkdir(parents=True)
    return tmp_path / "home"


def made(home: Path, **settings: Any) -> Library:
    return Library(Settings(home=home, **settings))


def own(library: Library) -> dict[str, Card]:
    """Cards of the home by name."""
    return {card.name: card for card in library.cards() if not card.folder.startswith("demo")}


# --- cards


def test_a_card_tells_method_rank_alpha_size_and_trigger_words(home: Path) -> None:
    tags = json.dumps({"x": {"ohwx": 12, "man": 3}})
    path = put(home / "adapters/people/face.safetensors", lora(), {"ss_tag_frequency": tags})
    (card,) = own(made(home)).values()
    assert (card.name, card.folder, card.format, card.architecture) == ("face", "people", "kohya", "sd1")
    assert [(k.method, k.rank, k.alpha, k.layers) for k in card.kinds] == [("lora", 4, 2.0, 1)]
    assert (card.components, card.numbers, card.dtypes) == (("unet",), 2 * 4 * 320, ("float32",))
    assert (card.trigger, card.weight, card.fault, card.size) == (("ohwx", "man"), 1.0, "", path.stat().st_size)


def test_files_alike_but_for_alpha_are_told_apart(home: Path) -> None:
    for alpha in (1.0, 3.0):
        put(home / f"adapters/a{alpha:g}.safetensors", {**lora(), f"{LAYER}.alpha": torch.tensor(alpha)})
    assert {name: card.kinds[0].alpha for name, card in own(made(home)).items()} == {"a1": 1.0, "a3": 3.0}


def test_the_packages_adapters_are_for_the_embedded_base(home: Path) -> None:
    cards = made(home).cards(folder="demo")
    assert {card.name: card.kinds[0].method for card in cards} == {
        "blueprint": "dora", "duotone": "lora", "ink": "lokr"
    }  # fmt: skip
    assert {card.architecture for card in cards} == {"demo"}
    assert all(not card.fault and card.size < 420_000 for card in cards)
    assert all((made(home).preview_of(card) or b"")[8:12] == b"WEBP" for card in cards)


def test_words_are_a_card_of_their_own(home: Path) -> None:
    put(home / "adapters/cat.safetensors", {"emb_params": torch.ones(2, 768)})
    card = own(made(home))["cat"]
    assert (card.words, card.format, card.numbers, card.fault) == (("cat",), "embedding", 1536, "")


def test_a_folder_of_pefts_is_one_card(home: Path) -> None:
    base = tiny.sd1()
    attach(base, LoRA(rank=2, alpha=6.0), targets="attention")
    folder = save(collect(base), home / "adapters" / "painter", format="peft")
    (card,) = own(made(home)).values()
    assert (card.name, card.kinds[0].alpha, card.fault, folder.is_dir()) == ("painter", 6.0, "", True)
    assert len(made(home).file(card.id).parts) == sum(kind.layers for kind in card.kinds)


def test_what_tools_put_beside_a_file_is_heard(home: Path) -> None:
    path = put(home / "adapters/style.safetensors", metadata={"ss_tag_frequency": json.dumps({"x": {"tag": 1}})})
    path.with_suffix(".json").write_text(
        json.dumps({"preferred weight": 0.7, "activation text": "in <b>ink</b>", "description": "a\nnote"})
    )
    (home / "adapters/Style.Preview.png").write_bytes(png())
    library = made(home)
    card = own(library)["style"]
    assert (card.weight, card.trigger, card.notes) == (0.7, ("in <b>ink</b>",), "a note")
    with Image.open(io.BytesIO(library.preview_of(card) or b"")) as preview:
        assert (preview.format, preview.size) == ("WEBP", (40, 30))


BROKEN_TEXTS = (
    "", "[]", "[" * 100_000, '{"preferred weight": NaN}', '{"preferred weight": true}', '{"preferred weight": 1e9}',
    '{"preferred weight": "x", "activation text": 5, "civitai": 3, "trainedWords": {}}', '{"notes": "\\ud800"}',
)  # fmt: skip


@pytest.mark.parametrize("text", BROKEN_TEXTS)
def test_broken_texts_beside_a_file_say_nothing(home: Path, text: str) -> None:
    put(home / "adapters/style.safetensors").with_suffix(".json").write_text(text)
    card = own(made(home))["style"]
    assert (card.weight, card.trigger, card.fault) == (1.0, (), "")
    assert card.notes == ""


def test_alpha_zero_means_the_rank_as_sd_scripts_has_it(home: Path) -> None:
    put(home / "adapters/a.safetensors", {**lora(), f"{LAYER}.alpha": torch.tensor(0.0)})
    assert own(made(home))["a"].kinds[0].alpha == 4


# --- hostile files


def overlapping(path: Path) -> Path:
    row = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    return raw(path, {"a.lora_up.weight": row, "a.lora_down.weight": row}, b"\0" * 8)


HOSTILE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty": (lambda p: p.write_bytes(b""), "empty"),
    "header of 2^63": (lambda p: raw(p, b"{}", length=2**63), "not a safetensors file"),
    "cut": (lambda p: raw(p, b"{}", length=500), "not whole"),
    "not JSON": (lambda p: raw(p, b"{]"), "not JSON"),
    "deep JSON": (lambda p: raw(p, b"[" * 200_000), "no table"),
    "a list": (lambda p: raw(p, []), "no table"),
    "metadata of numbers": (lambda p: raw(p, {"__metadata__": {"a": 1}}), "is no text"),
    "strange row": (lambda p: raw(p, {"a": {"dtype": "F32"}}), "no tensor's"),
    "overlapping": (overlapping, "overlap"),
    "pickle renamed": (lambda p: torch.save(lora(), p), "pickle"),
    "no tensors": (lambda p: put(p, {}), "none of its 0 keys"),
    "a model": (lambda p: put(p, {"model.layer.weight": torch.ones(3, 3)}), "model's own weights"),
    "rank 0": (lambda p: put(p, lora(0)), "down, up is empty"),
    "up missing": (lambda p: put(p, {k: v for k, v in lora().items() if "up" not in k}), "make no adapter"),
    "A/B mismatch": (lambda p: put(p, {**lora(), f"{LAYER}.lora_up.weight": torch.ones(320, 5)}), "make no adapter"),
    "alpha NaN": (lambda p: put(p, {**lora(), f"{LAYER}.alpha": torch.tensor(float("nan"))}), "alpha"),
    "unknown keys": (lambda p: put(p, {**lora(), "who.knows": torch.ones(1)}), "unknown"),
    "own format, broken": (lambda p: put(p, lora(), {"imgadapt": "[" * 100_000}), "imgadapt"),
    "strange dtype": (
        lambda p: raw(p, {"a.alpha": {"dtype": "C64", "shape": [1], "data_offsets": [0, 8]}}, b"\0" * 8), "adapter"
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_file_is_a_card_with_a_fault(home: Path, what: str) -> None:
    make, said = HOSTILE[what]
    make(home / "adapters/evil.safetensors")
    put(home / "adapters/good.safetensors")
    library = made(home)
    cards = own(library)
    assert said in cards["evil"].fault
    assert (cards["evil"].kinds, cards["evil"].format, cards["good"].fault) == ((), "", "")
    assert str(home) not in cards["evil"].fault
    assert "\n" not in cards["evil"].fault
    with pytest.raises(FormatError, match="evil cannot be used"):
        library.file(cards["evil"].id)
    assert [card.name for card in library.cards() if card.folder == ""] == ["good", "evil"]  # usable ones first


@pytest.mark.parametrize("word", ["data_offsets", "data\\u005foffsets"])
def test_a_million_tensors_are_refused_before_they_are_loaded(
    word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = ",".join(f'"{k}":{{"dtype":"F32","shape":[0],"{word}":[0,0]}}' for k in range(50_001))
    path = raw(tmp_path / "many.safetensors", f"{{{rows}}}".encode())
    monkeypatch.setattr("imgadapt.playground.library.cards.outline", lambda *_: pytest.fail("loaded"))
    assert Reader().read(path).fault == "more than 50,000 tensors, which no model has"
    raw(path, b"{}" + b" " * (MOST_BYTES + 1))
    assert Reader().read(path).fault == f"a header of {MOST_BYTES + 3:,} bytes, which no model's file has"


def test_no_pickle_is_opened(home: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return os.mkdir, (str(home / "pwned"),)

    for end in ("pt", "bin", "ckpt", "pth", "safetensors"):
        torch.save({"a": Evil()}, home / "adapters" / f"evil-{end}.{end}")
    folder = home / "adapters" / "peft"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    torch.save({"a": Evil()}, folder / "adapter_model.bin")
    cards = own(made(home))
    assert {name: "pickle" in card.fault for name, card in cards.items()} == {
        **{f"evil-{end}": True for end in ("pt", "bin", "ckpt", "pth", "safetensors")}, "peft": True
    }  # fmt: skip
    assert not (home / "pwned").exists()


def test_links_out_of_the_library_and_devices_are_not_opened(home: Path, tmp_path: Path) -> None:
    outside = put(tmp_path / "elsewhere/secret.safetensors")
    (home / "adapters/link.safetensors").symlink_to(outside)
    (home / "adapters/loop.safetensors").symlink_to(home / "adapters/loop.safetensors")
    (home / "adapters/folder").symlink_to(outside.parent)
    (home / "adapters/inside.safetensors").symlink_to(put(home / "adapters/real.safetensors"))
    (home / "adapters/real.png").symlink_to(tmp_path / "picture.png")
    (tmp_path / "picture.png").write_bytes(png())
    os.mkfifo(home / "adapters/pipe.safetensors")
    library = made(home)
    cards = own(library)
    assert cards.keys() == {"link", "loop", "inside", "real", "pipe"}
    assert "leads out" in cards["link"].fault
    assert cards["loop"].fault
    assert cards["pipe"].fault == "not a plain file"
    assert cards["inside"].fault == ""
    assert cards["real"].preview is None
    with pytest.raises(FormatError, match="leads out"):
        library.file(cards["link"].id, strict=False)
    with pytest.raises(FormatError, match="leads out"):
        library.digest(cards["link"].id)
    for name in ("link", "loop", "pipe"):
        with pytest.raises((FormatError, ConfigError)):
            library.download(cards[name].id)
    assert library.download(cards["real"].id) == (home / "adapters/real.safetensors", "real.safetensors")
    assert made(home, adapters=(tmp_path / "elsewhere",)).named("link").fault == ""  # its folder is named


def test_a_folder_whose_weights_are_a_link_out_is_not_opened(home: Path, tmp_path: Path) -> None:
    secret, folder = put(tmp_path / "secret.safetensors"), home / "adapters/peft"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"r": 4, "lora_alpha": 4}')
    (folder / "adapter_model.safetensors").symlink_to(secret)
    library = made(home)
    card = library.named("peft")
    assert "lead out of the library" in card.fault
    for read in (lambda: library.file(card.id, strict=False), lambda: library.digest(card.id)):
        with pytest.raises(FormatError, match="leads out"):
            read()


def test_a_folders_config_and_weights_are_both_seen_to_change(home: Path) -> None:
    folder, pipe = home / "adapters/peft", tiny.sd1()
    attach(pipe, LoRA(rank=2, alpha=2))
    save(collect(pipe), folder, format="peft")
    library = made(home)
    first, mark, digest = library.named("peft"), library.mark(library.named("peft").id), library.digest
    inside = [folder / name for name in ("adapter_model.safetensors", "adapter_config.json")]
    assert first.size == sum(path.stat().st_size for path in inside)
    assert [kind.alpha for kind in first.kinds] == [2]
    before = digest(first.id)
    config = json.loads(inside[1].read_text())
    inside[1].write_text(json.dumps({**config, "lora_alpha": 8, "alpha_pattern": {}}))
    assert (digest(first.id), library.mark(first.id) == mark) == (before, False)
    library.scan()
    assert [kind.alpha for kind in library.get(first.id).kinds] == [8]
    detach(pipe)
    attach(pipe, LoRA(rank=4, alpha=4))
    kept = inside[1].stat()
    save(collect(pipe), folder, format="peft")
    inside[1].write_text(json.dumps({**config, "r": 4, "lora_alpha": 8, "rank_pattern": {}, "alpha_pattern": {}}))
    os.utime(inside[1], ns=(kept.st_atime_ns, kept.st_mtime_ns))
    library.scan()
    assert [kind.rank for kind in library.get(first.id).kinds] == [4]


def test_a_card_whose_file_became_a_link_out_is_not_opened(home: Path, tmp_path: Path) -> None:
    path = put(home / "adapters/a.safetensors")
    library = made(home)
    path.unlink()
    path.symlink_to(put(tmp_path / "secret.safetensors"))
    with pytest.raises(FormatError, match="leads out"):
        library.file(library.named("a").id)


def test_a_file_that_goes_between_listing_and_loading_is_said_to_be_gone(home: Path) -> None:
    path = put(home / "adapters/a.safetensors")
    library = made(home)
    card = library.named("a")
    path.unlink()
    for ask in (library.get, library.file, library.digest):
        with pytest.raises(ConfigError, match="a is not in the library"):
            ask(card.id)
    path.write_bytes(b"now nothing")
    with pytest.raises(FormatError, match="not a safetensors file") as error:
        library.file(card.id)
    assert str(home) not in str(error.value)
    library.scan()
    assert own(library)["a"].fault


def test_depth_and_number_of_files_are_bounded_and_it_is_said(home: Path) -> None:
    put(home.joinpath("adapters", *"abcdefghij", "deep.safetensors"))
    library = made(home)
    assert own(library) == {}
    assert any("deep" in line for line in library.left_out)
    for k in range(3):
        put(home / f"adapters/{k}.safetensors")
    few = Scan(home / "adapters", (".safetensors",), "", (home,), most=2)
    assert len(list(few)) == 2
    assert few.left_out == ["adapters: more than 2 files; the rest is left out"]


def test_an_unreadable_preview_is_none(home: Path) -> None:
    put(home / "adapters/a.safetensors")
    for data in (b"", b"<svg/>", png()[:60]):
        (home / "adapters/a.png").write_bytes(data)
        library = made(home)
        assert library.preview_of(library.named("a")) is None


@pytest.mark.parametrize("side", [5000, 12000, 20000])
def test_a_bomb_is_not_decoded(home: Path, monkeypatch: pytest.MonkeyPatch, side: int) -> None:
    put(home / "adapters/a.safetensors")
    (home / "adapters/a.png").write_bytes(bomb(side))
    library = made(home)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda *_: pytest.fail("decoded"))
    assert library.preview_of(library.named("a")) is None
    with pytest.raises(DataError, match="16,777,216 are allowed"):
        library.set_preview(library.named("a").id, bomb(side))


# --- names, ids, search


def test_ids_survive_a_restart_and_are_no_paths(home: Path) -> None:
    put(home / "adapters/x/a.safetensors")
    first, again = made(home).named("a"), made(home).named("a")
    assert first.id == again.id
    assert len(first.id) == 16
    assert set(first.id) <= set("0123456789abcdef")
    assert str(home) not in repr(first)


def test_names_are_unique_and_can_stand_in_a_prompt(home: Path, tmp_path: Path) -> None:
    for place in (
        "a.safetensors",
        "x/a.safetensors",
        "y/A.safetensors",
        "x/ev:il<b>\n.safetensors",
        f"{'n' * 200}.safetensors",
    ):
        put(home / "adapters" / place)
    put(tmp_path / "more/a.safetensors")
    library = made(home, adapters=(tmp_path / "more",))
    names = list(own(library))
    assert {"a", "x/a", "y/A", "more/a", "ev_il_b_"} < set(names)
    assert all(not set(name) & set(":<>\n") and len(name) <= 120 for name in names)
    assert len({name.casefold() for name in names}) == 6
    assert library.named("X/A").folder == "x"
    assert library.named("A").folder == ""


def test_each_of_many_long_names_means_its_own_adapter(home: Path) -> None:
    for k in range(12):
        put(home / f"adapters/{'n' * 130}{k:02}.safetensors")
    library = made(home)
    cards = own(library)
    assert len(cards) == 12
    assert all(library.named(name).id == card.id and len(name) <= 120 for name, card in cards.items())


def test_names_of_thousands_alike_are_found_in_one_pass() -> None:
    rows = [Row(str(k), "n" * 130, "", Found(Path(str(k)), "", 0, 0)) for k in range(20_000)]
    began = time.thread_time()
    assert len(set(names(rows))) == 20_000
    assert time.thread_time() - began < 10  # trying all numbers again for each took minutes


def test_a_name_that_is_not_there_gets_the_closest(home: Path) -> None:
    put(home / "adapters/watercolour.safetensors")
    put(home / "adapters/x/same.safetensors")
    put(home / "adapters/y/same.safetensors")
    library = made(home)
    with pytest.raises(ConfigError, match=r"no adapter 'watercolor' in the library; close: watercolour"):
        library.named("watercolor")
    with pytest.raises(ConfigError, match=r"'same' may be x/same, y/same"):
        library.named("same")
    with pytest.raises(ConfigError, match="no adapter"):
        library.named("../../etc/passwd")


def test_a_search_wants_all_its_words(home: Path) -> None:
    put(home / "adapters/people/face.safetensors", metadata={"modelspec.trigger_phrase": "Ohwx Man"})
    put(home / "adapters/styles/face.safetensors")
    library = made(home)
    assert [card.name for card in library.cards("FACE people")] == ["people/face"]
    assert [card.name for card in library.cards("ohwx lora")] == ["people/face"]
    assert [card.name for card in library.cards("face", architecture="sd1", folder="styles")] == ["styles/face"]
    assert library.cards("face", architecture="flux") == []
    assert sorted({card.folder for card in library.cards()}) == ["demo", "people", "styles"]


def test_a_run_shows_its_results_and_nothing_else(home: Path) -> None:
    run = home / "runs/fox"
    for name in ("adapter", "adapter.kohya", "best", "snapshots/step-0000050", "checkpoints/0000050/state",
                 "cache/latents", "probe"):  # fmt: skip
        put(run / f"{name}.safetensors")
    cards = own(made(home))
    assert cards.keys() == {"fox", "fox-best", "fox-step-0000050"}
    assert {card.folder for card in cards.values()} == {"runs/fox"}


def test_a_preview_is_kept_in_the_home(home: Path) -> None:
    put(home / "adapters/a.safetensors")
    library = made(home)
    card = library.set_preview(library.named("a").id, png(2000, 1000))
    assert sorted(path.name for path in (home / "adapters").iterdir()) == ["a.safetensors"]
    for one in (library, made(home)):
        with Image.open(io.BytesIO(one.preview_of(one.get(card.id)) or b"")) as preview:
            assert preview.size == (256, 128)


# --- speed and threads


def test_files_that_did_not_change_are_not_read_again(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    reading = Reader.read

    def counted(self: Reader, path: Path) -> Any:
        read.append(path.name)
        return reading(self, path)

    monkeypatch.setattr(Reader, "read", counted)
    path = put(home / "adapters/a.safetensors")
    put(home / "adapters/b.safetensors")
    library = made(home)
    read.clear()
    library.scan()
    assert read == []
    assert own(made(home)).keys() == {"a", "b"}
    assert read == []  # nor after a restart
    put(path, lora(8))
    library.scan()
    assert (read, own(library)["a"].kinds[0].rank) == (["a.safetensors"], 8)


def test_a_broken_memory_is_forgotten(home: Path) -> None:
    put(home / "adapters/a.safetensors")
    made(home)
    for text in ("", "[]", "{}", '{"version": 0}', (home / "library.json").read_text().replace('"kinds"', '"x"')):
        (home / "library.json").write_text(text)
        assert own(made(home))["a"].kinds[0].rank == 4


def test_a_digest_is_that_of_the_file_and_kept_while_it_does_not_change(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import hashlib

    path = put(home / "adapters/a.safetensors")
    library = made(home)
    id = library.named("a").id
    assert library.digest(id) == hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(library_module.hashlib, "file_digest", lambda *_: pytest.fail("read again"))
    assert library.digest(id) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_many_threads_scan_and_search_at_once(home: Path) -> None:
    for k in range(20):
        put(home / f"adapters/{k}.safetensors")
    library = made(home)
    wrong: list[Any] = []

    def work(k: int) -> None:
        try:
            for turn in range(10):
                if k % 2:
                    put(home / f"adapters/{k}.safetensors", lora(turn + 1))
                    library.scan()
                found = [card for card in library.cards("lora") if card.folder == ""]
                assert len(found) == 20
                library.named(str(k))
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize(
    ("text", "shown"),
    [("a\nb\x00c", "a b c"), ("x\u202ey", "x y"), ("\ud800z", "z"), ("é😀", "é😀"), ("n" * 300, "n" * 199 + "…")],
)
def test_shown_text_is_one_plain_line(text: str, shown: str) -> None:
    assert plain(text) == shown


# --- bases


def test_bases_are_what_diffusers_folders_are_and_the_rest_is_said(tmp_path: Path) -> None:
    models = tmp_path / "models"
    for name in ("sd1", "sdxl"):
        tiny.PIPELINES[name]().save_pretrained(models / "sub" / name)
    raw(models / "lora.safetensors", {})
    (models / "old.ckpt").write_bytes(b"\x80")
    (models / "other").mkdir()
    (models / "other/model_index.json").write_text('{"_class_name": "KolorsPipeline"}')
    (models / "broken").mkdir()
    (models / "broken/model_index.json").write_text("{")
    bases = Bases(Settings(home=tmp_path, models=(models, tmp_path / "none")))
    assert {base.name: base.kind for base in bases.all} == {"demo": "demo", "sub/sd1": "demo", "sub/sdxl": "sdxl"}
    assert bases.first.name == "demo"
    said = "\n".join(bases.faults)
    assert all(
        name in said for name in ("lora", "old.ckpt: a pickle", "KolorsPipeline", "broken", "none: no such folder")
    )
    assert str(tmp_path) not in said
    one = bases.named("SUB/SDXL")
    assert bases.get(one.id) == one
    assert Bases(Settings(home=tmp_path, models=(models,))).named("sub/sdxl").id == one.id
    assert str(tmp_path) not in repr(one)


def test_a_base_that_is_not_there_or_not_allowed_is_refused(tmp_path: Path) -> None:
    bases = Bases(Settings(home=tmp_path))
    with pytest.raises(ConfigError, match="no such base"):
        bases.get("0123456789abcdef")
    with pytest.raises(ConfigError, match="takes none out of the hub"):
        bases.named("some/model")
    with pytest.raises(ConfigError, match="takes none out of the hub"):
        Bases(Settings(home=tmp_path, hub=True, shared=True)).named("sdxl")
    with pytest.raises(ConfigError, match="not on this machine"):
        Bases(Settings(home=tmp_path, hub=True)).named("nobody/nothing-here")
    with pytest.raises(ConfigError, match="no base '/etc'"):
        bases.named("/etc")
    with pytest.raises(ConfigError):
        Bases(Settings(home=tmp_path, base=str(tmp_path / "missing")))
