"""The lab: what is merged is what the stack draws, its reports, its names, and that nothing else is written over."""

import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from imgadapt import attach, collect, detach, live, load, save
from imgadapt.combining import files
from imgadapt.combining.files import digest_of
from imgadapt.combining.rules import RULES
from imgadapt.errors import ConfigError, ImgadaptError, OutputError
from imgadapt.methods import IA3, OFT, DoRA, LoHa, LoRA, Method
from imgadapt.playground import filenames
from imgadapt.playground.desk import Failed, Progress
from imgadapt.playground.library.library import Card
from imgadapt.playground.merges import lab as lab_module
from imgadapt.playground.merges.lab import Lab, MergeRequest
from imgadapt.playground.merges.stacking import use_of
from imgadapt.playground.requests import GenerateRequest
from imgadapt.playground.session import Playground
from imgadapt.playground.settings import Settings

LAYERS = ["unet.*.attn2.to_k", "unet.*.attn1.to_v", "unet.down_blocks.*.conv1", "text_encoder.*.q_proj"]
BLOCKS = ",".join(f"{k % 3 / 2:g}" for k in range(26))
METHODS: Mapping[str, tuple[Method, list[str]]] = {
    "style": (LoRA(rank=4, alpha=2.0), LAYERS),
    "hero": (LoHa(rank=2, alpha=3.0), LAYERS),
    "dora": (DoRA(LoRA(rank=2, alpha=1.0)), LAYERS[:2]),
    "oft": (OFT(block_size=4), LAYERS[:2]),
    "oft2": (OFT(block_size=4), LAYERS[:2]),
    "ia3": (IA3(), LAYERS[:2]),
}


@pytest.fixture(scope="module")
def folder(_loaded: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of each, which changes pictures visibly."""
    made, pipe = tmp_path_factory.mktemp("adapters"), _loaded
    for k, (name, (method, targets)) in enumerate(METHODS.items()):
        torch.manual_seed(k)
        attach(pipe, method, targets=targets)
        for parameter in live.parameters(pipe):
            with torch.no_grad():
                parameter += 0.15 * torch.randn_like(parameter)
        save(collect(pipe), made / f"{name}.safetensors", format="imgadapt")
        detach(pipe)
    return made


@pytest.fixture(scope="module")
def playground(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Playground]:
    made = Playground(Settings(tmp_path_factory.mktemp("home"), adapters=(folder,)))
    yield made
    made.close()


@pytest.fixture
def lab(playground: Playground) -> Lab:
    return Lab(playground)


def card(playground: Playground, name: str) -> Card:
    return playground.library.named(name)


def use(playground: Playground, name: str, weight: float = 1.0, **more: Any) -> dict[str, Any]:
    return {"adapter": card(playground, name).id, "weight": weight, **more}


def merging(*uses: Mapping[str, Any], **more: Any) -> MergeRequest:
    return MergeRequest.of({"adapters": list(uses), **more})


def drawn(playground: Playground, *uses: Mapping[str, Any]) -> NDArray[np.int16]:
    request = GenerateRequest.of({"prompt": "a fox", "seed": 3, "steps": 3, "adapters": list(uses)})
    (made,) = playground.generate(request).result()
    with Image.open(made.path) as image:
        return np.asarray(image.convert("RGB"), np.int16)


@pytest.mark.parametrize(
    "stack",
    [
        (("style", 0.8, {}), ("hero", -0.5, {})),
        (("style", 0.7, {"text": 0.2}), ("hero", 0.4, {"text": 0.0})),
        (("style", 0.9, {"blocks": BLOCKS}), ("hero", 0.6, {"text": -0.3, "blocks": "ALL0.5"})),
        (("dora", 0.7, {}), ("oft", 0.5, {})),
        (("ia3", 0.6, {}), ("style", 0.5, {})),
    ],
    ids=["weights", "text strengths", "blocks", "on the base's weights", "outputs scaled"],
)
def test_a_saved_merge_draws_what_the_live_stack_draws(playground: Playground, lab: Lab, stack: Any) -> None:
    uses = [use(playground, name, weight, **more) for name, weight, more in stack]
    assert lab.report(merging(*uses)).result().exact
    saved = lab.save(merging(*uses)).result()
    base, live_one, merged = drawn(playground), drawn(playground, *uses), drawn(playground, use(playground, saved.name))
    assert np.abs(live_one - base).mean() > 1  # of 255: the stack changes the picture
    assert np.abs(merged - live_one).max() <= 1
    assert (merged != live_one).mean() < 0.01


def test_a_report_has_the_cosines_and_what_each_rank_would_lose(playground: Playground, lab: Lab) -> None:
    uses = use(playground, "style", 0.8), use(playground, "hero", 0.5)
    report = lab.report(merging(*uses)).result()
    assert list(report.names) == ["style", "hero"]
    cosines = np.array(report.cosines)
    assert cosines.diagonal() == pytest.approx([1, 1])
    assert abs(cosines[0, 1] - cosines[1, 0]) < 1e-12
    ranks, errors = zip(*report.residuals, strict=True)
    assert list(ranks) == [1, 2, 4, 8]  # rank 4, and LoHa's 2 times 2
    assert list(errors) == sorted(errors, reverse=True)
    assert errors[-1] == 0
    for rank, error in report.residuals[:3]:  # against the merge that is really cut to it
        cut = lab.report(merging(*uses, rule="svd", rank=rank)).result()
        assert not cut.exact
        said = next(line for line in reversed(cut.lines) if "residual" in line)
        assert float(said.rpartition("residual ")[2]) == pytest.approx(error, abs=6e-5)
    assert any("[1] style" in line for line in report.lines)


def test_a_sum_at_the_full_rank_is_exact_and_other_rules_are_not(playground: Playground, lab: Lab) -> None:
    uses = use(playground, "style", 0.8), use(playground, "hero", 0.5)
    told = {
        rule: lab.report(merging(*uses, rule=rule)).result().exact
        for rule in ("weighted", "concat", "ties", "slerp", "task_arithmetic")
    }
    assert told == {"weighted": True, "concat": True, "ties": False, "slerp": False, "task_arithmetic": False}
    assert lab.report(merging(*uses, rule="svd", rank=8)).result().exact
    assert not lab.report(merging(*uses, rule="svd", rank=4)).result().exact


def test_rotations_have_no_ranks_to_lose(playground: Playground, lab: Lab) -> None:
    report = lab.report(merging(use(playground, "oft"), use(playground, "oft2"), rule="compose")).result()
    assert list(report.residuals) == []
    assert not report.exact


def test_the_rules_are_those_of_merging(lab: Lab) -> None:
    assert [name for name, _, _ in lab.rules()] == [rule.name for rule in RULES]
    options = {name: options for name, _, options in lab.rules()}
    assert options["ties"]["density"] == 0.5 or 0 < options["ties"]["density"] <= 1
    assert options["weighted"] == {}


def test_a_replayed_recipe_is_the_same_request_and_gives_the_same_bytes(playground: Playground, lab: Lab) -> None:
    uses = use(playground, "style", 0.8, text=0.1, blocks=BLOCKS), use(playground, "hero", -0.25)
    asked = merging(*uses, rule="ties", options={"density": 0.25}, rank=3, seed=7, dtype="fp16", name="again")
    first = lab.save(asked).result()
    replayed = lab.replay(first.id)
    assert {one.adapter: one for one in replayed.adapters} == {one.adapter: one for one in asked.adapters}
    rest = {"adapters": asked.adapters}
    assert replayed.model_copy(update=rest) == asked
    second = lab.save(replayed).result()
    assert second.path.name == "again-2.safetensors"
    assert digest_of(second.path) == digest_of(first.path)


def test_what_was_merged_with_a_base_is_replayed_with_that_base_only(
    playground: Playground, lab: Lab, tmp_path: Path
) -> None:
    saved = lab.save(merging(use(playground, "dora", 0.5), use(playground, "style"), name="with base")).result()
    assert 'base = "demo"' in playground.library.file(saved.id).metadata["imgadapt_recipe"]
    again = lab.save(lab.replay(saved.id)).result()
    assert digest_of(again.path) == digest_of(saved.path)


def test_a_replay_says_which_inputs_are_not_here(playground: Playground, lab: Lab, tmp_path: Path) -> None:
    saved = lab.save(merging(use(playground, "style"), use(playground, "hero"), name="lost")).result()
    home = Playground(Settings(tmp_path, adapters=(saved.path.parent,)))
    try:
        with pytest.raises(ConfigError, match=r"2 of its 2 inputs are not in the library: (hero|style)\.safetensors"):
            Lab(home).replay(card(home, "lost").id)
    finally:
        home.close()
    with pytest.raises(ConfigError, match="style was not made by merging"):
        lab.replay(card(playground, "style").id)


def test_a_recipe_that_no_stack_can_have_is_refused() -> None:
    entry = files.Entry("x.safetensors", 0.5, {"unet": 0.5, "te": 3.0}, "OUTALL")
    assert use_of(entry, "0" * 16) == {"adapter": "0" * 16, "weight": 0.25, "text": 1.5, "blocks": "OUTALL"}
    others = {
        "masks": files.Entry("x.safetensors", masks={"attn2": 0.0}),
        "a weight for text_encoder_2": files.Entry("x.safetensors", components={"text_encoder_2": 0.5}),
        "blocks by name": files.Entry("x.safetensors", blocks={"IN04": 0.5}),
    }
    for said, other in others.items():
        with pytest.raises(ConfigError, match=f"the recipe has {said} .*for x.safetensors"):
            use_of(other, "0" * 16)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"adapters": [{"start": 2}]}, "start and stop are of steps"),
        ({"adapters": [{"stop": 9}]}, "start and stop are of steps"),
        ({"adapters": [{}, {}]}, "twice"),
        ({"adapters": []}, "adapters"),
        ({"rule": "nonsense"}, "no rule 'nonsense'"),
        ({"rule": "ties", "options": {"density": float("nan")}}, "density is nan"),
        ({"rule": "ties", "options": {"density": [1]}}, "options map names"),
        ({"rule": "ties", "options": {"x" * 999: 1}}, "options map names"),
        ({"options": {"density": 0.5}}, "weighted has no option 'density'"),
        ({"rank": 4, "error": 0.1}, "rank and error"),
        ({"rank": 0}, "rank"),
        ({"rank": True}, "rank"),
        ({"size": float("inf")}, "size"),
        ({"format": "../../x"}, "format is '../../x'"),
        ({"dtype": "int8"}, "dtype"),
        ({"output": "/etc/passwd"}, "output"),
        ({"adapters": [{"adapter": "../../../etc/passwd"}]}, "adapter"),
        ({"adapters": [{"adapter": "0" * 16}]}, "not in the library"),
    ],
)
def test_what_cannot_be_merged_is_refused_before_it_waits(
    playground: Playground, lab: Lab, changed: Mapping[str, Any], said: str
) -> None:
    values = {**changed}
    values["adapters"] = [use(playground, "style") | one for one in changed.get("adapters", [{}])]
    with pytest.raises(ConfigError, match=said):
        lab.report(MergeRequest.of(values))
    with pytest.raises(ConfigError, match=said):
        lab.save(MergeRequest.of(values))


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("../../x", "x"), ("/abs", "abs"), (r"C:\x", "x"), ("con", "con_"),
        ("LPT1.txt", "LPT1_.txt"), ("con .txt", "con_.txt"), ("com².txt", "com²_.txt"), (".hidden", "hidden"),
        ("a\nb", "a b"), ("a<lora:b:1>c", "a lora b 1 c"), ("..", "style merged"), ("", "style merged"),
        ("  ", "style merged"), ("ü" * 200, "ü" * 50),
        ("style\u202egnp", "style gnp"), ("a\x7fb", "a b"), ("日本", "日本"),
    ],
)  # fmt: skip
def test_a_merge_is_called_as_asked_and_lies_where_merges_lie(
    playground: Playground, lab: Lab, name: str, file: str
) -> None:
    saved = lab.save(merging(use(playground, "style"), name=name)).result()
    folder = playground.settings.home / "adapters" / "merged"
    assert saved.path.parent.resolve() == folder.resolve()
    number = saved.path.stem.removeprefix(file)
    assert number == "" or (number[0] == "-" and number[1:].isdigit())
    assert load(saved.path).parts


def test_another_file_is_never_written_over(playground: Playground, lab: Lab, tmp_path: Path) -> None:
    folder = playground.settings.folder("adapters") / "merged"
    folder.mkdir(exist_ok=True)
    outside = tmp_path / "outside"
    (folder / "kept.safetensors").write_text("mine")
    (folder / "kept-2.safetensors").symlink_to(outside)
    saved = lab.save(merging(use(playground, "style"), name="kept")).result()
    assert saved.path.name == "kept-3.safetensors"
    assert (folder / "kept.safetensors").read_text() == "mine"
    assert not outside.exists()
    (folder / "kept.safetensors").unlink()
    (folder / "kept-2.safetensors").unlink()


def test_a_full_disk_is_said_and_leaves_no_file(
    playground: Playground, lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OutputError(f"cannot write {playground.settings.home}/adapters/merged/x: No space left on device")

    before = set((playground.settings.home / "adapters").rglob("*"))
    monkeypatch.setattr(lab_module, "save", full)
    with pytest.raises(ImgadaptError, match="No space left on device") as error:
        lab.save(merging(use(playground, "style"), name="full")).result()
    assert str(playground.settings.home) not in str(error.value)
    assert set((playground.settings.home / "adapters").rglob("*")) == before


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"cannot make the folder .*file: not a folder"):
        filenames.placed(tmp_path / "file", "x", ".safetensors", Path.touch)
    with pytest.raises(OutputError, match="cannot write to"):
        filenames.made(tmp_path / "file", "x")
    with pytest.raises(OutputError, match="no name of a file"):
        filenames.placed(tmp_path, "../x", "", Path.touch)


@pytest.mark.parametrize("rule", ["weighted", "ties"])
@pytest.mark.parametrize("what", ["save", "report"])
def test_a_cancelled_merge_ends_within_a_layer_and_leaves_no_file(
    playground: Playground, lab: Lab, rule: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = set((playground.settings.home / "adapters").rglob("*"))
    uses = use(playground, "style"), use(playground, "hero")
    held, layers = threading.Event(), list[str]()
    asked = lab_module._watched

    def watched(weight: Any, check: Any) -> Any:
        factor = asked(weight, check)

        def seen(layer: str) -> float:
            layers.append(layer)
            held.wait(10)
            return factor(layer)

        return seen

    monkeypatch.setattr(lab_module, "_watched", watched)
    ticket = getattr(lab, what)(merging(*uses, rule=rule, name="cancelled"))
    assert isinstance(next(event for event in ticket.events() if isinstance(event, Progress)), Progress)
    ticket.cancel()
    held.set()
    *_, end = ticket.events()
    assert end == Failed("stopped", cancelled=True)
    assert len(layers) < 8  # of some hundreds that would be asked for
    assert set((playground.settings.home / "adapters").rglob("*")) == before


def test_an_adapter_that_is_deleted_while_the_merge_waits_is_said_without_folders(
    folder: Path, playground: Playground, lab: Lab
) -> None:
    gone = folder / "gone.safetensors"
    gone.write_bytes((folder / "style.safetensors").read_bytes())
    playground.library.scan()
    asked = merging(use(playground, "gone"), use(playground, "hero"))
    recipe = lab._recipe(asked)
    gone.unlink()
    with pytest.raises(ConfigError, match="gone is not in the library"):
        lab.save(asked)
    with pytest.raises(ImgadaptError, match=r"gone\.safetensors"):
        files.opened(recipe)
    playground.library.scan()


def test_half_precision_is_noted(playground: Playground, lab: Lab) -> None:
    report = lab.report(merging(use(playground, "style"), use(playground, "hero"), dtype="bf16")).result()
    assert report.exact
    assert any("bf16, which rounds" in line for line in report.lines)
