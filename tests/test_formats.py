"""The format contract, over FORMATS: what is written is read back, and tools' files are read as they mean them."""

import gzip
import hashlib
import json
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from peft.utils.other import get_pattern_key
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from imgadapt import attach, detach
from imgadapt.arch import architectures, canonical
from imgadapt.errors import ConfigError, FormatError, ShapeError, TargetError
from imgadapt.file import AdapterFile, load, plan, save
from imgadapt.formats import (
    DIFFUSERS,
    FORMATS,
    KOHYA,
    Format,
    Part,
    Reading,
    Writer,
    architecture_of,
    read,
    spelling,
    write,
)
from imgadapt.formats.kohya import HASHES
from imgadapt.methods import IA3, OFT, DoRA, Full, LoHa, LoKr, LoRA, Method, Norm
from imgadapt.sites import Kind, Site
from imgadapt.targets import layers
from imgadapt.tensors import read_tensors, tensors_digest
from imgadapt.whole import settled

HERE = Path(__file__).parent
TRUTH = HERE / "ground_truth"
CONFIG = "lora_adapter_metadata"
QUERY = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_q"
TEXT = "text_encoder.text_model.encoder.layers.3.self_attn.q_proj"
NAMES = tuple(form.name for form in FORMATS)
EVERY = pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
LORA = [form for form in FORMATS if form.name not in ("kohya-oft", "xlabs")]
"""What can say LoRA of any layer."""
EVERY_LORA = pytest.mark.parametrize("form", LORA, ids=lambda form: form.name)

LOSSES = {  # tool/file -> what each of FORMATS loses of it: Exact, Aligned, Dense, X impossible
    "flux_tiny/kohya_lora": "E E X E E E E E E E E EX E E",
    "flux_tiny/kohya_lora_split_qkv": "E E X E E E E E E E E EX E E",
    "flux_tiny/lycoris_diagoft": "X E EA E E X X X X EA X X X E",
    "flux_tiny/lycoris_dora_out": "X E X E E X E E X E X X X E",
    "flux_tiny/lycoris_loha": "E E X E E E E E E E E EX E E",
    "flux_tiny/lycoris_lokr": "E E X ED ED EX EX EX E E E EX E E",
    "flux_tiny/lycoris_lokr_full_f4": "X E X ED ED X X EX E E E X E E",
    "lycoris/boft": "X E X E E X X X X E X X X E",
    "lycoris/boft_constraint": "X E X E E X X X X E X X X E",
    "lycoris/diagoft": "X E E E E X X X X E X X X E",
    "lycoris/diagoft_constraint": "X E E E E X X X X E X X X E",
    "lycoris/diagoft_rescaled": "X E X E E X X X X E X X X E",
    "lycoris/full": "X E X E E X X X E E E X E E",
    "lycoris/glora": "X E X E E X X X X E X X X E",
    "lycoris/ia3": "X E X E E X X X X E X X X E",
    "lycoris/loha": "EX E X E E EX EX E ED E EX X EX E",
    "lycoris/loha_dora_in": "X E X E E X X X X E X X X E",
    "lycoris/loha_rs": "EX E X E E EX EX E ED E EX X EX E",
    "lycoris/loha_scalar": "EX E X E E EX EX E ED E EX X EX E",
    "lycoris/lokr": "E E X E E E E E E E E X E E",
    "lycoris/lokr_both": "E E X E E E E X E E E X E E",  # peft: one rule of factors for all layers
    "lycoris/lokr_dora_out": "X E X E E X X X X E X X X E",
    "lycoris/lokr_full": "X E X E E X X E E E E X E E",
    "lycoris/lokr_rs": "EX E X E E EX EX E E E E X E E",
    "lycoris/lora": "E E X E E E E E E E E X E E",
    "lycoris/lora_dora_in": "X E X E E X X X X E X X X E",
    "lycoris/lora_dora_out": "X E X E E X E E X E X X X E",
    "lycoris/lora_scalar": "E E X E E E E E E E E X E E",
    "lycoris/lora_tucker": "E E X E E E E E E E E X E E",
    "onetrainer/aitoolkit_lokr_full": "X E X E E X X E E E E X E E",
    "onetrainer/dora_in": "X E X E E X X X X E X X X E",
    "onetrainer/lokr": "EX E X E E EX EX E E E E X E E",
    "onetrainer/lokr_both_tucker": "E E X E E E E E E E E X E E",
    "onetrainer/lora": "E E X E E E E E E E E X E E",
    "onetrainer/oft": "X X X X E X X E X X X X X E",
    "onetrainer/oft_scaled": "X X X X E X X E X X X X X E",
    "peft/boft": "X X X X X X X E X X X X X E",
    "peft/diffusers_save_lora_weights": "E E X E E E E E E E E X E E",
    "peft/ia3": "X EX X EX EX X X E X EX X X X E",
    "peft/loha": "EX E X E E EX EX E ED E EX X EX E",
    "peft/lokr": "EX E X E E EX EX E E E E X E E",
    "peft/lora": "E E X E E E E E E E E X E E",
    "peft/lora_dora": "X E X E E X E E X E X X X E",
    "peft/lora_rslora": "E E X E E E E E E E E X E E",
    "peft/oft": "X X X X X X X E X X X X X E",
    "peft/oft_coft": "X X X X X X X E X X X X X E",
    "sdscripts/dylora": "E E X E E E E E E E E X E E",
    "sdscripts/lora_te": "E E X EX E E E X E E EX X EX E",
    "sdscripts/oft": "X E E E E X X X X E X X X E",
    "sdscripts/oft_alpha0": "X E E E E X X X X E X X X E",
}
FILES = pytest.mark.parametrize("file", LOSSES)

Sites = dict[str, Site]


@pytest.fixture(scope="module")
def sites() -> Sites:
    """Every layer of a model with SD1.5's layer names and tiny, non-square shapes, under its canonical name."""
    config: Any = CLIPTextConfig(
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


def sayable(form: Format, sites: Sites) -> Sites:
    """The layers of components that the format has words for; a format of one component has the UNet's."""
    both = not form.single and form.prefix("text_encoder", "sd1") is not None
    return {name: site for name, site in sites.items() if both or name.startswith("unet.")}


def deltas(file: AdapterFile, sites: Sites) -> dict[str, Tensor]:
    """What the adapter adds to each weight, fp32."""
    changes: dict[str, Tensor] = {}
    for name, own in file.parts.items():
        tensors = {key: tensor.float() for key, tensor in own.tensors.items()}
        changes[name] = own.method.scale * own.method.delta(tensors, sites[name], None)
    return changes


def known(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None, *, strict: bool = True) -> Reading:
    return read(tensors, metadata or {}, architectures(), strict=strict)


def written(form: Format, parts: Mapping[str, Part]) -> tuple[dict[str, Tensor], dict[str, str]]:
    return write(Writer(form, architecture_of(parts, architectures()), architectures()), parts, {})


def kohya(alpha: Tensor | None, rank: int = 2) -> dict[str, Tensor]:
    stem = "lora_unet_conv_in"
    pair = {f"{stem}.lora_down.weight": torch.ones(rank, 4, 3, 3), f"{stem}.lora_up.weight": torch.ones(8, rank, 1, 1)}
    return pair if alpha is None else {**pair, f"{stem}.alpha": alpha}


def dotted(*layer_names: str, rank: int = 2, down: str = "lora_A", up: str = "lora_B") -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name in layer_names:
        tensors |= {f"{name}.{down}.weight": torch.ones(rank, 6), f"{name}.{up}.weight": torch.ones(5, rank)}
    return tensors


def only(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Part:
    """The only layer that these tensors hold."""
    (part,) = known(tensors, metadata).parts.values()
    return part


def method(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> LoRA:
    found = only(tensors, metadata).method
    assert isinstance(found, LoRA)
    return found


# Tools' files in every format


def path_of(file: str) -> Path:
    return TRUTH / f"{file}.safetensors"


def base_of(file: str) -> dict[str, Tensor]:
    """Weights and biases of the model that a file is for, under canonical names."""
    flux = file.startswith("flux_tiny")
    base = TRUTH / ("flux_tiny/base_diffusers" if flux else "base_unet_sd15_tiny")
    tensors, _ = read_tensors(base.with_suffix(".safetensors"))
    found = {f"{'transformer' if flux else 'unet'}.{name}": tensor for name, tensor in tensors.items()}
    text = {"q_proj": (12, 12), "k_proj": (12, 12), "v_proj": (12, 12), "out_proj": (12, 12)}
    text = {f"self_attn.{end}": shape for end, shape in text.items()} | {"mlp.fc1": (24, 12), "mlp.fc2": (12, 24)}
    names = {f"text_encoder.text_model.encoder.layers.{k}.{end}": shape for k in (0, 1) for end, shape in text.items()}
    return found | {f"{name}.weight": torch.zeros(shape) for name, shape in names.items()}


def site_of(name: str, base: Mapping[str, Tensor]) -> Site:
    shape = tuple(base[f"{name}.weight"].shape)
    kind: Kind = "norm" if len(shape) == 1 else "conv" if len(shape) > 2 else "linear"
    return Site(shape, kind, bias="bias" if f"{name}.bias" in base else None)


def changes(parts: Mapping[str, Part], base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What an adapter does to each weight and bias of a model."""
    live = {name.removesuffix(".weight") for name in base if name.endswith(".weight")}
    whole = settled(
        parts, live, lambda name: (base[f"{name}.weight"], site_of(name, base)), lambda name: base.get(f"{name}.bias")
    )
    found: dict[str, Tensor] = {}
    for name, part in whole.items():
        site, tensors = site_of(name, base), {key: tensor.float() for key, tensor in part.tensors.items()}
        assert part.method.fits(tensors, site) is None, name
        delta = part.method.delta(tensors, site, base[f"{name}.weight"])
        found[f"{name}.weight"] = part.method.scale * delta
        bias = part.method.bias_delta(tensors)
        if bias is not None:
            found[f"{name}.bias"] = part.method.scale * bias
    return found


def differing(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> list[str]:
    """Tensors that are not the same to 1e-5 of their norm."""
    names = {*ours, *theirs}
    zero = torch.zeros(())

    def far(name: str) -> bool:
        a, b = ours.get(name, zero), theirs.get(name, zero)
        return float((a - b).norm()) > 1e-5 * float(b.norm()) + 1e-7

    return sorted(name for name in names if far(name))


@FILES
def test_every_tools_file_survives_every_format_or_is_refused_with_a_reason(file: str, tmp_path: Path) -> None:
    foreign = {"modelspec.title": "Übung \n☃", "empty": ""}
    adapter = load(path_of(file))
    adapter = replace(adapter, metadata={**adapter.metadata, **foreign})
    base = base_of(file)
    wanted = changes(adapter.parts, base)
    target = tmp_path / "x.safetensors"
    for name, said in zip(NAMES, LOSSES[file].split(), strict=True):
        steps = plan(adapter, name)
        losses = {step.loss for step in steps}
        letters = {"exact": "E", "aligned": "A", "dense": "D", "impossible": "X"}
        assert "".join(letter for loss, letter in letters.items() if loss in losses) == said, name
        assert {layer for step in steps for layer in step.layers} == set(adapter.parts), name
        if "impossible" in losses or "dense" in losses:
            lost = [step for step in steps if step.loss in ("impossible", "dense")]
            with pytest.raises(FormatError, match=f"{len(lost)} of {len(steps)} layers cannot be") as caught:
                save(adapter, target, format=name)
            assert any(f"{step.reason} (" in str(caught.value) for step in lost)
            assert any(step.name in str(caught.value) for step in lost)
            assert all(len(step.reason) > 10 and step.tensors is None for step in lost)
        if "impossible" in losses:
            with pytest.raises(FormatError, match=f"layers cannot be written as {name}"):
                save(adapter, target, format=name, dense=True)
            assert not target.exists()
            continue
        again = load(save(adapter, target, format=name, dense="dense" in losses))
        target.unlink()
        assert again.architecture == adapter.architecture, name
        assert differing(changes(again.parts, base), wanted) == [], name
        assert {key: again.metadata[key] for key in foreign} == foreign


@FILES
def test_a_tools_file_is_written_back_as_it_was(file: str, tmp_path: Path) -> None:
    old, metadata = read_tensors(path_of(file))
    adapter = load(path_of(file))
    again, written_metadata = read_tensors(save(adapter, tmp_path / "x.safetensors", format=adapter.format))
    assert again.keys() == old.keys()
    assert tensors_digest(again) == tensors_digest(old)  # names, dtypes, shapes, values
    assert {key: value for key, value in written_metadata.items() if key not in HASHES} == {
        key: value for key, value in metadata.items() if key not in HASHES
    }


def hashed(path: Path) -> str:
    """What sd-scripts calls a model's hash: SHA-256 of a file without its header."""
    data = path.read_bytes()
    return hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()


KOHYAS = [file for file in LOSSES if file.startswith(("lycoris/", "sdscripts/", "flux_tiny/"))]


def test_an_untouched_file_keeps_its_hash(tmp_path: Path) -> None:
    """Model managers know files by it. LyCORIS hashes tensors in the order of its modules, alpha, up, down: nothing
    that a file says, so it cannot be worked out anew, as sd-scripts' can.
    """
    theirs = {file: load(path_of(file)).metadata.get(HASHES[0]) for file in KOHYAS}
    assert sum(hash is not None and hash.startswith("0x") for hash in theirs.values()) == 22
    lost: list[str] = []
    for file, old in theirs.items():
        path = save(load(path_of(file)), tmp_path / "x.safetensors")
        lost += [] if load(path).metadata[HASHES[0]] == (old or hashed(path)) else [file]
    assert not lost


@pytest.mark.parametrize("file", KOHYAS)
def test_a_changed_file_has_the_hash_of_its_tensors(file: str, tmp_path: Path) -> None:
    adapter = load(path_of(file))
    start = "0x" if file.startswith("lycoris/") else ""
    less = AdapterFile(dict(list(adapter.parts.items())[1:]), adapter.metadata, adapter.format, adapter.architecture)
    for changed in (
        save(adapter, tmp_path / "x.safetensors", dtype=torch.float16),
        save(less, tmp_path / "y.safetensors", format=adapter.format),
    ):
        assert load(changed).metadata[HASHES[0]] == start + hashed(changed)
        assert re.fullmatch("[0-9a-f]{8}", load(changed).metadata[HASHES[1]])
    assert not set(HASHES) & set(load(save(adapter, tmp_path / "z.safetensors", format="imgadapt")).metadata)


# Damage


@pytest.fixture(scope="module")
def models() -> dict[str, dict[str, nn.Module]]:
    """SD1.5's names and the ground truth's sizes, and Flux's; they have shapes and no weights."""
    config: Any = CLIPTextConfig(
        hidden_size=12,
        intermediate_size=24,
        num_attention_heads=3,
        num_hidden_layers=2,
        vocab_size=50,
        max_position_embeddings=8,
        projection_dim=12,
        bos_token_id=0,
        eos_token_id=1,
    )
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16, 16, 16),
        layers_per_block=2,
        cross_attention_dim=12,
        attention_head_dim=4,
        norm_num_groups=4,
        sample_size=8,
    )
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=8,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=12,
        num_attention_heads=2,
        joint_attention_dim=10,
        pooled_projection_dim=6,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 4),
    )
    return {"sd1": {"unet": unet, "text_encoder": CLIPTextModel(config)}, "flux": {"transformer": transformer}}


DAMAGED = (
    *("sdscripts/lora_te", "sdscripts/oft", "lycoris/lora_tucker", "lycoris/loha", "lycoris/lokr_both"),
    *("lycoris/lora_dora_out", "lycoris/diagoft_rescaled", "lycoris/boft", "lycoris/ia3", "lycoris/glora"),
    *("lycoris/full", "peft/lora_dora", "peft/boft", "peft/oft", "onetrainer/oft_scaled", "flux_tiny/kohya_lora"),
    *("flux_tiny/lycoris_dora_out", "peft/diffusers_save_lora_weights", "flux_tiny/lycoris_lokr"),
)
MAY_GO = ("alpha", "rescale", "dora_scale", "lora_magnitude_vector", "diff_b", "on_input", "boft_s", "scaled_oft")
"""Ends of tensors without which a layer's adapter is another whole one."""
ALONE = ("diff", "oft_R.weight", "ia3_l")
"""Ends of tensors that are all that a layer has, beside those."""


def bent(tensor: Tensor, numbers: random.Random) -> Tensor:
    """The tensor in another shape: a row or column less, or two numbers for one."""
    if tensor.numel() == 1:
        return torch.stack([tensor.reshape(()), tensor.reshape(())])
    axis = numbers.choice([axis for axis, size in enumerate(tensor.shape) if size > 1])
    return tensor.narrow(axis, 0, tensor.shape[axis] - 1).contiguous()


@pytest.mark.parametrize("file", DAMAGED)
def test_no_tensor_is_lost_renamed_or_bent_unnoticed(
    file: str, models: dict[str, dict[str, nn.Module]], tmp_path: Path
) -> None:
    tensors, metadata = read_tensors(path_of(file))
    whole = load(path_of(file))
    model, base = models[str(whole.architecture)], base_of(file)
    wanted = changes(whole.parts, base)
    layer_of = {
        key: {name for name, part in whole.parts.items() if part.source and key in part.source.tensors}
        for key in tensors
    }
    numbers = random.Random(file)  # the same in every run: it is hashed by its bytes
    for k in range(12):
        key = numbers.choice(sorted(tensors))
        how = ("delete", "rename", "bend")[k % 3]
        damaged = {other: tensor for other, tensor in tensors.items() if other != key}
        if how == "rename":
            at = numbers.randrange(len(key) - 1)
            new = key[:at] + "x" + key[at + 1 :] if key[at] != "x" else key[:at] + key[at + 1 :]
            damaged[new] = tensors[key]
        elif how == "bend":
            damaged[key] = bent(tensors[key], numbers)
        path = tmp_path / "damaged.safetensors"
        save_file(damaged, path, metadata=metadata)
        case = f"{how} {key}"
        native = {name for names in architecture_names(str(whole.architecture), layer_of[key]) for name in names}
        spoken = {key, *layer_of[key], *native, *(damaged.keys() - tensors.keys())}
        try:
            read_again = load(path)
        except FormatError as error:
            assert any(word in str(error) for word in spoken), f"{case}: {error}"  # noqa: PT017
            lenient_leaves_out_only_what_is_damaged(path, damaged, whole, layer_of[key], case)
            continue
        assert how != "rename", case
        try:
            attach(model, read_again)
            detach(model)
        except (ShapeError, TargetError) as error:
            assert any(canonical(name) in canonical_text(str(error)) for name in spoken), f"{case}: {error}"  # noqa: PT017
            continue
        if how == "bend":  # one block is one for all; fewer stages of a butterfly are a butterfly
            one_block = key.endswith("oft_R.weight") and len(tensors[key]) == 2
            assert one_block or (key.endswith(("oft_blocks", "boft_R")) and tensors[key].ndim == 4), case
        else:
            assert key.endswith(MAY_GO) or (key.endswith(ALONE) and len(read_again.parts) < len(whole.parts)), case
        methods = [whole.parts[name].method for name in layer_of[key]]
        unread = key.endswith("alpha") and all(m.file_rank is None or m.scale == 1 for m in methods)
        false = key.endswith("on_input") and not tensors[key].any()
        assert unread or false or differing(changes(read_again.parts, base), wanted), case


def canonical_text(text: str) -> str:
    """Live names of CLIP's layers in a message, as files have them."""
    return text.replace("text_encoder.encoder.layers", "text_encoder.text_model.encoder.layers")


def architecture_names(architecture: str, layer_names: set[str]) -> Iterator[set[str]]:
    """Native names of the fused layers that these are of."""
    native = next(a for a in architectures() if a.name == architecture).native
    yield {name for name, slices in native.items() if layer_names & {s.layer for s in slices}}


def lenient_leaves_out_only_what_is_damaged(
    path: Path, damaged: Mapping[str, Tensor], whole: AdapterFile, gone: set[str], case: str
) -> None:
    rest = load(path, strict=False)
    assert set(rest.unknown) <= set(damaged), case
    assert rest.unknown, case
    assert set(whole.parts) - gone <= set(rest.parts), case
    kept = {key for part in rest.parts.values() if part.source for key in part.source.tensors}
    assert kept | set(rest.unknown) == set(damaged), case
    assert all(isinstance(reason, str) for reason in rest.unknown.values())


@pytest.mark.parametrize(
    ("file", "other", "said"),
    [
        ("lycoris/lora", "flux", "the file is for sd1"),
        ("flux_tiny/kohya_lora", "sd1", "the file is for flux"),
        ("flux_tiny/lycoris_diagoft", "sd1", "the file is for flux"),
        ("flux_tiny/lycoris_lokr", "sd1", "the file is for flux"),  # fused layers that only the weights can split
    ],
)
def test_a_file_for_another_model_says_which_it_is_for(
    file: str, other: str, said: str, models: dict[str, dict[str, nn.Module]]
) -> None:
    with pytest.raises(TargetError, match=said):
        attach(models[other], load(path_of(file)))


# LoRA in every format


def as_it_is(form: Format) -> bool:
    """Whether the format has alpha, so that tensors are written as they are."""
    return form.spell not in (spelling.toolkit, spelling.legacy)


@EVERY_LORA
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_deltas_of_mixed_ranks_and_alphas_survive_a_file(
    form: Format, dtype: torch.dtype, sites: Sites, tmp_path: Path
) -> None:
    file = adapter(sayable(form, sites), dtype=dtype)
    again = load(save(file, tmp_path / "x.safetensors", format=form.name))
    assert (again.architecture, again.unknown) == ("sd1", {})
    assert set(again.parts) == set(file.parts)
    # a scale that a format has no word for is multiplied into `up`, which is then as wide as that takes
    narrow = [tensor.dtype == dtype for own in again.parts.values() for tensor in own.tensors.values()]
    assert all(narrow) if as_it_is(form) else sum(narrow) >= len(narrow) / 2
    after = deltas(again, sites)
    rounding = 0.0 if as_it_is(form) else 1e-6
    for name, change in deltas(file, sites).items():
        assert float((change - after[name]).norm()) <= rounding * float(change.norm()), name


@EVERY_LORA
@pytest.mark.parametrize("stabilised", [lambda _: True, lambda i: i % 2 == 0], ids=["all", "every other layer"])
def test_deltas_of_rank_stabilised_layers_survive_a_file(
    form: Format, stabilised: Callable[[int], bool], sites: Sites, tmp_path: Path
) -> None:
    file = adapter(sayable(form, sites), stabilised)
    after = deltas(load(save(file, tmp_path / "x.safetensors", format=form.name)), sites)
    for name, change in deltas(file, sites).items():
        torch.testing.assert_close(after[name], change, rtol=1e-6, atol=1e-5)


def test_rank_stabilised_is_scaled_by_alpha_over_the_root_of_the_rank_in_both_formats(sites: Sites) -> None:
    """rank 4, alpha 2: 2 / 2, not 2 / 4; kohya has no word for it, so alpha becomes 4."""
    own = {QUERY: part(sites[QUERY], LoRA(4, 2.0, rank_stabilised=True), 0)}
    tensors, _ = written(KOHYA, own)
    assert tensors[f"{KOHYA.spell_name(QUERY, 'sd1')}.alpha"] == 4.0
    _, metadata = written(DIFFUSERS, own)
    assert json.loads(metadata[CONFIG])["unet.use_rslora"] is True
    assert json.loads(metadata[CONFIG])["unet.lora_alpha"] == 2.0


@pytest.mark.parametrize("form", [form for form in LORA if as_it_is(form)], ids=lambda form: form.name)
def test_casting_on_save_changes_tensors_but_not_alpha(form: Format, sites: Sites, tmp_path: Path) -> None:
    own = part(sites[QUERY], LoRA(3, 1.001), 0)  # 1.001 is 1.0 in bf16
    again = load(save(AdapterFile({QUERY: own}), tmp_path / "x.safetensors", format=form.name, dtype=torch.bfloat16))
    assert again.parts[QUERY].tensors["down"].equal(own.tensors["down"].bfloat16())
    assert again.parts[QUERY].method.scale == pytest.approx(1.001 / 3, rel=1e-7)


@EVERY_LORA
def test_the_same_adapter_gives_the_same_bytes_in_any_order_and_again_after_loading(
    form: Format, sites: Sites, tmp_path: Path
) -> None:
    file = adapter(sayable(form, sites))
    first = save(file, tmp_path / "1.safetensors", format=form.name).read_bytes()
    backwards = AdapterFile(dict(reversed(list(file.parts.items()))))
    assert save(backwards, tmp_path / "2.safetensors", format=form.name).read_bytes() == first
    assert save(load(tmp_path / "1.safetensors"), tmp_path / "3.safetensors", format=form.name).read_bytes() == first


@pytest.mark.parametrize("name", ["kohya_sd15_te", "diffusers_sd15"])
def test_a_real_key_list_is_recognised(name: str) -> None:
    rows: dict[str, list[int]] = json.loads(gzip.decompress((HERE / "keys" / f"{name}.json.gz").read_bytes()))
    flat = name.startswith("kohya")
    tensors: dict[str, Tensor] = {}
    for layer, (rows_out, inputs, *kernel) in rows.items():
        stem = layer if flat else f"unet.{layer}"
        tensors[f"{stem}.{'lora_down' if flat else 'lora_A'}.weight"] = torch.ones(1, inputs, *kernel)
        tensors[f"{stem}.{'lora_up' if flat else 'lora_B'}.weight"] = torch.ones(rows_out, 1, *(1 for _ in kernel))
    reading = known(tensors)
    assert (reading.format, reading.architecture) == ("kohya" if flat else "diffusers", "sd1")
    assert len(reading.parts) == len(rows)


@EVERY_LORA
def test_foreign_metadata_is_kept_verbatim_in_the_same_and_in_other_formats(
    form: Format, sites: Sites, tmp_path: Path
) -> None:
    foreign = {"ss_tag_frequency": '{"10_x": {"b": 1, "a": 2}}', "modelspec.title": "Übung \n☃", "empty": ""}
    file = AdapterFile({QUERY: part(sites[QUERY], LoRA(3, 2.0), 0)}, metadata=foreign)
    first = load(save(file, tmp_path / "1.safetensors", format=form.name))
    assert {key: first.metadata[key] for key in foreign} == foreign
    for other in LORA:
        second = load(save(first, tmp_path / "2.safetensors", format=other.name))
        assert {key: second.metadata[key] for key in foreign} == foreign
        assert set(second.metadata) <= {*foreign, *other.own_metadata}
        if other.name != first.format:
            assert set(second.metadata) == {*foreign, *other.own_metadata}


def test_a_files_own_metadata_is_kept_verbatim_by_its_format_while_it_is_true(tmp_path: Path) -> None:
    config = {"unet.r": 2, "unet.lora_alpha": 1, "unet.peft_version": "0.21.2", "unet.lora_dropout": 0.1}
    networks = {"ss_network_module": "networks.lora", "ss_network_dim": "2", "ss_network_alpha": "1.0"}
    peft = {CONFIG: json.dumps(config), "format": "pt"}
    for tensors, metadata in ((kohya(torch.tensor(1)), networks), (dotted(QUERY), peft)):
        save_file(tensors, tmp_path / "1.safetensors", metadata=metadata)
        file = load(tmp_path / "1.safetensors")
        for untouched in (file, replace(file, parts={k: replace(p, source=None) for k, p in file.parts.items()})):
            again = load(save(untouched, tmp_path / "2.safetensors", format=str(file.format))).metadata
            assert {key: value for key, value in again.items() if key not in HASHES} == metadata


@EVERY_LORA
@pytest.mark.parametrize("alpha", [5.0, 2.0], ids=["other alpha", "other rank, same alpha"])
def test_own_metadata_that_is_no_longer_true_is_replaced(
    form: Format, alpha: float, sites: Sites, tmp_path: Path
) -> None:
    site = sites[QUERY]
    old = load(save(AdapterFile({QUERY: part(site, LoRA(4, 2.0), 0)}), tmp_path / "1.safetensors", format=form.name))
    changed = replace(old, parts={QUERY: part(site, LoRA(2, alpha), 0)})
    new = load(save(changed, tmp_path / "2.safetensors", format=form.name))
    assert new.parts[QUERY].method.scale == (alpha / 2 if as_it_is(form) else 1.0)
    save(replace(changed, metadata={}), tmp_path / "3.safetensors", format=form.name)
    assert (tmp_path / "2.safetensors").read_bytes() == (tmp_path / "3.safetensors").read_bytes()


# What is refused


def test_unknown_keys_are_counted_and_named_or_listed_when_not_strict(tmp_path: Path) -> None:
    strange = {f"lora_unet_strange_{i}.lora_down.weight": torch.ones(1) for i in range(5)}
    save_file({**kohya(torch.tensor(1.0)), **strange}, tmp_path / "x.safetensors")
    with pytest.raises(FormatError, match=r"5 of 8 keys are unknown to the nearest table, kohya for sd1: .*and 2 more"):
        load(tmp_path / "x.safetensors")
    with pytest.raises(FormatError, match=r"lora_unet_strange_0\.lora_down\.weight"):
        load(tmp_path / "x.safetensors")
    lenient = load(tmp_path / "x.safetensors", strict=False)
    assert dict(lenient.unknown) == dict.fromkeys(strange, "")
    assert list(lenient.parts) == ["unet.conv_in"]


def test_what_makes_no_adapter_is_left_out_with_its_reason() -> None:
    broken = {f"{QUERY}.lora_A.weight": torch.ones(2, 6), f"{QUERY}.lora_B.weight": torch.ones(5, 3)}
    reading = known(
        {**broken, **dotted("unet.conv_in", "unet.conv_out"), "unet.what.ever": torch.ones(1)}, strict=False
    )
    assert set(reading.parts) == {"unet.conv_in", "unet.conv_out"}
    assert set(reading.unknown) == {*broken, "unet.what.ever"}
    for key in broken:
        assert reading.unknown[key].startswith(f"{QUERY} (")
        assert "(2, 6)" in reading.unknown[key]
    assert reading.unknown["unet.what.ever"] == ""


@pytest.mark.parametrize("end", ["hada_w1_a", "lokr_w1", "w_norm", "oft_blocks", "a1.weight", "bm.weight", "lora_up.x"])
def test_a_tensor_that_is_one_too_many_is_not_dropped(end: str) -> None:
    with pytest.raises(FormatError, match=r"conv_in.*(one too many|lora_up\.x)"):
        method({**kohya(torch.tensor(1.0)), f"lora_unet_conv_in.{end}": torch.ones(8)})


@pytest.mark.parametrize("lost", ["lora_down.weight", "lora_up.weight"])
def test_half_a_pair_is_refused_naming_the_layer(lost: str) -> None:
    tensors = kohya(torch.tensor(1.0))
    del tensors[f"lora_unet_conv_in.{lost}"]
    for strict in (True, False):  # nothing is left of it
        with pytest.raises(FormatError, match=r"unet\.conv_in .*has (up|down), which is no whole adapter"):
            known(tensors, strict=strict)


def test_a_layer_that_is_there_twice_is_refused() -> None:
    """With and without CLIP's `text_model.`: neither may win silently."""
    twice = dotted(TEXT, TEXT.replace("text_model.", ""))
    with pytest.raises(FormatError, match=rf"{TEXT} has (down|up) twice"):
        known(twice)
    assert len(known(twice, strict=False).unknown) == 2


def test_a_layer_under_two_prefixes_is_refused() -> None:
    twice = dotted("transformer.single_transformer_blocks.0.attn.to_q", "diffusion_model.single_blocks.0.linear1")
    twice["diffusion_model.single_blocks.0.linear1.lora_B.weight"] = torch.ones(21, 2)
    twice["transformer.single_transformer_blocks.0.attn.to_q.lora_B.weight"] = torch.ones(3, 2)
    with pytest.raises(FormatError, match=r"single_transformer_blocks\.0\.attn\.to_q twice, under two names"):
        known(twice)


@pytest.mark.parametrize("alpha", [None, torch.tensor(0), torch.tensor(0.0)])
def test_alpha_that_is_missing_or_zero_means_the_rank(alpha: Tensor | None) -> None:
    assert method(kohya(alpha, rank=2)).scale == 1.0


@pytest.mark.parametrize("dtype", [torch.int64, torch.float16, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_alpha_is_read_in_any_dtype(dtype: torch.dtype) -> None:
    assert method(kohya(torch.tensor(3).to(dtype), rank=4)).scale == 0.75


@pytest.mark.parametrize("alpha", [float("nan"), float("inf"), -1.0, [1.0, 2.0]], ids=str)
def test_alpha_that_is_not_one_finite_number_is_refused(alpha: float | list[float]) -> None:
    with pytest.raises(FormatError, match=r"unet\.conv_in .*: alpha is .*, wanted (one|a finite) number"):
        method(kohya(torch.tensor(alpha)))


def test_a_lokr_of_full_factors_reads_no_alpha_not_even_an_infinite_one() -> None:
    """ai-toolkit's is 9,999,999,999, which is infinite in fp16."""
    stem = "diffusion_model.double_blocks.0.img_attn.proj"
    tensors = {f"{stem}.lokr_w1": torch.ones(2, 2), f"{stem}.lokr_w2": torch.ones(3, 4)}
    for alpha in (9_999_999_999.0, 0.5):
        assert only({**tensors, f"{stem}.alpha": torch.tensor(alpha).half()}).method.scale == 1.0


@pytest.mark.parametrize(
    ("down", "up"), [(torch.ones(()), torch.ones(())), (torch.ones(0, 6), torch.ones(5, 0))], ids=["0-dim", "rank 0"]
)
def test_tensors_of_no_rank_are_refused(down: Tensor, up: Tensor) -> None:
    with pytest.raises(FormatError, match=r"attn2\.to_q \(.*down"):
        method({f"{QUERY}.lora_A.weight": down, f"{QUERY}.lora_B.weight": up})


def test_t_lora_is_refused_with_what_to_do() -> None:
    """Its change is P L Q less what that was at the start, which no file has."""
    stem = "lora_unet_mid_block_attentions_0_proj_in"
    tensors = {
        f"{stem}.q_layer.weight": torch.ones(2, 6),
        f"{stem}.p_layer.weight": torch.ones(5, 2),
        f"{stem}.lambda_layer": torch.ones(1, 2),
        f"{stem}.alpha": torch.tensor(1.0),
    }
    with pytest.raises(FormatError, match=r"mid_block\.attentions\.0\.proj_in .*T-LoRA .*merge it with the tool"):
        known(tensors)
    rest = known({**tensors, **kohya(None)}, strict=False)
    assert (list(rest.parts), set(rest.unknown)) == (["unet.conv_in"], set(tensors))


def test_a_checkpoint_is_called_one(tmp_path: Path) -> None:
    tensors = {"first_stage_model.decoder.conv_in.weight": torch.ones(2, 4), "cond_stage_model.x.bias": torch.ones(4)}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(FormatError, match=r"these are a model's own weights \(.*cond_stage_model\.x\.bias.*\), not an"):
        load(tmp_path / "model.safetensors")


@pytest.mark.parametrize("end", [".pt", ".ckpt", ".bin"])
def test_nothing_is_written_under_a_pickle_s_name(end: str, tmp_path: Path) -> None:
    file = AdapterFile({QUERY: Part(LoRA(2), {"down": torch.randn(2, 320), "up": torch.randn(320, 2)})})
    with pytest.raises(ConfigError, match="only safetensors is written"):
        save(file, tmp_path / f"x{end}", format="kohya")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("keys", [["conv_in.weights", "conv_in.biases"], ["x.y.lora_z.weight"]])
def test_a_file_that_is_not_ours_to_read_is_refused_clearly(keys: list[str], tmp_path: Path) -> None:
    path = tmp_path / "foreign.safetensors"
    save_file({key: torch.ones(1, 4) for key in keys}, path)
    with pytest.raises(FormatError) as caught:
        load(path)
    message = str(caught.value)
    assert str(path) in message
    assert f"none of its {len(keys)} keys is known" in message
    assert sorted(keys)[0] in message
    assert f"kohya, {', '.join(NAMES[1:])}" in message


def test_a_checkpoint_is_no_adapter() -> None:
    """Its weights end as IA3's vectors do."""
    tensors = {"unet.conv_in.weight": torch.ones(8, 4, 3, 3), "unet.conv_in.bias": torch.ones(8)}
    with pytest.raises(FormatError, match=r"unet\.conv_in"):
        known(tensors)


def test_what_a_format_has_no_word_for_is_refused(tmp_path: Path) -> None:
    parts = {"transformer_2.proj_out": Part(LoRA(2), {"down": torch.ones(2, 6), "up": torch.ones(5, 2)})}
    with pytest.raises(
        FormatError, match=r"kohya has no word for the component transformer_2 \(transformer_2\.proj_out\)"
    ):
        save(AdapterFile(parts), tmp_path / "x.safetensors", format="kohya")
    with pytest.raises(FormatError, match="nothing to write"):
        save(AdapterFile({}), tmp_path / "x.safetensors")
    with pytest.raises(ConfigError, match="no format 'khoya'; there are: kohya, lycoris"):
        save(AdapterFile(parts), tmp_path / "x.safetensors", format="khoya")
    with pytest.raises(ConfigError, match="no format 'khoya'; there are: kohya, lycoris"):
        plan(AdapterFile(parts), "khoya")
    with pytest.raises(ConfigError, match="cannot be written as"):
        save(AdapterFile(parts), tmp_path / "x.safetensors", dtype=torch.float8_e4m3fnuz)
    assert list(tmp_path.iterdir()) == []


def test_layers_that_are_one_in_a_format_are_refused_with_that_said(tmp_path: Path) -> None:
    names = [f"transformer.transformer_blocks.0.attn.{end}" for end in ("to_q", "to_k", "to_v")]
    parts = {name: Part(OFT(4, "input"), {"packed": torch.randn(768, 6)}) for name in names}
    why = "and rotations of the inputs of several layers are not one; diffusers' names, which 'imgadapt' has, keep them"
    with pytest.raises(FormatError, match=f"kohya: these layers are a part of one in kohya, {why}"):
        save(AdapterFile(parts, architecture="flux"), tmp_path / "x.safetensors", format="kohya")


def test_peft_has_one_method_and_one_component_in_a_file(sites: Sites, tmp_path: Path) -> None:
    lora = {name: part(sites[name], LoRA(3, 2.0), 0) for name in (QUERY, TEXT)}
    with pytest.raises(FormatError, match="lora on text_encoder, lora on unet: write them apart"):
        save(AdapterFile(lora), tmp_path / "x.safetensors", format="peft")
    other = Part(IA3("input"), {"vector": torch.ones(12)})
    with pytest.raises(FormatError, match="ia3 on unet, lora on unet: write them apart"):
        save(AdapterFile({QUERY: lora[QUERY], "unet.mid_block.x": other}), tmp_path / "x.safetensors", format="peft")
    assert list(tmp_path.iterdir()) == []


def test_flattened_names_of_a_model_without_a_table_are_refused_not_guessed(tmp_path: Path) -> None:
    """Flattened names cannot be parsed back: without a table neither we nor any tool would find the layers again."""
    name = "unet.down_blocks.9.attentions.0.transformer_blocks.1.attn1.to_q"
    method = LoRA(2, 1.0)
    file = AdapterFile({name: Part(method, method.init(Site((6, 8)), None))})
    for form in ("kohya", "lycoris", "onetrainer", "lycoris-wrapper"):
        with pytest.raises(
            FormatError, match=r"names this model's layers is not known yet .*unet\.down_blocks\.9\.att"
        ):
            save(file, tmp_path / "x.safetensors", format=form)
    assert not list(tmp_path.iterdir())
    again = load(save(file, tmp_path / "x.safetensors"))
    assert (list(again.parts), again.architecture, again.parts[name].method) == ([name], None, method)


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
        save(AdapterFile(file.parts, {"epoch": 3}), tmp_path / "x.safetensors")  # pyright: ignore[reportArgumentType] # the point
    assert not list(tmp_path.iterdir())


# peft's configs


@pytest.mark.parametrize("end", ["lora_A.weights", "lora_A.default.weights", "lora_A.a.b.weight"])
def test_a_misspelt_end_is_no_adapters_name(end: str) -> None:
    tensors = dotted(QUERY)
    tensors[f"{QUERY}.{end}"] = tensors.pop(f"{QUERY}.lora_A.weight")
    with pytest.raises(FormatError, match=end.replace(".", r"\.")):
        known(tensors)


def test_without_metadata_a_diffusers_file_has_alpha_equal_to_rank() -> None:
    assert method(dotted(QUERY, rank=2)).scale == 1.0


@pytest.mark.parametrize(
    ("fields", "scale"),
    [
        ({"lora_alpha": 3}, 1.5),
        ({"lora_alpha": 3, "use_rslora": True}, 3 / 2**0.5),
        ({"lora_alpha": 3, "alpha_pattern": {"to_q": 8}}, 4.0),
        ({"lora_alpha": 3, "alpha_pattern": {"to_k": 8}}, 1.5),
        ({"lora_alpha": 3, "r": 64, "rank_pattern": {"to_q": 2}}, 1.5),
    ],
)
@pytest.mark.parametrize("where", ["diffusers", "peft"])
def test_a_config_says_alpha(fields: dict[str, Any], scale: float, where: str) -> None:
    if where == "peft":
        stem = QUERY.replace("unet.", "base_model.model.")
        assert method(dotted(stem, rank=2), {"peft_config": json.dumps(fields)}).scale == pytest.approx(scale, 1e-12)
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
    fields: dict[str, Any] = json.loads(written(DIFFUSERS, file.parts)[1][CONFIG])
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
    tensors, metadata = written(DIFFUSERS, parts)
    again = known(tensors, metadata).parts
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
        f'{{"unet.lora_alpha": 1{"0" * 400}}}',
        '{"unet.lora_alpha": 1, "unet.alpha_pattern": ["to_q"]}',
        '{"unet.lora_alpha": 1, "unet.alpha_pattern": {"(": 2}}',
    ],
    ids=lambda config: config[:60],
)
def test_metadata_that_says_no_alpha_is_refused(config: str) -> None:
    with pytest.raises(FormatError):
        method(dotted(QUERY), {CONFIG: config})


@pytest.mark.parametrize(
    "pattern", ["(a+)+!", "([a-z_0-9.]+)+!", "(a|a)*!", "((a+))+!", "(.*)*x", ".*" * 14 + "X", r"([a-z_0-9.]+)+to_q"]
)
def test_a_pattern_that_re_could_try_for_ever_is_answered_at_once(pattern: str) -> None:
    config = json.dumps({"unet.lora_alpha": 2, "unet.alpha_pattern": {pattern: 1}})
    began = time.thread_time()
    assert method(dotted(QUERY, rank=2), {CONFIG: config}).alpha == (1 if "to_q" in pattern else 2)
    assert time.thread_time() - began < 2


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("(a{99}){999}", r"'alpha_pattern' has .*, no regular expression that is read: it is too large"),
        (r"(.|..|\w{3})*[!?]", "it takes too long over so many names"),
    ],
)
def test_a_pattern_that_no_bound_holds_is_refused(pattern: str, said: str) -> None:
    config = json.dumps({"unet.lora_alpha": 2, "unet.alpha_pattern": {pattern: 1}})
    with pytest.raises(FormatError, match=said):
        known(dotted(QUERY), {CONFIG: config})


def test_feedforward_modules_that_are_no_texts_are_refused_before_they_are_compared() -> None:
    """As text, this list would be made anew for every layer."""
    tensors = {f"unet.b.{k}.lora_{side}.weight": torch.ones(2, 2) for k in range(2000) for side in "AB"}
    config = json.dumps({"unet.r": 2, "unet.feedforward_modules": [[0] * 300_000]})
    began = time.thread_time()
    with pytest.raises(FormatError, match="'feedforward_modules' is a list of other things than texts"):
        known(tensors, {CONFIG: config})
    assert time.thread_time() - began < 5


@pytest.mark.parametrize("kind", ["lora", "dora", "bias", "loha", "lokr", "oft", "ia3"])
def test_a_folder_of_pefts_is_written_and_read(kind: str, sites: Sites, tmp_path: Path) -> None:
    methods: dict[str, Method] = {
        "lora": LoRA(3, 2.0),
        "dora": DoRA(LoRA(3, 2.0), "output"),
        "bias": LoRA(3, 2.0, bias=True),
        "loha": LoHa(3, 2.0),
        "lokr": LoKr(2, 1.0),
        "oft": OFT(4, side="input"),
        "ia3": IA3("input", absolute=True),
    }
    chosen, parts = methods[kind], dict[str, Part]()
    for name in (QUERY, "unet.conv_out"):
        site = replace(sites[name], bias="bias")
        made = chosen.at(site).init(site, torch.ones(site.shape))
        parts[name] = Part(chosen.at(site), {key: torch.randn(tensor.shape) for key, tensor in made.items()})
    folder = save(AdapterFile(parts, {"mine": "kept"}), tmp_path / "folder", format="peft")
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    fields: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    assert fields["peft_type"] == {"dora": "LORA", "bias": "LORA"}.get(kind, kind.upper())
    again = load(folder)
    assert (again.format, again.architecture, again.metadata["mine"]) == ("peft", "sd1", "kept")
    for name, own in parts.items():
        assert type(again.parts[name].method) is type(own.method)
        assert again.parts[name].method.scale == own.method.scale
        found = again.parts[name].tensors
        assert found.keys() == own.tensors.keys()
        assert all(found[key].equal(tensor.reshape(found[key].shape)) for key, tensor in own.tensors.items())
    (folder / "adapter_config.json").unlink()
    with pytest.raises(FormatError, match=r"folder without adapter_config\.json"):
        load(folder)


def test_a_file_of_pefts_names_without_its_config_becomes_a_folder_with_one(tmp_path: Path) -> None:
    """fal's trainer writes such, alpha = rank; nothing has changed since it was read, and peft needs the config."""
    save_file(dotted(QUERY.replace("unet.", "base_model.model.")), tmp_path / "x.safetensors")
    folder = save(load(tmp_path / "x.safetensors"), tmp_path / "folder", format="peft")
    fields: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    assert (fields["peft_type"], fields["r"], fields["lora_alpha"]) == ("LORA", 2, 2)
    assert load(folder).parts[QUERY].method.scale == 1.0


def test_the_name_of_pefts_adapter_in_its_keys_is_passed_over() -> None:
    stem = QUERY.replace("unet.", "base_model.model.")
    tensors = {f"{stem}.lora_A.default.weight": torch.ones(2, 6), f"{stem}.lora_B.default.weight": torch.ones(5, 2)}
    tensors |= {f"{stem}.lora_magnitude_vector.default.weight": torch.ones(5)}
    reading = known(tensors)
    assert (reading.format, list(reading.parts)) == ("peft", [QUERY])
    assert reading.parts[QUERY].method == DoRA(LoRA(2), "output")


def test_a_bias_of_pefts_up_matrix_is_scaled_and_one_beside_kohyas_is_not(tmp_path: Path) -> None:
    """peft: scale * (B x + b); LyCORIS' diff_b is a difference of its own."""
    bias = torch.arange(5.0)
    peft = only({**dotted(QUERY), f"{QUERY}.lora_B.bias": bias}, {CONFIG: '{"unet.r": 2, "unet.lora_alpha": 3}'})
    stem = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_q"
    pair = {f"{stem}.lora_down.weight": torch.ones(2, 6), f"{stem}.lora_up.weight": torch.ones(5, 2)}
    lycoris = only({**pair, f"{stem}.alpha": torch.tensor(3.0), f"{stem}.diff_b": bias})
    for own, wanted in ((peft, 1.5 * bias), (lycoris, bias)):
        assert own.method == LoRA(2, 3.0, bias=True)
        change = own.method.bias_delta(own.tensors)
        assert change is not None
        torch.testing.assert_close(own.method.scale * change, wanted)
        for form in ("lycoris", "diffusers", "peft", "imgadapt"):
            file = AdapterFile({QUERY: replace(own, source=None)})
            again = load(save(file, tmp_path / "x.safetensors", format=form)).parts[QUERY]
            found = again.method.bias_delta(again.tensors)
            assert found is not None
            torch.testing.assert_close(again.method.scale * found, wanted)


# Names


@pytest.mark.parametrize("form", [f for f in LORA if f.prefix("text_encoder", "sd1")], ids=lambda form: form.name)
def test_text_model_is_optional_on_reading_and_always_written(form: Format, sites: Sites) -> None:
    own = part(sites[TEXT], LoRA(3, 2.0), 0)
    tensors, metadata = written(form, {TEXT: own})
    assert all("text_model" in key for key in tensors)
    if form.name == "imgadapt":
        return  # ours alone
    bare = {key.replace(f"text_model{form.separator}", ""): tensor for key, tensor in tensors.items()}
    assert not any("text_model" in key for key in bare)
    reading = known(bare, metadata)
    assert (reading.architecture, list(reading.parts)) == ("sd1", [TEXT])
    assert reading.parts[TEXT].method.scale == (2 / 3 if as_it_is(form) else 1.0)


@pytest.mark.parametrize(("name", "stem"), [(QUERY, "lora"), (TEXT, "lora_linear_layer")])
def test_the_older_spelling_of_diffusers_training_scripts_is_read(name: str, stem: str) -> None:
    """`convert_state_dict_to_diffusers` of diffusers 0.42.1 renames q, k, v and out, and leaves the rest."""
    other = "unet.conv_in"
    tensors = {**dotted(name, down=f"{stem}.down", up=f"{stem}.up"), **dotted(other)}
    reading = known(tensors)
    assert (reading.format, set(reading.parts)) == ("diffusers", {name, other})
    parts = {layer: replace(part, source=None) for layer, part in reading.parts.items()}
    assert set(written(DIFFUSERS, parts)[0]) == set(dotted(name, other))


@pytest.mark.parametrize("prefix", ["", "unet."])
def test_diffusers_attention_processors_are_their_layers(prefix: str) -> None:
    """`unet.mid_block...attn1.processor.to_out_lora.up.weight`, of diffusers before peft."""
    stem = "mid_block.attentions.0.transformer_blocks.0"
    tensors: dict[str, Tensor] = {}
    for layer in ("attn1", "attn2"):
        for end in ("to_q", "to_k", "to_v", "to_out"):
            key = f"{prefix}{stem}.{layer}.processor.{end}_lora"
            tensors |= {f"{key}.down.weight": torch.ones(2, 6), f"{key}.up.weight": torch.ones(5, 2)}
    text = TEXT.replace("q_proj", "to_q_lora")
    if prefix:
        tensors |= {f"{text}.down.weight": torch.ones(2, 6), f"{text}.up.weight": torch.ones(5, 2)}
    reading = known(tensors)
    assert (reading.format, reading.architecture) == ("diffusers-legacy", "sd1")
    assert set(reading.parts) == ({TEXT} if prefix else set()) | {
        f"unet.{stem}.{layer}.{end}" for layer in ("attn1", "attn2") for end in ("to_q", "to_k", "to_v", "to_out.0")
    }
    assert all(part.method.scale == 1.0 for part in reading.parts.values())


def test_dotted_names_are_read_for_models_that_have_no_table() -> None:
    name = "transformer.some_blocks.7.attn.to_q"
    reading = known(dotted(name))
    assert (reading.format, reading.architecture, list(reading.parts)) == ("diffusers", None, [name])


FLUX_Q = "transformer.single_transformer_blocks.0.attn.to_q"
T5 = "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q"


def flat(*stems: str) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for stem in stems:
        tensors |= {f"{stem}.lora_down.weight": torch.ones(2, 6), f"{stem}.lora_up.weight": torch.ones(6, 2)}
        tensors |= {f"{stem}.alpha": torch.tensor(1.0)}
    return tensors


@pytest.mark.parametrize(
    ("stem", "other", "form"),
    [
        ("lora_te3_", "lora_unet_double_blocks_0_img_attn_proj", "kohya"),  # sd-scripts, networks/lora_flux.py
        ("lora_te2_", "lora_transformer_transformer_blocks_0_attn_to_out_0", "onetrainer"),
    ],
)
def test_fluxs_t5_is_its_second_text_encoder_whatever_the_tool_calls_it(stem: str, other: str, form: str) -> None:
    key = f"{stem}{T5.partition('.')[2].replace('.', '_')}"
    reading = known(flat(key, other))
    layer = "transformer.transformer_blocks.0.attn.to_out.0"
    assert (reading.format, reading.architecture, set(reading.parts)) == (form, "flux", {T5, layer})
    parts = {name: replace(part, source=None) for name, part in reading.parts.items()}
    again, _ = written(next(f for f in FORMATS if f.name == form), parts)
    assert set(again) == set(flat(key, other))


@pytest.mark.parametrize(
    ("key", "architecture", "layer"),
    [
        ("lora_unet__blocks_0_cross_attn_k", "wan", "transformer.blocks.0.attn2.to_k"),  # Wan-Fun
        ("lora_unet_blocks_0_cross_attn_k", "wan", "transformer.blocks.0.attn2.to_k"),
        ("lycoris_mid_block_attentions_0_proj_in", "sd1", "unet.mid_block.attentions.0.proj_in"),
        ("lycoris_transformer_blocks_0_attn_to_out_0", "", "transformer.transformer_blocks.0.attn.to_out.0"),
        (
            "lora_te2_text_model_encoder_layers_31_mlp_fc1",
            "sdxl",
            "text_encoder_2.text_model.encoder.layers.31.mlp.fc1",
        ),
    ],
)
def test_prefixes_name_components(key: str, architecture: str, layer: str) -> None:
    reading = known(flat(key))
    assert list(reading.parts) == [layer]
    assert str(reading.architecture).startswith(architecture)


def test_xlabs_attention_is_split_and_written_back(tmp_path: Path) -> None:
    """`double_blocks.0.processor.qkv_lora1.down.weight`: 1 is the picture's stream, 2 the text's; no alpha."""
    tensors: dict[str, Tensor] = {}
    for name, rows in (("qkv_lora1", 18), ("proj_lora1", 6), ("qkv_lora2", 18), ("proj_lora2", 6)):
        stem = f"double_blocks.0.processor.{name}"
        tensors |= {f"{stem}.down.weight": torch.randn(2, 6), f"{stem}.up.weight": torch.randn(rows, 2)}
    save_file(tensors, tmp_path / "x.safetensors")
    file = load(tmp_path / "x.safetensors")
    ends = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    assert (file.format, file.architecture) == ("xlabs", "flux")
    assert set(file.parts) == {f"transformer.transformer_blocks.0.attn.{end}" for end in ends}
    up = tensors["double_blocks.0.processor.qkv_lora2.up.weight"]
    assert file.parts["transformer.transformer_blocks.0.attn.add_v_proj"].tensors["up"].equal(up[12:])
    for changed in (file, replace(file, parts={k: replace(p, source=None) for k, p in file.parts.items()})):
        again, _ = read_tensors(save(changed, tmp_path / "y.safetensors", format="xlabs"))
        assert tensors_digest(again) == tensors_digest(tensors)


def test_kohyas_split_rotations_of_flux_are_its_layers(tmp_path: Path) -> None:
    """`oft_blocks.0` to `.3` are q, k, v and mlp of one fused layer, each turned by itself; alpha limits each."""
    stem = "oft_unet_single_blocks_0_linear1"
    tensors = {f"{stem}.oft_blocks.{k}": 0.1 * torch.randn(2, 4 if k == 3 else 3, 4 if k == 3 else 3) for k in range(4)}
    tensors[f"{stem}.alpha"] = torch.tensor(1e3)
    save_file(tensors, tmp_path / "x.safetensors")
    file = load(tmp_path / "x.safetensors")
    names = [f"transformer.single_transformer_blocks.0.{end}" for end in ("attn.to_q", "attn.to_k", "attn.to_v")]
    names.append("transformer.single_transformer_blocks.0.proj_mlp")
    assert (file.format, file.architecture, set(file.parts)) == ("kohya-oft", "flux", set(names))
    for k, name in enumerate(names):
        blocks = tensors[f"{stem}.oft_blocks.{k}"]
        own, weight = file.parts[name], torch.randn(blocks.shape[0] * blocks.shape[1], 5)
        q, one = blocks - blocks.mT, torch.eye(blocks.shape[1])
        turned = torch.linalg.solve(one - q, one + q).mT @ weight.view(*blocks.shape[:2], 5)
        delta = own.method.delta(own.tensors, Site(tuple(weight.shape)), weight)
        torch.testing.assert_close(weight + own.method.scale * delta, turned.reshape(weight.shape))
    assert tensors_digest(read_tensors(save(file, tmp_path / "y.safetensors"))[0]) == tensors_digest(tensors)
    del tensors[f"{stem}.oft_blocks.1"]
    with pytest.raises(FormatError, match=r"single_blocks\.0\.linear1 .*has pieces 0, 2, 3, and 4 layers are fused"):
        known(tensors)


# Weights that are set


def test_a_files_own_weights_take_the_place_of_the_bases(tmp_path: Path) -> None:
    """BFL's control LoRAs set the norms of q and k; ComfyUI's `set_weight` sets any."""
    norm, linear = torch.randn(12), torch.randn(24, 8)
    tensors = {
        "double_blocks.0.img_attn.norm.query_norm.scale": norm,
        "img_in.lora_A.weight": torch.ones(2, 8),
        "img_in.lora_B.weight": torch.ones(24, 2),
        "img_in.lora_B.bias": torch.ones(24),
    }
    reading = known(tensors)
    query = "transformer.transformer_blocks.0.attn.norm_q"
    assert (reading.format, reading.architecture) == ("bfl", "flux")
    assert set(reading.parts) == {query, "transformer.x_embedder"}
    assert reading.parts[query].method == Norm(bias=False, absolute=True)
    assert reading.parts["transformer.x_embedder"].method == LoRA(2, bias=True)
    base = {f"{query}.weight": torch.randn(12), "transformer.x_embedder.weight": torch.randn(24, 8)}
    base["transformer.x_embedder.bias"] = torch.zeros(24)
    made = changes(reading.parts, base)
    torch.testing.assert_close(base[f"{query}.weight"] + made[f"{query}.weight"], norm)
    torch.testing.assert_close(made["transformer.x_embedder.bias"], torch.ones(24))

    weights = known({"diffusion_model.img_in.set_weight": linear})
    assert (weights.format, list(weights.parts)) == ("comfyui", ["transformer.x_embedder"])
    assert weights.parts["transformer.x_embedder"].method == Full(bias=False, absolute=True)
    change = changes(weights.parts, base)["transformer.x_embedder.weight"]
    torch.testing.assert_close(base["transformer.x_embedder.weight"] + change, linear)
    with pytest.raises(ShapeError, match=r"sets a weight of \(24, 8\), this layer's is \(24, 9\)"):
        changes(weights.parts, {"transformer.x_embedder.weight": torch.randn(24, 9)})


@pytest.mark.parametrize("end", ["set_bias", "reshape_weight", "bias"])
def test_what_changes_more_than_weights_is_refused(end: str) -> None:
    tensors = {"diffusion_model.img_in.set_weight": torch.ones(24, 8), f"diffusion_model.img_in.{end}": torch.ones(24)}
    with pytest.raises(FormatError, match=r"img_in .*one too many"):
        known(tensors)


@pytest.mark.parametrize(
    "key", ["lora_unet_mid_block_attentions_0_norm.w_norm", "transformer.mid_block.attentions.0.norm.diff"]
)
def test_differences_of_norms_are_read(key: str, tmp_path: Path) -> None:
    """LyCORIS' `w_norm`; ai-toolkit writes norms' `diff`."""
    value, bias = torch.randn(6), torch.randn(6)
    stem, _, end = key.rpartition(".")
    name = "unet.mid_block.attentions.0.norm"
    save_file({key: value, f"{stem}.{'b_norm' if end == 'w_norm' else 'diff_b'}": bias}, tmp_path / "x.safetensors")
    file = load(tmp_path / "x.safetensors")
    assert {layer: part.method for layer, part in file.parts.items()} == {name: Norm()}
    base = {f"{name}.weight": torch.ones(6), f"{name}.bias": torch.zeros(6)}
    wanted = {f"{name}.weight": value, f"{name}.bias": bias}
    assert differing(changes(file.parts, base), wanted) == []
    for form in ("lycoris", "comfyui", "ai-toolkit", "imgadapt"):
        again = load(save(file, tmp_path / "y.safetensors", format=form))
        assert differing(changes(again.parts, base), wanted) == [], form


# Own format


def test_imgadapts_own_format_keeps_every_hyper_parameter(sites: Sites, tmp_path: Path) -> None:
    methods: dict[str, Method] = {
        QUERY: LoRA(3, 2.0, rank_stabilised=True),
        TEXT: DoRA(LoHa(2, 1.0), "input"),
        "unet.conv_out": OFT(2, side="input", constraint=0.1, neumann=3),
        "unet.mid_block.resnets.0.conv1": LoRA(2, 1.0, tucker=True),
        "unet.conv_in": IA3("input"),
    }
    parts: dict[str, Part] = {}
    for name, method in methods.items():
        site = sites[name]
        parts[name] = Part(method, method.init(site, torch.ones(site.shape)))
    again = load(save(AdapterFile(parts), tmp_path / "x.safetensors"))  # no other format has words for all
    assert again.format == "imgadapt"
    assert {name: part.method for name, part in again.parts.items()} == methods
    for name, part in parts.items():
        assert all(again.parts[name].tensors[key].equal(tensor) for key, tensor in part.tensors.items())
    tensors, metadata = read_tensors(tmp_path / "x.safetensors")
    del tensors[f"{QUERY}.up"]
    with pytest.raises(FormatError, match=rf"{QUERY}: down are not lora, whole"):
        known(tensors, metadata)
    with pytest.raises(FormatError, match="is not what imgadapt writes"):
        known(tensors, {"imgadapt": '{"methods": [{"method": "magic"}], "layers": {}}'})


# The tables


@EVERY
def test_a_format_spells_the_layers_of_an_architecture_apart(form: Format) -> None:
    """No two of them, of the components that may be in one file, have one name in it."""
    for architecture in architectures():
        native = architecture.native if form.native and architecture.name not in form.except_for else {}
        renamed = {name.partition(".")[0] for name in native}
        names = [*native, *(name for name in architecture.layers if name.partition(".")[0] not in renamed)]
        spelled: dict[str, list[str]] = {}
        for name in names:
            if (text := form.spell_name(name, architecture.name)) is not None:
                spelled.setdefault(name.partition(".")[0] if form.single else "", []).append(text)
        assert spelled
        assert all(len(set(texts)) == len(texts) for texts in spelled.values()), architecture.name


def test_what_was_changed_since_it_was_read_is_written_anew(tmp_path: Path) -> None:
    """Other tensors in the place of a part's, another layer's name, and values written into its tensors."""
    path = Path(__file__).parent / "ground_truth" / "flux_tiny" / "kohya_lora.safetensors"
    name = "transformer.transformer_blocks.0.attn.to_q"  # one of three that are one in the file
    zeroed = load(path)
    part = zeroed.parts[name]
    changed = replace(
        zeroed, parts={**zeroed.parts, name: replace(part, tensors={k: v * 0 for k, v in part.tensors.items()})}
    )
    again = load(save(changed, tmp_path / "a.safetensors", format="kohya"))
    assert not (again.parts[name].tensors["up"] @ again.parts[name].tensors["down"]).any()
    part.tensors["up"].mul_(0)  # `down` is that of k and v, too
    again = load(save(zeroed, tmp_path / "b.safetensors", format="kohya"))
    assert not (again.parts[name].tensors["up"] @ again.parts[name].tensors["down"]).any()
    other = name.replace("to_q", "to_k")
    assert (again.parts[other].tensors["up"] @ again.parts[other].tensors["down"]).any()


@pytest.mark.parametrize(("architecture", "suffixes"), [("zimage", ("attention.qkv", "attention.out")), ("flux2_klein_4b", ("img_attn.qkv", "img_mlp.0"))])  # fmt: skip  # noqa: E501
def test_an_architecture_is_told_by_its_sizes_whatever_the_method(
    architecture: str, suffixes: tuple[str, ...], tmp_path: Path
) -> None:
    """LoHa on layers that others have under the same names: Lumina2 those of Z-Image, Flux those of Klein."""
    known = next(a for a in architectures() if a.name == architecture)
    tensors: dict[str, Tensor] = {}
    for name in known.native:
        path = name.partition(".")[2]
        shape = known.shape_of(name)
        if path.endswith(suffixes) and "." in path and shape is not None and int(path.split(".")[1]) < 3:
            for k in (1, 2):
                tensors[f"diffusion_model.{path}.hada_w{k}_a"] = torch.randn(shape[0], 2)
                tensors[f"diffusion_model.{path}.hada_w{k}_b"] = torch.randn(2, shape[1])
    save_file(tensors, tmp_path / "x.safetensors")
    assert load(tmp_path / "x.safetensors").architecture == architecture


def test_peft_s_file_is_read_with_the_config_beside_it(tmp_path: Path) -> None:
    file = AdapterFile({"unet.mid_block.attentions.0.proj_in": Part(LoRA(2, 16.0), {"down": torch.randn(2, 8, 1, 1), "up": torch.randn(8, 2, 1, 1)})})  # fmt: skip  # noqa: E501
    save(file, tmp_path / "a", format="peft")
    inner = load(tmp_path / "a" / "adapter_model.safetensors")
    assert [part.method.scale for part in inner.parts.values()] == [8.0]


def test_whole_differences_have_the_bias_s_too(tmp_path: Path) -> None:
    name = "unet.time_embedding.linear_1"
    t = {"down": torch.randn(2, 5), "up": torch.randn(6, 2), "bias": torch.randn(6)}
    file = AdapterFile({name: Part(LoRA(2, 3.0, bias=True), t)})
    again = load(save(file, tmp_path / "x.safetensors", format="ai-toolkit", dense=True)).parts[name]
    torch.testing.assert_close(again.tensors["diff"], 1.5 * t["up"] @ t["down"])
    torch.testing.assert_close(again.tensors["diff_b"], 1.5 * t["bias"])
