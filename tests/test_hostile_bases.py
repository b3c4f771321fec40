"""Bases and recipes of strangers: folders that lie, files that change, paths that lead elsewhere."""

import json
import os
import pickle
import random
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from imgadapt import load
from imgadapt.combining import verify
from imgadapt.combining.checkpoints import baking
from imgadapt.combining.checkpoints.baking import bake
from imgadapt.combining.checkpoints.base import open_base
from imgadapt.combining.checkpoints.extracting import extract
from imgadapt.combining.engine import Engine
from imgadapt.combining.keep import Keep
from imgadapt.combining.layers import Input
from imgadapt.combining.recipe import Entry, MergeRecipe
from imgadapt.combining.recipes import KEY
from imgadapt.demo import PIPELINE
from imgadapt.errors import ConfigError, FormatError, ImgadaptError, StateError
from imgadapt.training import families

Change = Callable[[Path], None]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A copy of the embedded base."""
    shutil.copytree(PIPELINE, tmp_path / "base")
    return tmp_path / "base"


def refused(base: Path, *, at_once: bool = True) -> str:
    """What is said of a base that is none. at_once: before any of it is loaded."""
    began = time.thread_time()
    with pytest.raises(ImgadaptError) as caught:
        families.load(str(base))
    if at_once:
        assert time.thread_time() - began < 2
    said = str(caught.value)
    assert len(said) < 600
    assert said.isprintable()
    return said


def edited(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def sharded(base: Path, names: Any) -> Path:
    """The UNet's weights under an index that says this of every key."""
    weights = base / "unet" / "diffusion_pytorch_model.safetensors"
    keys = [*load_file(weights)]
    index = weights.with_suffix(".safetensors.index.json")
    index.write_text(json.dumps({"weight_map": dict.fromkeys(keys[:2], names)}))
    return index


@pytest.mark.parametrize(
    "name",
    ["../../outside.safetensors", "/etc/passwd", "/tmp/x.safetensors", "unet/x.safetensors", "x.bin", "x.safetensors\0",
     "..", "", 5, None, ["a"], {"a": 1}, "..\\x.safetensors"],
)  # fmt: skip
def test_an_index_names_only_safetensors_beside_it(base: Path, tmp_path: Path, name: Any) -> None:
    shutil.copy(base / "unet" / "diffusion_pytorch_model.safetensors", tmp_path / "outside.safetensors")
    index = sharded(base, name)
    with pytest.raises(FormatError, match=index.name):
        open_base(base)
    assert index.name in refused(base)


@pytest.mark.parametrize(
    "text",
    [b"", b"[]", b"{}", b"\xff", b"[" * 100_000, b'{"weight_map": []}', b'{"weight_map": 5}', b" " * (17 * 2**20)],
)
def test_an_index_of_any_bytes_is_refused(base: Path, text: bytes) -> None:
    index = sharded(base, "x.safetensors")
    index.write_bytes(text)
    with pytest.raises(FormatError, match=index.name):
        open_base(base)
    assert index.name in refused(base)


def test_no_index_that_diffusers_reads_leads_elsewhere(base: Path, tmp_path: Path) -> None:
    weights = base / "unet" / "diffusion_pytorch_model.safetensors"
    shutil.move(weights, tmp_path / "outside.safetensors")
    (base / "unet" / "x.fp16.safetensors").touch()
    index = {"weight_map": dict.fromkeys(load_file(tmp_path / "outside.safetensors"), "../../outside.safetensors")}
    for name in ("safetensors.index.json", "safetensors.index.fp16.json", "safetensors.fp16.index.json"):
        path = base / "unet" / f"diffusion_pytorch_model.{name}"
        path.write_text(json.dumps(index))
        assert name in refused(base)
        path.unlink()


@pytest.mark.parametrize("name", ["model_index.json", "adapter_config.json"])
def test_a_pipeline_or_an_adapter_in_a_part_is_refused(base: Path, name: str) -> None:
    """transformers would follow the second to another base."""
    (base / "text_encoder" / name).write_text(json.dumps({"base_model_name_or_path": str(PIPELINE / "text_encoder")}))
    assert name in refused(base)


def test_memory_that_is_out_is_no_fault_of_the_base(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import diffusers

    def out(*args: Any, **options: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", out)
    with pytest.raises(MemoryError):
        families.load(str(base))


def test_a_shard_that_is_not_there_or_no_file_is_named(base: Path) -> None:
    sharded(base, "lost.safetensors")
    with pytest.raises(FormatError, match=r"lost\.safetensors.*not there"):
        open_base(base)
    (base / "unet" / "lost.safetensors").symlink_to("/dev/zero")
    with pytest.raises(FormatError, match=r"lost.safetensors"):
        open_base(base)
    assert "lost.safetensors" in refused(base)


def test_a_tensor_in_two_shards_is_refused(base: Path) -> None:
    weights = base / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    key = next(iter(tensors))
    weights.unlink()
    save_file(tensors, base / "unet" / "a.safetensors")
    save_file({key: tensors[key]}, base / "unet" / "b.safetensors")
    index = base / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}))
    with pytest.raises(FormatError, match=f"{key} is in .*a.safetensors and in .*b.safetensors"):
        open_base(base)


SIZES = [
    ("text_encoder/config.json", "num_hidden_layers", 10**9),
    ("text_encoder/config.json", "num_hidden_layers", 10**400),
    ("text_encoder/config.json", "hidden_size", 10**12), ("text_encoder/config.json", "vocab_size", -(10**12)),
    ("unet/config.json", "layers_per_block", 10**6), ("unet/config.json", "layers_per_block", [2, 10**6]),
    ("unet/config.json", "transformer_layers_per_block", [[1, 10**9]]), ("unet/config.json", "sample_size", 10**6),
    ("unet/config.json", "down_block_types", ["DownBlock2D"] * 5000),
    ("unet/config.json", "cross_attention_dim", 1e300),
    ("unet/config.json", "in_channels", {"a": 10**20}), ("vae/config.json", "block_out_channels", [2**40] * 2),
    ("scheduler/scheduler_config.json", "num_train_timesteps", 10**12),
]  # fmt: skip


@pytest.mark.parametrize(("file", "key", "value"), SIZES, ids=range(len(SIZES)))
def test_sizes_that_no_model_has_are_refused_by_name(base: Path, file: str, key: str, value: Any) -> None:
    edited(base / file, **{key: value})
    said = refused(base)
    assert file in said
    assert key in said or "'a'" in said or " a is" in said


WRONG: list[tuple[str, Any]] = [
    ("model_index.json", {"_class_name": 5}), ("model_index.json", {"_class_name": ["a", "b"]}),
    ("model_index.json", {"_class_name": "os.system"}), ("model_index.json", {"../unet": ["diffusers", "UNet2DModel"]}),
    ("model_index.json", {"unet": ["os", "system"]}), ("model_index.json", {"unet": "os"}),
    ("model_index.json", {"unet": ["trap", "Trap"]}),
    ("model_index.json", {"unet": ["diffusers"]}), ("model_index.json", {"unet": [5, 6]}),
    ("model_index.json", {"unet": ["diffusers", "NoSuchClass"]}), ("model_index.json", {"unet": None}),
    ("model_index.json", {"text_encoder": ["transformers", "pipeline"]}),
    ("model_index.json", {"vae": ["diffusers", "UNet2DConditionModel"]}),
    ("unet/config.json", {"in_channels": "many"}), ("unet/config.json", {"block_out_channels": None}),
    ("unet/config.json", {"down_block_types": ["NoSuchBlock"] * 3}), ("unet/config.json", {"act_fn": "no such"}),
    ("unet/config.json", {"block_out_channels": []}), ("unet/config.json", {"attention_head_dim": 0}),
    ("vae/config.json", {"latent_channels": 0}), ("text_encoder/config.json", {"hidden_size": "x"}),
    ("text_encoder/config.json", {"num_attention_heads": 0}), ("text_encoder/config.json", {"hidden_act": "no such"}),
    ("scheduler/scheduler_config.json", {"_class_name": "NoSuchScheduler", "beta_schedule": 5}),
    ("scheduler/scheduler_config.json", {"beta_schedule": "no such"}),
    ("scheduler/scheduler_config.json", {"beta_start": "x"}),
    ("scheduler/scheduler_config.json", {"trained_betas": {}}),
    ("scheduler/scheduler_config.json", {"num_train_timesteps": -5}),
    ("scheduler/scheduler_config.json", {"num_train_timesteps": "x"}),
    ("scheduler/scheduler_config.json", {"prediction_type": ["x"]}),
]  # fmt: skip


@pytest.mark.parametrize(("file", "changes"), WRONG, ids=range(len(WRONG)))
def test_configs_that_contradict_themselves_are_errors_of_ours(base: Path, file: str, changes: Any) -> None:
    edited(base / file, **changes)
    refused(base, at_once=False)


@pytest.mark.parametrize(
    "file",
    ["model_index.json", "unet/config.json", "vae/config.json", "text_encoder/config.json", "tokenizer/tokenizer.json",
     "scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json", "unet/diffusion_pytorch_model.safetensors"],
)  # fmt: skip
def test_files_of_any_bytes_are_errors_of_ours(base: Path, file: str) -> None:
    whole, chance = (base / file).read_bytes(), random.Random(file)
    cut = whole[: chance.randrange(1, len(whole))]
    for data in (b"", b"\xff" * 100, b"[]", b"5", b"null", b'"x"', b"[" * 100_000, chance.randbytes(1000), cut):
        (base / file).write_bytes(data)
        refused(base, at_once=False)
    (base / file).unlink()
    (base / file).symlink_to("/dev/zero")
    if "tokenizer" not in file:
        refused(base, at_once=False)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_weights_that_are_in_no_file_are_not_made_up(base: Path, part: str) -> None:
    """transformers would give them random values, and say so in a table only."""
    (weights,) = (base / part).glob("*.safetensors")
    tensors = load_file(weights)
    lost = sorted(key for key in tensors if key.endswith(".weight"))[3]
    del tensors[lost]
    save_file(tensors, weights, {"format": "pt"})
    said = refused(base, at_once=False)
    assert f"{part} is not whole: 1 of its weights" in said
    assert lost.removeprefix("text_model.") in said


class Trap:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, left: Path) -> None:
        self.left = left

    def __reduce__(self) -> Any:
        return Path.touch, (self.left,)


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("unet", "diffusion_pytorch_model.bin"),
        ("vae", "diffusion_pytorch_model.bin"),
        ("text_encoder", "pytorch_model.bin"),
    ],
)
@pytest.mark.parametrize("good", [True, False])
def test_weights_in_pickles_are_refused_though_they_are_good(
    base: Path, tmp_path: Path, part: str, name: str, good: bool
) -> None:
    (weights,) = (base / part).glob("*.safetensors")
    tensors = load_file(weights)
    weights.unlink()
    if good:
        torch.save(tensors, base / part / name)
    else:
        (base / part / name).write_bytes(pickle.dumps(Trap(tmp_path / "left"), 2))
    said = refused(base)
    assert "pickle" in said
    assert name in said
    assert not (tmp_path / "left").exists()


def test_pickles_beside_safetensors_are_not_looked_at(base: Path, tmp_path: Path) -> None:
    for part, name in (("unet", "diffusion_pytorch_model.bin"), ("text_encoder", "pytorch_model.bin")):
        (base / part / name).write_bytes(pickle.dumps(Trap(tmp_path / "left"), 2))
    assert families.load(str(base)).native == 64
    assert not (tmp_path / "left").exists()


@pytest.mark.parametrize("name", ["x.ckpt", "x.pt", "x.pth", "x.bin"])
def test_a_pickled_checkpoint_is_refused_and_what_to_do_told(tmp_path: Path, name: str) -> None:
    torch.save({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(4)}, tmp_path / name)
    assert "pickle" in refused(tmp_path / name)
    assert ".safetensors" in refused(tmp_path / name)


def test_a_single_file_that_lies_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    header = json.dumps(
        {"model.diffusion_model.input_blocks.0.0.weight": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 4]}}
    ).encode()
    for data in (struct.pack("<Q", len(header)) + header + b"\0" * 4, struct.pack("<Q", 2**62), b"PK\3\4", b"", b"x"):
        path.write_bytes(data)
        assert "x.safetensors" in refused(path)


def test_a_pipe_or_a_device_is_no_base(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.safetensors")
    refused(tmp_path / "x.safetensors")
    with pytest.raises(FormatError):
        open_base(tmp_path / "x.safetensors")
    with pytest.raises(ConfigError):
        families.load("/dev/zero")


INK = PIPELINE.parent / "adapters" / "ink.safetensors"
UNET = PIPELINE / "unet" / "diffusion_pytorch_model.safetensors"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """The embedded denoiser as a checkpoint of its own."""
    shutil.copy(UNET, tmp_path / "base.safetensors")
    return tmp_path / "base.safetensors"


def baked(base: Path, output: Path) -> None:
    opened = open_base(base)
    ink = Input("ink", load(INK), "ink", lambda name: 0.8)
    with_text = baking.Baking(strict=False)
    bake(Engine(MergeRecipe((Entry("ink"),)), [ink], None, opened), opened, output, with_text)


def test_a_base_that_changes_while_it_is_baked_makes_no_file(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a place that is only copied, at the very end, when nothing looks at it any more."""
    usual = baking._Work.__call__

    def work(self: Any, job: Any, workers: int) -> Any:
        with file.open("r+b") as other:
            other.seek(-4, os.SEEK_END)
            other.write(b"\0\0\0\0")
        os.utime(file, ns=(1, 1))
        return usual(self, job, workers) if not job.layers else ([], 0)

    monkeypatch.setattr(baking._Work, "__call__", work)
    with pytest.raises(StateError, match="changed while it was read"):
        baked(file, tmp_path / "out.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base.safetensors"]


def test_an_output_that_is_the_base_under_another_name_is_refused(file: Path, tmp_path: Path) -> None:
    before = file.read_bytes()
    (tmp_path / "link.safetensors").symlink_to(file)
    os.link(file, tmp_path / "hard.safetensors")
    for name in (
        "base.safetensors",
        "link.safetensors",
        "hard.safetensors",
        "../" + tmp_path.name + "/base.safetensors",
    ):
        with pytest.raises(ConfigError, match="is the base itself"):
            baked(file, tmp_path / name)
    assert file.read_bytes() == before


@pytest.mark.parametrize("share", [0.0, 0.00001, 0.5, 0.99999])
def test_a_checkpoint_that_is_cut_is_neither_baked_nor_compared(file: Path, tmp_path: Path, share: float) -> None:
    whole = file.read_bytes()
    file.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(FormatError, match=r"base\.safetensors"):
        baked(file, tmp_path / "out.safetensors")
    for pair in ((file, UNET), (UNET, file)):
        with pytest.raises(FormatError, match=r"base\.safetensors"):
            extract(*pair, Keep(rank=2))
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_named(file: Path, tmp_path: Path, value: float) -> None:
    tensors = load_file(file)
    layer = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    tensors[f"{layer}.weight"][0, 0] = value
    save_file(tensors, file)
    for work in (lambda: baked(file, tmp_path / "out.safetensors"), lambda: extract(file, UNET, Keep(rank=2))):
        with pytest.raises(StateError, match=f"{layer}.*NaN or infinity"):
            work()
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(
    "output", ["/tmp/nowhere/x.safetensors", "../x.safetensors", "a/../../x.safetensors", ".", "", "../\\u0000"]
)
def test_a_recipe_writes_nothing_outside_of_its_folder(tmp_path: Path, run: Callable[..., None], output: str) -> None:
    folder = tmp_path / "recipes"
    folder.mkdir()
    text = f'output = "{output}"\n[[inputs]]\npath = "{INK}"\nweight = 0.5\n'
    (folder / "x.toml").write_text(text)
    with pytest.raises(ConfigError, match=r"outside of its folder|is no path"):
        run("merge", [str(folder / "x.toml")])
    assert not list(tmp_path.rglob("*.safetensors"))
    if "0000" not in output:
        run("merge", [str(folder / "x.toml"), "--output", str(tmp_path / "out.safetensors")])
        assert load(tmp_path / "out.safetensors").parts


def test_a_recipe_writes_in_its_folder_and_not_through_a_link_out_of_it(
    tmp_path: Path, run: Callable[..., None]
) -> None:
    folder, other = tmp_path / "recipes", tmp_path / "other"
    folder.mkdir()
    other.mkdir()
    (folder / "link").symlink_to(other)
    for output, right in (("x.safetensors", True), ("new/x.safetensors", True), ("link/x.safetensors", False)):
        (folder / "x.toml").write_text(f'output = "{output}"\n[[inputs]]\npath = "{INK}"\n')
        if right:
            run("merge", [str(folder / "x.toml")])
            assert (folder / output).is_file()
        else:
            with pytest.raises(ConfigError, match="outside of its folder"):
                run("merge", [str(folder / "x.toml")])
    assert not list(other.iterdir())


@pytest.mark.parametrize("path", ["https://evil.example/x.safetensors", "~/x.safetensors", "/dev/zero", "/etc/passwd",
                                  "/proc/self/environ", "..", "\u0000"])  # fmt: skip
def test_an_input_of_a_recipe_is_an_adapter_or_an_error_in_a_line(
    tmp_path: Path, run: Callable[..., None], path: str
) -> None:
    """Recipes may read from anywhere; what is no adapter is not repeated."""
    (tmp_path / "x.toml").write_text(f"[[inputs]]\npath = {json.dumps(path)}\n")
    with pytest.raises(ImgadaptError) as caught:
        run("merge", [str(tmp_path / "x.toml"), "--output", str(tmp_path / "out.safetensors")])
    assert str(caught.value).isprintable()
    assert "root:" not in str(caught.value)
    assert "PATH=" not in str(caught.value)
    assert not (tmp_path / "out.safetensors").exists()


def test_verify_reads_no_file_that_is_no_adapter_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("the secret")
    recipe = f'rule = "weighted"\n[[inputs]]\npath = "{secret}"\nsha256 = "{"0" * 64}"\n'
    save_file(load_file(INK), tmp_path / "x.safetensors", {KEY: recipe})
    read: list[Path] = []
    usual = verify.digest_of
    monkeypatch.setattr(verify, "digest_of", lambda path: read.append(path) or usual(path))
    with pytest.raises(FormatError, match="neither there nor beside") as caught:
        verify.verify(tmp_path / "x.safetensors", tmp_path)
    assert "changed since" not in str(caught.value)
    assert secret not in read
