"""Architectures: their layers are those of the models and of the tools; each row of a native layer is one of ours."""

import gzip
import json
import runpy
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from imgadapt.arch import Architecture, Slice, architectures, canonical

HERE = Path(__file__).parent
CONVERTERS = HERE.parent / "converters"
BY_NAME = {architecture.name: architecture for architecture in architectures()}
EVERY = pytest.mark.parametrize("architecture", BY_NAME.values(), ids=lambda architecture: architecture.name)
OTHER_NAMES = {"sd15": "sd1", "sd21": "sd2", "cosmos_anima": "anima", "qwenimage": "qwen"}  # key lists' -> ours
TE3 = {"flux": "text_encoder_2"}  # sd-scripts' te3 is T5, wherever it stands in the pipeline


@pytest.fixture(scope="module")
def program() -> dict[str, Any]:
    """What converters/derive_architecture.py defines."""
    return runpy.run_path(str(CONVERTERS / "derive_architecture.py"), run_name="tested")


def read(name: str) -> dict[str, Any]:
    return json.loads(gzip.decompress((HERE / "keys" / f"{name}.json.gz").read_bytes()))


def listed(kind: str) -> list[str]:
    return sorted(file.name[len(kind) : -len(".json.gz")] for file in (HERE / "keys").glob(f"{kind}*.json.gz"))


def denoiser(architecture: Architecture) -> str:
    return "unet" if "unet.conv_in" in architecture.shapes else "transformer"


def layers_of(architecture: Architecture) -> dict[str, list[int]]:
    """The denoiser's, without the component."""
    start = f"{denoiser(architecture)}."
    return {n.removeprefix(start): [*shape] for n, shape in architecture.shapes.items() if n.startswith(start)}


def map_of(architecture: Architecture) -> dict[str, list[list[Any]]]:
    """The denoiser's layer -> [[native layer, first row, rows], ...], as the lists of other derivations have it."""
    found: dict[str, list[tuple[int, list[Any]]]] = defaultdict(list)
    for native, slices in architecture.native.items():
        for s in slices:
            path = s.layer.partition(".")[2]
            found[path].append((s.start, [native.partition(".")[2], s.first, s.rows]))
    if not architecture.native:
        return {path: [[path, 0, shape[0]]] for path, shape in layers_of(architecture).items()}
    return {path: [rows for _, rows in sorted(parts)] for path, parts in found.items()}


@pytest.mark.parametrize("name", listed("diffusers_"))
def test_the_layers_are_those_of_the_full_size_model(name: str) -> None:
    wanted, ours = read(f"diffusers_{name}"), layers_of(BY_NAME[OTHER_NAMES.get(name, name)])
    if name == "lumina2":  # that list is of the class's default width of captions; Gemma 2 2B's is 2304
        wanted["time_caption_embed.caption_embedder.1"] = [2304, 2304]
    assert {path: ours.get(path) for path in wanted} == wanted
    more = {path: shape for path, shape in ours.items() if path not in wanted}
    tables = [path for path, shape in more.items() if len(shape) > 1]
    assert tables == (["time_extra_emb.style_embedder"] if name == "hunyuandit" else [])  # the rest are norms


@pytest.mark.parametrize("name", listed("map_"))
def test_native_names_and_rows_are_those_that_another_derivation_found(name: str) -> None:
    wanted, ours = read(f"map_{name}"), map_of(BY_NAME[OTHER_NAMES.get(name, name)])
    if name == "hidream":  # a bare parameter: no layer
        wanted = {path: rows for path, rows in wanted.items() if not path.endswith(".gate")}
    assert {path: ours.get(path) for path in wanted} == wanted


@EVERY
def test_flattened_names_do_not_collide(architecture: Architecture) -> None:
    for names in (architecture.layers, architecture.native):
        assert len({name.replace(".", "_") for name in names}) == len(names)


@EVERY
def test_each_row_of_a_native_layer_is_one_row_of_ours(architecture: Architecture) -> None:
    ours: dict[str, list[Slice]] = defaultdict(list)
    for name, slices in architecture.native.items():
        row = 0
        for s in sorted(slices, key=lambda s: s.first):
            assert s.first == row, name
            row += s.rows
            ours[s.layer].append(s)
        assert row == architecture.native_rows[name]
        assert architecture.shape_of(name) == (row, *architecture.shapes[slices[0].layer][1:])
        assert len({architecture.shapes[s.layer][1:] for s in slices}) == 1, name
    for layer, slices in ours.items():
        row = 0
        for s in sorted(slices, key=lambda s: s.start):
            assert s.start == row, layer
            row += s.rows
        assert row == architecture.shapes[layer][0], layer


def test_klein_has_no_guidance_embedder_and_dev_has() -> None:
    embedder = "transformer.time_guidance_embed.guidance_embedder.linear_1"
    assert [embedder in BY_NAME[name].layers for name in ("flux2", "flux2_klein_4b", "flux2_klein_9b")] == [
        True,
        False,
        False,
    ]


@EVERY
def test_native_names_cover_the_denoiser_or_are_none(architecture: Architecture) -> None:
    covered = {s.layer for slices in architecture.native.values() for s in slices}
    start = f"{denoiser(architecture)}."
    assert covered in (set(), {name for name in architecture.layers if name.startswith(start)})


@EVERY
def test_native_names_are_the_listed_ones(architecture: Architecture, program: Any) -> None:
    """Layers beside those keep their names: what only Kolors has, and what of HunyuanImage no converter knows."""
    rows = json.loads((CONVERTERS / "native_names.json").read_text("utf-8")).get(architecture.name, [])
    start = f"{denoiser(architecture)}."
    wanted = {start + name: counts[0] for pattern, *counts in rows for name in program["_every"](pattern)}
    assert {name: architecture.native_rows.get(name) for name in wanted} == wanted
    others = {name.removeprefix(start) for name in architecture.native if name not in wanted}
    if architecture.name == "kolors":
        assert others == {"encoder_hid_proj"}
    elif architecture.name == "hunyuanimage":
        assert len(others) == 28
        assert not any("transformer_blocks." in name for name in others)
    else:
        assert not others


def test_flux_swaps_shift_and_scale_of_its_last_norm() -> None:
    slices = BY_NAME["flux"].native["transformer.final_layer.adaLN_modulation.1"]
    norm = "transformer.norm_out.linear"
    assert sorted(slices, key=lambda s: s.first) == [Slice(norm, 3072, 0, 3072), Slice(norm, 0, 3072, 3072)]


def test_flux_fuses_queries_keys_values_and_mlp() -> None:
    slices = BY_NAME["flux"].native["transformer.single_blocks.7.linear1"]
    assert sorted(slices, key=lambda s: s.first) == [
        Slice("transformer.single_transformer_blocks.7.attn.to_q", 0, 0, 3072),
        Slice("transformer.single_transformer_blocks.7.attn.to_k", 0, 3072, 3072),
        Slice("transformer.single_transformer_blocks.7.attn.to_v", 0, 6144, 3072),
        Slice("transformer.single_transformer_blocks.7.proj_mlp", 0, 9216, 12288),
    ]


@pytest.mark.parametrize(
    ("name", "native", "layer"),
    [
        (
            "sdxl",
            "input_blocks.4.1.transformer_blocks.1.norm3",
            "down_blocks.1.attentions.0.transformer_blocks.1.norm3",
        ),
        ("sdxl", "output_blocks.2.0.in_layers.0", "up_blocks.0.resnets.2.norm1"),
        ("sdxl", "out.0", "conv_norm_out"),
        ("flux", "double_blocks.3.txt_attn.norm.key_norm", "transformer_blocks.3.attn.norm_added_k"),
        ("wan", "blocks.39.norm3", "blocks.39.norm2"),
        ("wan", "blocks.0.cross_attn.norm_k", "blocks.0.attn2.norm_k"),
        ("sd35_medium", "joint_blocks.12.x_block.attn2.ln_q", "transformer_blocks.12.attn2.norm_q"),
        ("anima", "blocks.5.self_attn.q_norm", "transformer_blocks.5.attn1.norm_q"),
        ("lumina2", "layers.25.attention_norm1", "layers.25.norm1.norm"),
    ],
)
def test_norms_have_native_names(name: str, native: str, layer: str) -> None:
    architecture = BY_NAME[name]
    full = f"{denoiser(architecture)}.{layer}"
    rows = architecture.shapes[full][0]
    assert architecture.native[f"{denoiser(architecture)}.{native}"] == (Slice(full, 0, 0, rows),)


@pytest.mark.parametrize(
    ("keys", "name", "native", "count"),
    [
        ("kohya_sd15_te", "sd1", False, 278 + 72),
        ("kohya_sdxl_tes", "sdxl", True, 788 + 72 + 192),
        ("kohya_flux_tes", "flux", True, 312 + 72 + 168),
        ("kohya_sd3", "sd3", True, 237 + 72 + 192 + 168),
        ("kohya_lumina2", "lumina2", True, 180),
        ("kohya_hunyuanimage", "hunyuanimage", True, 320),
        ("kohya_anima", "anima", True, 280),
    ],
)
def test_every_layer_of_sd_scripts_is_known_with_its_shape(keys: str, name: str, native: bool, count: int) -> None:
    architecture, wanted = BY_NAME[name], read(keys)
    te2 = "text_encoder_2"
    prefixes = {
        denoiser(architecture): "lora_unet_",
        "text_encoder": "lora_te_" if name == "sd1" else "lora_te1_",
        te2: "lora_te3_" if TE3.get(name) == te2 else "lora_te2_",
        "text_encoder_3": "lora_te3_",
    }
    own = {n for n in architecture.layers if n.startswith(denoiser(architecture))} if native else set[str]()
    found: dict[str, list[int]] = {}
    for full in (*architecture.native, *(n for n in architecture.layers if n not in own)):
        component, _, path = full.partition(".")
        shape = architecture.shape_of(full)
        assert shape is not None
        found[prefixes[component] + path.replace(".", "_")] = [*shape]
    assert len(wanted) == count
    assert {key: found.get(key) for key in wanted} == {key: [*shape] for key, shape in wanted.items()}


@pytest.mark.parametrize("name", ["sdxl", "flux", "sd35_medium", "wan_1_3b"])
def test_the_committed_file_is_what_the_models_say(name: str, program: Any) -> None:
    assert program["written"](program["derive"](name)) == BY_NAME[name].file.read_text("utf-8")


def test_every_file_has_a_derivation(program: Any) -> None:
    assert sorted(program["ARCHITECTURES"]) == list(BY_NAME)


def test_clip_is_written_with_text_model() -> None:
    assert canonical("text_encoder.encoder.layers.0.mlp.fc1") == "text_encoder.text_model.encoder.layers.0.mlp.fc1"
    assert canonical("text_encoder_2.encoder.block.0.layer.1.DenseReluDense.wo").count("text_model") == 0
    for architecture in BY_NAME.values():
        clip = [n for n in architecture.layers if ".layers." in n and n.startswith("text_encoder")]
        assert all(n.partition(".")[2].startswith("text_model.encoder.") for n in clip)


def test_reading_all_architectures_takes_a_moment() -> None:
    """The bound is far above what it takes (some 40 ms), for machines that are busy."""
    code = (
        "import time; from imgadapt.arch import architectures; start = time.process_time();"
        "[(a.shapes, a.native, a.native_rows) for a in architectures()]; print(time.process_time() - start)"
    )
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(made.stdout) < 0.5
