"""The format contract, over FORMATS: what is written is read back, and tools' files are read as they mean them."""

import gzip
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft.utils.other import get_pattern_key
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from imgadapt.arch import architectures, canonical
from imgadapt.errors import ConfigError, FormatError
from imgadapt.file import AdapterFile, load, read_tensors, save
from imgadapt.formats import FORMATS, Format, Part, read, write
from imgadapt.formats.diffusers import DIFFUSERS
from imgadapt.formats.kohya import KOHYA
from imgadapt.methods import LoRA
from imgadapt.sites import Site
from imgadapt.targets import layers

KEYS = Path(__file__).parent / "keys"
CONFIG = "lora_adapter_metadata"
QUERY = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_q"
TEXT = "text_encoder.text_model.encoder.layers.3.self_attn.q_proj"
EVERY = pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)

Sites = dict[str, Site]


@pytest.fixture(scope="module")
def sites() -> Sites:
    """Every layer of a model with SD1.5's layer names and tiny, non-square shapes, under its canonical name."""
    config = CLIPTextConfig(
        hidden_size=12,
        intermediate_size=24,
        num_attention_heads=3,
        num_hidden_layers=12,
        vocab_size=50,
        max_position_embeddings=8,
        projection_dim=12,
        bos_token_id=0,
        eos_token_id=1,
    )
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            block_out_channels=(8, 12, 16, 16),
            layers_per_block=2,
            cross_attention_dim=20,
            attention_head_dim=4,
            norm_num_groups=4,
            sample_size=8,
        )
        parts = {"unet": unet, "text_encoder": CLIPTextModel(config)}
    return {canonical(row.name): row.site for row in layers(parts) if row.site.kind in ("linear", "conv")}


def part(site: Site, method: LoRA, seed: int, dtype: torch.dtype = torch.float32) -> Part:
    generator = torch.Generator().manual_seed(seed)
    shapes = {key: tensor.shape for key, tensor in method.init(site, None).items()}
    return Part(method, {key: torch.randn(shape, generator=generator).to(dtype) for key, shape in shapes.items()})


def never(_: int) -> bool:
    return False


def adapter(sites: Sites, stabilised: Callable[[int], bool] = never, dtype: torch.dtype = torch.float32) -> AdapterFile:
    """All layers, with mixed ranks and alphas (None and rank among them)."""
    ranks, alphas = (4, 1, 3, 7), (2.0, 0.5, None, 6.0, 1.5, 2.0)
    methods = [LoRA(ranks[i % 4], alphas[i % 6], rank_stabilised=stabilised(i)) for i in range(len(sites))]
    rows = enumerate(zip(sites.items(), methods, strict=True))
    return AdapterFile({name: part(site, method, i, dtype) for i, ((name, site), method) in rows})


def deltas(file: AdapterFile, sites: Sites) -> dict[str, Tensor]:
    """What the adapter adds to each weight, fp32."""
    changes: dict[str, Tensor] = {}
    for name, own in file.parts.items():
        tensors = {key: tensor.float() for key, tensor in own.tensors.items()}
        changes[name] = own.method.scale * own.method.delta(tensors, sites[name], None)
    return changes


def key_list(name: str) -> dict[str, list[int]]:
    return json.loads(gzip.decompress((KEYS / f"{name}.json.gz").read_bytes()))


def kohya(alpha: Tensor | None, rank: int = 2) -> dict[str, Tensor]:
    stem = "lora_unet_conv_in"
    pair = {f"{stem}.lora_down.weight": torch.ones(rank, 4, 3, 3), f"{stem}.lora_up.weight": torch.ones(8, rank, 1, 1)}
    return pair if alpha is None else {**pair, f"{stem}.alpha": alpha}


def dotted(*layer_names: str, rank: int = 2, down: str = "lora_A", up: str = "lora_B") -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name in layer_names:
        tensors |= {f"{name}.{down}.weight": torch.ones(rank, 6), f"{name}.{up}.weight": torch.ones(5, rank)}
    return tensors


def method(tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> LoRA:
    """The method of the only layer that these tensors hold."""
    (only,) = read(tensors, metadata or {}, FORMATS, architectures()).parts.values()
    assert isinstance(only.method, LoRA)
    return only.method


def test_a_model_has_exactly_the_354_layers_of_the_architecture_sd1(sites: Sites) -> None:
    sd1 = next(a for a in architectures() if a.name == "sd1")
    assert len(sd1.layers) == 354
    assert set(sites) == set(sd1.layers)


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_deltas_of_mixed_ranks_and_alphas_survive_a_file_exactly(
    form: Format, dtype: torch.dtype, sites: Sites, tmp_path: Path
) -> None:
    file = adapter(sites, dtype=dtype)
    again = load(save(file, tmp_path / "x.safetensors", format=form.name))
    assert (again.format, again.architecture, again.unknown) == (form.name, "sd1", ())
    assert set(again.parts) == set(file.parts)
    assert all(tensor.dtype == dtype for own in again.parts.values() for tensor in own.tensors.values())
    after = deltas(again, sites)
    assert all(torch.equal(change, after[name]) for name, change in deltas(file, sites).items())


@EVERY
@pytest.mark.parametrize("stabilised", [lambda _: True, lambda i: i % 2 == 0], ids=["all", "every other layer"])
def test_deltas_of_rank_stabilised_layers_survive_a_file(
    form: Format, stabilised: Callable[[int], bool], sites: Sites, tmp_path: Path
) -> None:
    file = adapter(sites, stabilised)
    after = deltas(load(save(file, tmp_path / "x.safetensors", format=form.name)), sites)
    for name, change in deltas(file, sites).items():
        torch.testing.assert_close(after[name], change, rtol=3e-7, atol=0)  # alpha is stored as fp32 by kohya


def test_rank_stabilised_is_scaled_by_alpha_over_the_root_of_the_rank_in_both_formats(sites: Sites) -> None:
    """rank 4, alpha 2: 2 / 2, not 2 / 4; kohya has no word for it, so alpha becomes 4."""
    own = part(sites[QUERY], LoRA(4, 2.0, rank_stabilised=True), 0)
    tensors, _ = write(KOHYA, {QUERY: own}, {})
    assert tensors[f"{KOHYA.spell(QUERY, 'sd1')}.alpha"] == 4.0
    _, metadata = write(DIFFUSERS, {QUERY: own}, {})
    assert json.loads(metadata[CONFIG])["unet.use_rslora"] is True
    assert json.loads(metadata[CONFIG])["unet.lora_alpha"] == 2.0


@EVERY
def test_casting_on_save_changes_tensors_but_not_alpha(form: Format, sites: Sites, tmp_path: Path) -> None:
    own = part(sites[QUERY], LoRA(3, 1.001), 0)  # 1.001 is 1.0 in bf16
    again = load(save(AdapterFile({QUERY: own}), tmp_path / "x.safetensors", format=form.name, dtype=torch.bfloat16))
    assert again.parts[QUERY].tensors["down"].equal(own.tensors["down"].bfloat16())
    assert again.parts[QUERY].method.scale == pytest.approx(1.001 / 3, rel=1e-7)


@EVERY
def test_the_same_adapter_gives_the_same_bytes_in_any_order_and_again_after_loading(
    form: Format, sites: Sites, tmp_path: Path
) -> None:
    file = adapter(sites)
    first = save(file, tmp_path / "1.safetensors", format=form.name).read_bytes()
    backwards = AdapterFile(dict(reversed(list(file.parts.items()))))
    assert save(backwards, tmp_path / "2.safetensors", format=form.name).read_bytes() == first
    assert save(load(tmp_path / "1.safetensors"), tmp_path / "3.safetensors", format=form.name).read_bytes() == first


def test_kohya_spells_sd1_as_sd_scripts_does() -> None:
    sd1 = next(a for a in architectures() if a.name == "sd1")
    ours = {KOHYA.spell(name, "sd1") for name in sd1.layers}
    theirs = set(key_list("kohya_sd15_te"))
    assert len(theirs) == 350
    assert ours >= theirs
    assert ours - theirs == {  # sd-scripts leaves these alone, LyCORIS adapts them
        "lora_unet_conv_in",
        "lora_unet_conv_out",
        "lora_unet_time_embedding_linear_1",
        "lora_unet_time_embedding_linear_2",
    }


def test_sd1_has_the_282_unet_layers_that_diffusers_has() -> None:
    sd1 = next(a for a in architectures() if a.name == "sd1")
    theirs = {f"unet.{name}" for name in key_list("diffusers_sd15")}
    assert len(theirs) == 282
    assert {name for name in sd1.layers if name.startswith("unet.")} == theirs


@pytest.mark.parametrize(
    ("list_name", "prefix", "ends", "owner"),
    [
        ("kohya_sd15_te", "", ("lora_down.weight", "lora_up.weight", "alpha"), "kohya"),
        ("diffusers_sd15", "unet.", ("lora_A.weight", "lora_B.weight"), "diffusers"),
    ],
)
def test_a_real_key_list_is_recognised_by_one_format_only(
    list_name: str, prefix: str, ends: tuple[str, ...], owner: str
) -> None:
    names = key_list(list_name)
    shapes = {end: () if end == "alpha" else (1, 1) for end in ends}
    tensors = {f"{prefix}{name}.{end}": torch.ones(shape) for name in names for end, shape in shapes.items()}
    reading = read(tensors, {}, FORMATS, architectures())
    assert (reading.format, reading.architecture, len(reading.parts)) == (owner, "sd1", len(names))
    for other in (form for form in FORMATS if form.name != owner):
        with pytest.raises(FormatError, match=f"none of its {len(tensors)} keys is known"):
            read(tensors, {}, [other], architectures())


@EVERY
def test_foreign_metadata_is_kept_verbatim_in_the_same_and_in_the_other_format(
    form: Format, sites: Sites, tmp_path: Path
) -> None:
    foreign = {"ss_tag_frequency": '{"10_x": {"b": 1, "a": 2}}', "modelspec.title": "Übung \n☃", "empty": ""}
    file = AdapterFile({QUERY: part(sites[QUERY], LoRA(3, 2.0), 0)}, metadata=foreign)
    first = load(save(file, tmp_path / "1.safetensors", format=form.name))
    assert {key: first.metadata[key] for key in foreign} == foreign
    for other in FORMATS:
        second = load(save(first, tmp_path / "2.safetensors", format=other.name))
        assert {key: second.metadata[key] for key in foreign} == foreign
        assert set(second.metadata) == {*foreign, *other.own_metadata}


def test_a_files_own_metadata_is_kept_verbatim_by_its_format_while_it_is_true(tmp_path: Path) -> None:
    config = {"unet.r": 2, "unet.lora_alpha": 1, "unet.peft_version": "0.21.2", "unet.lora_dropout": 0.1}
    lycoris = {"ss_network_module": "lycoris.kohya", "ss_network_dim": "2", "ss_network_alpha": "1.0"}
    peft = {CONFIG: json.dumps(config), "format": "pt"}
    for tensors, metadata in ((kohya(torch.tensor(1)), lycoris), (dotted(QUERY), peft)):
        save_file(tensors, tmp_path / "1.safetensors", metadata=metadata)
        file = load(tmp_path / "1.safetensors")
        assert load(save(file, tmp_path / "2.safetensors", format=str(file.format))).metadata == metadata


@EVERY
@pytest.mark.parametrize("alpha", [5.0, 2.0], ids=["other alpha", "other rank, same alpha"])
def test_own_metadata_that_is_no_longer_true_is_replaced(
    form: Format, alpha: float, sites: Sites, tmp_path: Path
) -> None:
    site = sites[QUERY]
    old = load(save(AdapterFile({QUERY: part(site, LoRA(4, 2.0), 0)}), tmp_path / "1.safetensors", format=form.name))
    changed = replace(old, parts={QUERY: part(site, LoRA(2, alpha), 0)})
    new = load(save(changed, tmp_path / "2.safetensors", format=form.name))
    assert new.parts[QUERY].method.scale == alpha / 2
    fresh, _ = read_tensors(save(replace(changed, metadata={}), tmp_path / "3.safetensors", format=form.name))
    assert (tmp_path / "2.safetensors").read_bytes() == (tmp_path / "3.safetensors").read_bytes()
    assert len(fresh) == (3 if form.alpha else 2)


def test_unknown_keys_are_counted_and_named_or_listed_when_not_strict(tmp_path: Path) -> None:
    strange = {f"lora_unet_strange_{i}.lora_down.weight": torch.ones(1) for i in range(5)}
    save_file({**kohya(torch.tensor(1.0)), **strange}, tmp_path / "x.safetensors")
    with pytest.raises(FormatError, match=r"5 of 8 keys are unknown to the nearest table, kohya for sd1: .*and 2 more"):
        load(tmp_path / "x.safetensors")
    with pytest.raises(FormatError, match=r"lora_unet_strange_0\.lora_down\.weight"):
        load(tmp_path / "x.safetensors")
    lenient = load(tmp_path / "x.safetensors", strict=False)
    assert sorted(lenient.unknown) == sorted(strange)
    assert list(lenient.parts) == ["unet.conv_in"]


@pytest.mark.parametrize("end", ["dora_scale", "lora_mid.weight", "lora_up.bias"])
def test_a_tensor_that_no_method_knows_is_not_dropped(end: str) -> None:
    with pytest.raises(FormatError, match=rf"1 of 4 keys are unknown .*conv_in\.{end}"):
        method({**kohya(torch.tensor(1.0)), f"lora_unet_conv_in.{end}": torch.ones(8)})


@pytest.mark.parametrize("lost", ["lora_down.weight", "lora_up.weight"])
@pytest.mark.parametrize("strict", [True, False])
def test_half_a_pair_is_refused_naming_the_layer(lost: str, strict: bool) -> None:
    tensors = kohya(torch.tensor(1.0))
    del tensors[f"lora_unet_conv_in.{lost}"]
    with pytest.raises(FormatError, match=r"unet\.conv_in has (up|down), which is no whole adapter"):
        read(tensors, {}, FORMATS, architectures(), strict=strict)


def test_a_layer_that_is_there_twice_is_refused() -> None:
    """With and without CLIP's `text_model.`: neither may win silently."""
    twice = dotted(TEXT, TEXT.replace("text_model.", ""))
    with pytest.raises(FormatError, match="2 of 4 keys are unknown"):
        read(twice, {}, FORMATS, architectures())
    assert len(read(twice, {}, FORMATS, architectures(), strict=False).unknown) == 2


@pytest.mark.parametrize("alpha", [None, torch.tensor(0), torch.tensor(0.0), torch.tensor([2.0])])
def test_alpha_that_is_missing_or_zero_means_the_rank(alpha: Tensor | None) -> None:
    assert method(kohya(alpha, rank=2)).scale == 1.0


@pytest.mark.parametrize("dtype", [torch.int64, torch.float16, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_alpha_is_read_in_any_dtype(dtype: torch.dtype) -> None:
    assert method(kohya(torch.tensor(3).to(dtype), rank=4)).scale == 0.75


@pytest.mark.parametrize("alpha", [float("nan"), float("inf"), -1.0, [1.0, 2.0]], ids=str)
def test_alpha_that_is_not_one_finite_number_is_refused(alpha: float | list[float]) -> None:
    with pytest.raises(FormatError, match=r"unet\.conv_in: alpha is .*, wanted one finite number"):
        method(kohya(torch.tensor(alpha)))


@pytest.mark.parametrize(
    ("down", "up"), [(torch.ones(()), torch.ones(())), (torch.ones(0, 6), torch.ones(5, 0))], ids=["0-dim", "rank 0"]
)
def test_tensors_of_no_rank_are_refused(down: Tensor, up: Tensor) -> None:
    with pytest.raises(FormatError, match=r"attn2\.to_q \(.*down"):
        method({f"{QUERY}.lora_A.weight": down, f"{QUERY}.lora_B.weight": up})


def test_without_metadata_a_diffusers_file_has_alpha_equal_to_rank() -> None:
    assert method(dotted(QUERY, rank=2)).scale == 1.0


@pytest.mark.parametrize(
    ("fields", "scale"),
    [
        ({"lora_alpha": 3}, 1.5),
        ({"lora_alpha": 3, "use_rslora": True}, 3 / 2**0.5),
        ({"lora_alpha": 3, "alpha_pattern": {"to_q": 8}}, 4.0),
        ({"lora_alpha": 3, "alpha_pattern": {"to_k": 8}}, 1.5),
    ],
)
def test_a_diffusers_file_has_the_alpha_of_its_metadata(fields: dict[str, Any], scale: float) -> None:
    metadata = {CONFIG: json.dumps({f"unet.{key}": value for key, value in fields.items()})}
    assert method(dotted(QUERY, rank=2), metadata).scale == pytest.approx(scale, rel=1e-12)


@pytest.mark.parametrize(
    "patterns",
    [
        ["to_q"],
        ["q"],
        ["attn2.to_q", "to_q"],
        ["to_q", "attn2.to_q"],
        [r"^mid_block\..*to_q", "to_q"],
        ["^attn2.to_q"],
        [r"down_blocks\..*", r".*attn\d\.to_[qk]"],
        [QUERY.removeprefix("unet.")],
        ["to_k|to_q"],
    ],
    ids=str,
)
def test_alpha_patterns_are_read_as_peft_matches_them(patterns: list[str]) -> None:
    alphas = {pattern: 10.0 + i for i, pattern in enumerate(patterns)}
    metadata = {CONFIG: json.dumps({"unet.lora_alpha": 1.0, "unet.alpha_pattern": alphas})}
    wanted = alphas.get(get_pattern_key(list(alphas), QUERY.removeprefix("unet.")), 1.0)
    assert method(dotted(QUERY, rank=2), metadata).alpha == wanted


@pytest.mark.parametrize("live", ["", "text_model."], ids=["transformers from 5.6", "transformers before"])
def test_written_patterns_give_peft_our_ranks_and_alphas(live: str, sites: Sites) -> None:
    """peft looks the layers up under their live names, with CLIP's `text_model.` or without."""
    file = adapter(sites)
    fields: dict[str, Any] = json.loads(write(DIFFUSERS, file.parts, {})[1][CONFIG])
    for name, own in file.parts.items():
        component, _, path = name.partition(".")
        path = path.replace("text_model.", live)
        found: dict[str, Any] = {}
        for default, pattern in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
            rows: dict[str, float] = fields[f"{component}.{pattern}"]
            found[default] = rows.get(get_pattern_key(list(rows), path), fields[f"{component}.{default}"])
        assert found["r"] == own.tensors["down"].shape[0], name
        assert found["lora_alpha"] / found["r"] == own.method.scale, name


def test_a_name_that_ends_as_another_does_has_its_own_rank_and_alpha() -> None:
    """Flux has both: a pattern `proj_out` would match the two."""
    whole, ending = "transformer.single_transformer_blocks.0.proj_out", "transformer.proj_out"
    methods = {whole: LoRA(2, 1.0), "transformer.x_embedder": LoRA(2, 1.0), ending: LoRA(3, 6.0)}
    parts = {name: part(Site((5, 6)), method, 0) for name, method in methods.items()}
    tensors, metadata = write(DIFFUSERS, parts, {})
    again = read(tensors, metadata, FORMATS, architectures()).parts
    assert {name: again[name].method for name in methods} == methods
    fields: dict[str, Any] = json.loads(metadata[CONFIG])
    for name, wanted in ((whole, 1.0), (ending, 6.0)):
        alphas: dict[str, float] = fields["transformer.alpha_pattern"]
        found = alphas.get(get_pattern_key(list(alphas), name.partition(".")[2]), fields["transformer.lora_alpha"])
        assert found == wanted


@pytest.mark.parametrize(
    "config",
    [
        "no json",
        "[" * 100_000,
        "[1]",
        '{"unet.lora_alpha": "much"}',
        '{"unet.lora_alpha": [1]}',
        '{"unet.lora_alpha": NaN}',
        '{"unet.lora_alpha": 0}',
        f'{{"unet.lora_alpha": 1{"0" * 400}}}',
        '{"unet.lora_alpha": 1, "unet.alpha_pattern": ["to_q"]}',
        '{"unet.lora_alpha": 1, "unet.alpha_pattern": {"(": 2}}',
    ],
    ids=lambda config: config[:60],
)
def test_metadata_that_says_no_alpha_is_refused(config: str) -> None:
    with pytest.raises(FormatError):
        method(dotted(QUERY), {CONFIG: config})


@EVERY
def test_text_model_is_optional_on_reading_and_always_written(form: Format, sites: Sites) -> None:
    own = part(sites[TEXT], LoRA(3, 2.0), 0)
    tensors, metadata = write(form, {TEXT: own}, {})
    assert all("text_model" in key for key in tensors)
    bare = {key.replace(f"text_model{form.separator}", ""): tensor for key, tensor in tensors.items()}
    assert not any("text_model" in key for key in bare)
    reading = read(bare, metadata, FORMATS, architectures())
    assert (reading.format, reading.architecture, list(reading.parts)) == (form.name, "sd1", [TEXT])
    assert reading.parts[TEXT].method.scale == 2 / 3


@pytest.mark.parametrize(("name", "stem"), [(QUERY, "lora"), (TEXT, "lora_linear_layer")])
def test_the_older_spelling_of_diffusers_training_scripts_is_read(name: str, stem: str) -> None:
    """`convert_state_dict_to_diffusers` of diffusers 0.42.1 renames q, k, v and out, and leaves the rest."""
    other = "unet.conv_in"
    tensors = {**dotted(name, down=f"{stem}.down", up=f"{stem}.up"), **dotted(other)}
    reading = read(tensors, {}, FORMATS, architectures())
    assert (reading.format, set(reading.parts)) == ("diffusers", {name, other})
    assert set(write(DIFFUSERS, reading.parts, {})[0]) == set(dotted(name, other))


def test_dotted_names_are_read_for_models_that_have_no_table() -> None:
    name = "transformer.single_transformer_blocks.7.attn.to_q"
    reading = read(dotted(name), {}, FORMATS, architectures())
    assert (reading.format, reading.architecture, list(reading.parts)) == ("diffusers", None, [name])


@pytest.mark.parametrize(
    "keys",
    [
        ["unet:0:up", "unet:0:down", "text_encoder:0:up", "text_encoder:0:down", "<s1>"],
        ["base_model.model.conv_in.lora_A.weight", "base_model.model.conv_in.lora_B.weight"],
        ["conv_in.weight", "conv_in.bias"],
    ],
    ids=["cloneofsimo, named by index", "peft's own", "a checkpoint"],
)
def test_a_file_that_is_not_ours_to_read_is_refused_clearly(keys: list[str], tmp_path: Path) -> None:
    path = tmp_path / "foreign.safetensors"
    save_file({key: torch.ones(1, 4) for key in keys}, path)
    with pytest.raises(FormatError) as caught:
        load(path)
    message = str(caught.value)
    assert str(path) in message
    assert f"none of its {len(keys)} keys is known" in message
    assert sorted(keys)[0] in message
    assert "kohya, diffusers" in message


def test_what_a_format_has_no_word_for_is_refused(tmp_path: Path) -> None:
    parts = {"transformer.proj_out": Part(LoRA(2), {"down": torch.ones(2, 6), "up": torch.ones(5, 2)})}
    with pytest.raises(
        FormatError, match=r"kohya has no word for the component transformer \(of transformer\.proj_out\)"
    ):
        save(AdapterFile(parts), tmp_path / "x.safetensors", format="kohya")
    with pytest.raises(FormatError, match="nothing to write"):
        save(AdapterFile({}), tmp_path / "x.safetensors")
    with pytest.raises(ConfigError, match="no format 'khoya'; there are: kohya, diffusers"):
        save(AdapterFile(parts), tmp_path / "x.safetensors", format="khoya")
    with pytest.raises(ConfigError, match="cannot be written as"):
        save(AdapterFile(parts), tmp_path / "x.safetensors", dtype=torch.float8_e4m3fnuz)
    assert list(tmp_path.iterdir()) == []


def test_flattened_names_of_a_model_without_a_table_are_refused_not_guessed(tmp_path: Path) -> None:
    """Flattened names cannot be parsed back: without a table neither we nor any tool would find the layers again."""
    name = "unet.down_blocks.9.attentions.0.transformer_blocks.1.attn1.to_q"
    method = LoRA(2, 1.0)
    file = AdapterFile({name: Part(method, method.init(Site((6, 8)), None))})
    with pytest.raises(
        FormatError, match=r"names this model's layers is not known yet \(unet\.down_blocks\.9\.attentions"
    ):
        save(file, tmp_path / "x.safetensors", format="kohya")
    assert not list(tmp_path.iterdir())
    again = load(save(file, tmp_path / "x.safetensors"))
    assert (list(again.parts), again.architecture, again.parts[name].method) == ([name], None, method)


@pytest.mark.parametrize("pattern", ["(a+)+!", "([a-z_0-9.]+)+!", "(a|a)*!", "((a+))+!", "(.*)*x", r"(a)\1"])
def test_a_pattern_that_could_run_for_ever_is_refused(pattern: str) -> None:
    name = "unet.mid_block.attentions.0.proj_in"
    method = LoRA(2, 1.0)
    file = AdapterFile({name: Part(method, method.init(Site((6, 8, 1, 1)), None))})
    tensors, _ = write(DIFFUSERS, file.parts, {})
    config = json.dumps({"unet.lora_alpha": 2, "unet.alpha_pattern": {pattern: 1}})
    with pytest.raises(FormatError, match="can take for ever"):
        read(tensors, {CONFIG: config}, FORMATS, architectures())


def test_two_layers_with_one_flattened_name_are_refused() -> None:
    method = LoRA(2, 1.0)
    part = Part(method, method.init(Site((6, 8)), None))
    with pytest.raises(FormatError, match="are both lora_unet_a_b_c in kohya; one would be lost"):
        write(KOHYA, {"unet.a.b_c": part, "unet.a_b.c": part}, {})


def test_numbers_that_are_none_are_not_written(tmp_path: Path) -> None:
    name = "unet.mid_block.attentions.0.proj_in"
    method = LoRA(2, 1.0)
    tensors = method.init(Site((6, 8, 1, 1)), None)
    tensors["up"][0] = 1e6
    file = AdapterFile({name: Part(method, tensors)})
    with pytest.raises(FormatError, match=r"NaN or infinity in unet\.mid_block.* is not written"):
        save(file, tmp_path / "x.safetensors", dtype=torch.float16)  # 1e6 is past fp16
    with pytest.raises(ConfigError, match="cannot be written as"):
        save(file, tmp_path / "x.safetensors", dtype=torch.int8)
    with pytest.raises(FormatError, match="metadata maps text to text"):
        save(AdapterFile(file.parts, {"epoch": 3}), tmp_path / "x.safetensors")  # pyright: ignore[reportArgumentType]
    assert not list(tmp_path.iterdir())
