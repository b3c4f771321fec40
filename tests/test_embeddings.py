"""Embeddings: every form read and written, words in a pipeline and out of it, and what is refused."""

import base64
import copy
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
)

from imgadapt import LoRA, adapters, attach, collect, detach, load, save, swap
from imgadapt.embeddings import KINDS, Embedding, Form, read_embeddings, write_embeddings
from imgadapt.errors import FormatError, ShapeError, StateError, TargetError
from imgadapt.file import AdapterFile
from imgadapt.pickles import read_pickle

WIDTH = 128  # of the embedded base's text encoder


def rows(count: int, width: int = WIDTH, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def words(**vectors: Tensor) -> AdapterFile:
    return AdapterFile({}, embeddings={f"<{word}>": Embedding(f"<{word}>", {"any": v}) for word, v in vectors.items()})


def draw(pipe: Any, prompt: str) -> Tensor:
    made = pipe(prompt, num_inference_steps=1, guidance_scale=2.0, generator=torch.manual_seed(3), output_type="pt")
    return made.images


def encoded(pipe: Any, prompt: str) -> Tensor:
    return pipe.encode_prompt(prompt, "cpu", 1, False)[0]


def snapshot(pipe: Any) -> tuple[Any, ...]:
    encoder = pipe.text_encoder
    weight = encoder.get_input_embeddings().weight
    return (
        *(id(pipe.tokenizer), len(pipe.tokenizer), tuple(pipe.tokenizer("<fox> a fox").input_ids)),
        *(id(weight), weight.dtype, weight.detach().numpy().tobytes(), encoder.get_input_embeddings().num_embeddings),
        *(
            encoder.config.vocab_size,
            [key for key in vars(pipe) if "imgadapt" in key],
            sorted(vars(encoder.get_input_embeddings())),
        ),
    )


# --- files ------------------------------------------------------------------------------------------------------------

FORMS: Mapping[str, tuple[Mapping[str, Tensor], Mapping[str, str], Form, Mapping[str, Mapping[str, int]]]] = {
    "diffusers": ({"<fox>": rows(3, 768)}, {}, "diffusers", {"<fox>": {"any": 3}}),
    "one vector": ({"<fox>": rows(1, 768)[0]}, {}, "diffusers", {"<fox>": {"any": 1}}),
    "two words": ({"fox": rows(2, 768), "owl": rows(1, 768)}, {}, "diffusers", {"fox": {"any": 2}, "owl": {"any": 1}}),
    "a dot in brackets": ({"<v1.5>": rows(2, 768)}, {}, "diffusers", {"<v1.5>": {"any": 2}}),
    "kohya": ({"emb_params": rows(4, 768)}, {}, "kohya", {"stem": {"any": 4}}),
    "sdxl": ({"clip_l": rows(2, 768), "clip_g": rows(2, 1280)}, {}, "pair", {"stem": {"clip_l": 2, "clip_g": 2}}),
    "onetrainer sd1": ({"emp_params": rows(2, 768), "emp_params_out": rows(1, 768)}, {}, "pair", {"stem": {"any": 2}}),
    "onetrainer": (
        {"clip_l": rows(2, 768), "t5": rows(3, 4096), "t5_out": rows(1, 4096)},
        *({}, "pair", {"stem": {"clip_l": 2, "t5": 3}}),
    ),
    "sana": ({"gemma": rows(2, 2304)}, {}, "pair", {"stem": {"gemma": 2}}),
    "bundled by onetrainer": (
        {"bundle_emb.a.fox.clip_l": rows(2, 768), "bundle_emb.a.fox.clip_g_out": rows(2, 1280)},
        *({}, "bundled", {"a.fox": {"clip_l": 2}}),
    ),
    "bundled by onetrainer, sd1": ({"bundle_emb.fox.emp_params": rows(2, 768)}, {}, "bundled", {"fox": {"any": 2}}),
    "bundled by a1111": ({"bundle_emb.fox.string_to_param.*": rows(2, 768)}, {}, "bundled", {"fox": {"any": 2}}),
    "cloneofsimo": ({"<s1>": rows(1, 768)[0]}, {"<s1>": "<embed>"}, "diffusers", {"<s1>": {"any": 1}}),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_form_is_read_and_written_again_to_the_byte(name: str, tmp_path: Path) -> None:
    tensors, metadata, form, wanted = FORMS[name]
    path = tmp_path / "stem.safetensors"
    save_file(dict(tensors), path, dict(metadata))
    file = load(path)
    assert {word: {k: len(v) for k, v in e.vectors.items()} for word, e in file.embeddings.items()} == wanted
    assert {e.form for e in file.embeddings.values()} == {form}
    for embedding in file.embeddings.values():
        assert all(v.ndim == 2 for v in (*embedding.vectors.values(), *embedding.outputs.values()))
    save(file, tmp_path / "again.safetensors")
    again = load_file(tmp_path / "again.safetensors")
    assert again.keys() == tensors.keys()
    assert all(again[key].shape == tensor.shape and again[key].equal(tensor) for key, tensor in tensors.items())


def test_every_form_that_holds_it_carries_the_same_vectors() -> None:
    one = {"<fox>": Embedding("<fox>", {"any": rows(3, 768)})}
    several = {"fox": Embedding("fox", {k: rows(2, 8, n) for n, k in enumerate(KINDS)}, {"t5": rows(1, 8, 9)})}
    cases: list[tuple[dict[str, Embedding], Form]] = [
        *((one, form) for form in ("diffusers", "kohya", "pair", "bundled")),
        *((several, form) for form in ("pair", "bundled")),
    ]
    for made, form in cases:
        (word, embedding), *_ = made.items()
        found, keys = read_embeddings(written := write_embeddings(made, form), {}, word)
        assert set(keys) == set(written)
        for before, after in ((embedding.vectors, found[word].vectors), (embedding.outputs, found[word].outputs)):
            assert before.keys() == after.keys(), form
            assert all(before[kind].equal(after[kind]) for kind in before)
    pair = {"fox": Embedding("fox", {"clip_l": rows(2, 768), "clip_g": rows(2, 1280)})}
    assert write_embeddings(pair, "kohya").keys() == {"clip_l", "clip_g"}  # as sd-scripts has SDXL's


def test_a_form_without_a_place_for_it_says_so() -> None:
    pair = Embedding("fox", {"clip_l": rows(2, 768), "clip_g": rows(2, 1280)})
    outputs = Embedding("fox", {"any": rows(2, 768)}, {"any": rows(1, 768)})
    two = {"fox": Embedding("fox", {"any": rows(1, 768)}), "owl": Embedding("owl", {"any": rows(1, 768)})}
    with pytest.raises(FormatError, match="one tensor for a word, and fox has clip_l, clip_g"):
        write_embeddings({"fox": pair}, "diffusers")
    with pytest.raises(FormatError, match="any, any_out"):
        write_embeddings({"fox": outputs}, "kohya")
    with pytest.raises(FormatError, match="one place emb_params, and there are 2 words"):
        write_embeddings(two, "kohya")
    with pytest.raises(FormatError, match="holds one word"):
        write_embeddings(
            {"fox": Embedding("fox", {"t5": rows(1, 8)}), "owl": Embedding("owl", {"clip_l": rows(1, 8)})}, "pair"
        )
    with pytest.raises(FormatError, match="never writes"):
        write_embeddings(two, "a1111")


def _a1111(vectors: Any, token: Any = 265) -> dict[str, Any]:
    content = {"string_to_token": {"*": token}, "string_to_param": vectors, "name": "fox", "step": 999}
    return {**content, "sd_checkpoint": "81761151", "sd_checkpoint_name": None}


def _old_parameters(vectors: Tensor) -> nn.ParameterDict:
    """As torch before 1.12 pickled it: without the names."""
    made = nn.ParameterDict({"*": nn.Parameter(vectors)})
    del made._keys
    return made


V = rows(3, 768)
PICKLES: Mapping[str, tuple[Any, str]] = {
    "a1111": (_a1111({"*": V}), "fox"),
    "a1111, a parameter": (_a1111({"*": nn.Parameter(V)}), "fox"),
    "the first textual inversion": (_a1111(nn.ParameterDict({"*": nn.Parameter(V)}), torch.tensor(265)), "fox"),
    "an old torch": (_a1111(_old_parameters(V)), "fox"),
    "diffusers": ({"<fox>": V}, "<fox>"),
    "a list": ([{"<fox>": V}], "<fox>"),
    "a tensor": (V, "stem"),
    "kohya": ({"emb_params": V}, "stem"),
}


@pytest.mark.parametrize("name", PICKLES)
def test_a_pickle_of_data_is_read(name: str, tmp_path: Path) -> None:
    content, word = PICKLES[name]
    for end in ("pt", "bin"):
        torch.save(content, path := tmp_path / f"stem.{end}")
        file = load(path, pickle=True)
        assert list(file.embeddings) == [word]
        assert file.embeddings[word].vectors["any"].equal(V)
    if name.startswith("a1111"):
        assert (file.metadata["step"], file.metadata["sd_checkpoint"]) == ("999", "81761151")  # pyright: ignore[reportPossiblyUnboundVariable] # two ends
        save(file, tmp_path / "out.safetensors")  # pyright: ignore[reportPossiblyUnboundVariable] # two ends
        assert load_file(tmp_path / "out.safetensors").keys() == {"fox"}


def test_a_file_is_known_by_its_content_not_by_its_name(tmp_path: Path) -> None:
    save_file({"<fox>": V}, path := tmp_path / "fox.pt", {"a": "b"})
    assert (load(path).embeddings["<fox>"].vectors["any"].equal(V), load(path).metadata) == (True, {"a": "b"})


def _picture(path: Path, text: str | None) -> Path:
    info = PngInfo()
    if text is not None:
        info.add_text("sd-ti-embedding", text)
    Image.new("RGB", (16, 8)).save(path, pnginfo=info)
    return path


def test_an_embedding_in_a_picture_is_read(tmp_path: Path) -> None:
    content = _a1111({"*": {"TORCHTENSOR": V.tolist()}})
    path = _picture(tmp_path / "other.png", base64.b64encode(json.dumps(content).encode()).decode())
    file = load(path)
    assert file.embeddings["fox"].vectors["any"].equal(V)  # fp32 goes through decimals unchanged
    assert load(path.rename(tmp_path / "x.pt")).embeddings.keys() == {"fox"}


class _Code:
    def __reduce__(self) -> Any:
        return os.system, ("exit 7",)  # pyright: ignore[reportDeprecated] # what malice takes


def _refused(tmp_path: Path, content: Any, match: str) -> None:
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(FormatError, match=match):
        load(tmp_path / "x.pt", pickle=True)


def test_a_pickle_that_wants_to_run_code_is_refused_by_name(tmp_path: Path) -> None:
    _refused(tmp_path, {"<fox>": V, "more": _Code()}, r"x\.pt: .*wants to run (posix|nt)\.system")
    _refused(tmp_path, {"<fox>": V, "more": eval}, r"wants to run .*eval")


def test_what_is_no_embedding_is_refused(tmp_path: Path) -> None:
    _refused(tmp_path, {"<fox>": rows(2)[None]}, r"<fox> is \(1, 2, 128\)")
    _refused(tmp_path, {"<fox>": torch.zeros(0, 768)}, r"<fox> is \(0, 768\)")
    _refused(tmp_path, {"<fox>": torch.ones(2, 768, dtype=torch.int64)}, r"<fox> is \(2, 768\) of torch.int64")
    _refused(tmp_path, {"<fox>": torch.ones(2, 768).to_sparse()}, "it wants to run torch._utils._rebuild_sparse_tensor")
    _refused(tmp_path, {"<fox>": torch.ones(2, 768, dtype=torch.complex64)}, "wanted plain numbers")
    _refused(tmp_path, {"<fox>": torch.zeros(1).expand(1 << 40, 768)}, "more than the numbers in the file")
    _refused(tmp_path, {}, "x.pt")
    _refused(tmp_path, [{"<fox>": V}, {"<fox>": V + 1}], "two tensors are called '<fox>'")
    _refused(tmp_path, {"string_to_param": {"*": V, "+": V}}, "2 words in A1111's form")
    _refused(tmp_path, [rows(320, 4), rows(4, 320)], "x.pt")  # a list of layers
    for junk in (b"", b"PK\x03\x04", b"\x80\x02.", b"\x10\0\0\0\0\0\0\0{nothing", b"\x89PNG\r\n\x1a\n"):
        (tmp_path / "x.pt").write_bytes(junk)
        with pytest.raises(FormatError, match=r"x\.pt"):
            load(tmp_path / "x.pt", pickle=True)
    text = base64.b64encode(b'{"a":' * 100000 + b"1").decode()
    odd = base64.b64encode(b'{"string_to_param": {"*": {"TORCHTENSOR": {"a": 1}}}}').decode()
    for said, match in ((None, "without an embedding in its text"), ("&&&", ""), (text, ""), (odd, "")):
        with pytest.raises(FormatError, match=rf"y\.png.*{match}"):
            load(_picture(tmp_path / "y.png", said))


def test_layers_are_not_taken_for_words() -> None:
    few = {"unet:0:up": rows(8, 4), "unet:0:down": rows(4, 8)}
    assert read_embeddings(few, {}, "x") == ({}, [])
    assert read_embeddings({**few, "<s1>": rows(1)}, {"<s1>": "<embed>"}, "x")[1] == ["<s1>"]
    assert read_embeddings({"lora_unet_a.alpha": torch.ones(())}, {}, "x") == ({}, [])
    with pytest.raises(FormatError, match="wanted bundle_emb"):
        read_embeddings({"bundle_emb.fox.clip_x": V}, {}, "x")
    with pytest.raises(FormatError, match="both 'fox' for one text encoder"):
        read_embeddings({"bundle_emb.fox.string_to_param.*": V, "bundle_emb.fox.emb_params": V}, {}, "x")


def test_every_tensor_of_a_pickle_is_kept(tmp_path: Path) -> None:
    torch.save({"a": [{"b": V}, (V, [V])], "state_dict": {"c": V}, "n": 1}, tmp_path / "x.pt")
    tensors, metadata = read_pickle(tmp_path / "x.pt")
    assert (sorted(tensors), metadata) == (["a.0.b", "a.1.0", "a.1.1.0", "c"], {"n": "1"})


# --- pipelines --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3])
def test_a_word_draws_the_picture_that_diffusers_draws(pipe: Any, tmp_path: Path, count: int) -> None:
    prompt, vectors = "a <fox> on a purple background", rows(count)
    before, bare = snapshot(pipe), draw(pipe, prompt)
    other = copy.deepcopy(pipe)
    other.unet, other.vae = pipe.unet, pipe.vae  # kernels differ by where in memory weights are
    save_file({"<fox>": vectors}, tmp_path / "fox.safetensors")
    other.load_textual_inversion(str(tmp_path / "fox.safetensors"))
    attach(pipe, load(tmp_path / "fox.safetensors"), name="fox")
    assert draw(pipe, prompt).equal(draw(other, prompt))
    assert not draw(pipe, prompt).equal(bare)
    assert pipe.text_encoder.config.vocab_size == before[-3] + count == len(pipe.tokenizer)
    pipe.save_pretrained(tmp_path / "saved")  # whole: its own config fits its weights
    reloaded = type(pipe).from_pretrained(tmp_path / "saved", safety_checker=None)
    assert encoded(reloaded, prompt).equal(encoded(other, prompt))
    detach(pipe)
    assert snapshot(pipe) == before
    assert draw(pipe, prompt).equal(bare)


def test_the_first_of_two_may_go_before_the_second(pipe: Any) -> None:
    before = snapshot(pipe)
    attach(pipe, words(owl=rows(2, seed=1)), name="owl")
    alone = draw(pipe, "a <owl>")
    detach(pipe, "owl")
    attach(pipe, words(fox=rows(3)), name="fox")
    attach(pipe, words(owl=rows(2, seed=1)), name="owl")
    assert adapters(pipe) == ["fox", "owl"]
    assert draw(pipe, "a <owl>").equal(alone)
    detach(pipe, "fox")
    assert draw(pipe, "a <owl>").equal(alone)
    assert pipe.tokenizer.get_vocab().keys().isdisjoint({"<fox>", "<fox>_1"})
    assert collect(pipe, "owl").embeddings["<owl>"].vectors["any"].equal(rows(2, seed=1))
    detach(pipe)
    assert snapshot(pipe) == before


def test_a_copy_of_a_pipeline_keeps_its_words_and_loses_them_by_itself(pipe: Any) -> None:
    attach(pipe, words(fox=rows(2)), name="fox")
    states, other = encoded(pipe, "a <fox>"), copy.deepcopy(pipe)
    detach(pipe)
    assert encoded(other, "a <fox>").equal(states)
    assert not encoded(pipe, "a <fox>").equal(states)
    detach(other)
    assert encoded(other, "a <fox>").equal(encoded(pipe, "a <fox>"))
    assert other.text_encoder.get_input_embeddings().weight is not pipe.text_encoder.get_input_embeddings().weight


def test_a_pipeline_that_was_cast_meanwhile_stays_so(pipe: Any) -> None:
    other = copy.deepcopy(pipe)
    weight = other.text_encoder.get_input_embeddings().weight
    values = weight.detach().clone()
    attach(other, words(fox=rows(2)), name="fox")
    other.text_encoder.to(torch.bfloat16)
    attach(other, words(owl=rows(1)), name="owl")
    assert other.text_encoder.get_input_embeddings().weight.dtype == torch.bfloat16
    detach(other)
    assert other.text_encoder.get_input_embeddings().weight is weight
    assert weight.equal(values.to(torch.bfloat16))


def test_an_offloaded_token_embedding_is_left_alone(pipe: Any) -> None:
    other = copy.deepcopy(pipe)
    attach(other, words(fox=rows(1)), name="fox")
    other.text_encoder.to("meta")  # as it is between calls after enable_sequential_cpu_offload
    for change in (lambda: attach(other, words(owl=rows(1)), name="owl"), lambda: detach(other)):
        with pytest.raises(StateError, match="text_encoder: its token embedding is offloaded"):
            change()
    assert adapters(other) == ["fox"]


REFUSED: Mapping[str, tuple[Callable[[], AdapterFile], type[Exception], str]] = {
    "width": (lambda: words(fox=rows(2, 768)), ShapeError, "<fox>: any is 768 wide; .*text_encoder 128 wide.*SDXL"),
    "kind": (
        lambda: AdapterFile({}, embeddings={"fox": Embedding("fox", {"clip_g": rows(2)})}),
        *(ShapeError, "fox: clip_g is 128 wide"),
    ),
    "taken": (
        lambda: AdapterFile({}, embeddings={"fox</w>": Embedding("fox</w>", {"any": rows(1)})}),
        *(StateError, r"has fox</w> already: .*dataclasses\.replace"),
    ),
    "a vector of another": (
        lambda: AdapterFile({}, embeddings={w: Embedding(w, {"any": rows(1)}) for w in ("<x>", "<x>_1")}),
        *(StateError, "has <x>_1 already"),
    ),
    "nan": (lambda: words(fox=rows(2) * torch.nan), FormatError, "<fox>: NaN"),
    "3-d": (lambda: words(fox=rows(2)[None]), FormatError, r"\(1, 2, 128\)"),
    "no vectors": (lambda: words(fox=rows(0)), FormatError, r"\(0, 128\)"),
    "no word": (
        lambda: AdapterFile({}, embeddings={" ": Embedding(" ", {"any": rows(1)})}),
        *(FormatError, "' ' is no word"),
    ),
    "outputs": (
        lambda: AdapterFile({}, embeddings={"fox": Embedding("fox", {}, {"clip_l": rows(1)})}),
        *(FormatError, "no place"),
    ),
    "two for one": (
        lambda: AdapterFile({}, embeddings={"fox": Embedding("fox", {"any": rows(1), "clip_l": rows(1)})}),
        *(FormatError, "any, clip_l are all for text_encoder"),
    ),
    "the second of two": (lambda: words(fox=rows(1), owl=rows(1, 7)), ShapeError, "<owl>: any is 7 wide"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_leaves_the_pipeline_as_it_was(pipe: Any, name: str) -> None:
    file, error, match = REFUSED[name]
    before = snapshot(pipe)
    with pytest.raises(error, match=match):
        attach(pipe, file(), name="new")
    assert snapshot(pipe) == before
    attach(pipe, words(bee=rows(2)), name="bee")
    held = snapshot(pipe)
    with pytest.raises(error, match=match):
        attach(pipe, file(), name="new")
    assert (snapshot(pipe), adapters(pipe)) == (held, ["bee"])


def test_words_need_a_pipeline_and_names_of_their_own(pipe: Any) -> None:
    with pytest.raises(TargetError, match="need a pipeline's tokenizers"):
        attach({"text_encoder": pipe.text_encoder}, words(fox=rows(1)))
    attach(pipe, words(fox=rows(1)), name="a")
    with pytest.raises(StateError, match="has <fox> already"):
        attach(pipe, words(fox=rows(1)), name="b")
    file = words(fox=rows(1))
    attach(pipe, replace(file, embeddings={"<red fox>": file.embeddings["<fox>"]}), name="b")  # as the error says
    assert {"<fox>", "<red fox>"} <= pipe.tokenizer.get_vocab().keys()


def test_layers_and_words_of_one_file_come_and_go_together(pipe: Any, tmp_path: Path) -> None:
    before = snapshot(pipe)
    attach(pipe, LoRA(rank=2, alpha=1), targets="attn2.to_q", name="layers")
    layers = collect(pipe, "layers")
    detach(pipe)
    file = replace(layers, embeddings=words(fox=rows(2)).embeddings)
    loaded = load(save(file, tmp_path / "x.safetensors", format="kohya"))
    assert loaded.parts.keys() == layers.parts.keys()
    assert loaded.embeddings["<fox>"].vectors["any"].equal(rows(2))
    attach(pipe, loaded, name="both")
    again = collect(pipe, "both")
    assert (again.parts.keys(), again.embeddings.keys()) == (layers.parts.keys(), {"<fox>"})
    detach(pipe, "both")
    assert (snapshot(pipe), adapters(pipe)) == (before, [])
    with pytest.raises(ShapeError, match="7 wide"):
        attach(pipe, replace(file, embeddings=words(fox=rows(2, 7)).embeddings), name="both")
    assert (snapshot(pipe), adapters(pipe)) == (before, [])  # no layer stays, either


def test_an_adapter_on_the_token_embedding_and_words_do_not_mix(pipe: Any) -> None:
    target = "text_encoder.*token_embedding"
    attach(pipe, LoRA(rank=2, alpha=1), targets=target, name="layer")
    wrapped = pipe.text_encoder.get_input_embeddings()
    with pytest.raises(StateError, match="text_encoder: an adapter is on its token embedding"):
        attach(pipe, words(fox=rows(1)), name="fox")
    assert (pipe.text_encoder.get_input_embeddings(), adapters(pipe)) == (wrapped, ["layer"])
    detach(pipe)
    before = snapshot(pipe)
    attach(pipe, words(fox=rows(1)), name="fox")
    attach(pipe, LoRA(rank=2, alpha=1), targets="attn2.to_q", name="fox2")
    attach(pipe, LoRA(rank=2, alpha=1), targets=target, name="layer")
    held = adapters(pipe)
    with pytest.raises(StateError, match="'layer' is on its token embedding; detach that, too"):
        detach(pipe, "fox", "fox2")
    assert adapters(pipe) == held  # none of the two is gone
    detach(pipe, "layer", "fox")
    detach(pipe)
    assert snapshot(pipe) == before


def test_words_of_another_hand_are_noticed(pipe: Any, tmp_path: Path) -> None:
    other = copy.deepcopy(pipe)
    attach(other, words(fox=rows(1)), name="fox")
    save_file({"<owl>": rows(1)}, tmp_path / "owl.safetensors")
    second = type(other)(**other.components, requires_safety_checker=False)
    with pytest.raises(StateError, match="another pipeline has put words into it"):
        attach(second, words(bee=rows(1)), name="bee")
    other.load_textual_inversion(str(tmp_path / "owl.safetensors"))
    with pytest.raises(StateError, match="changed by something else meanwhile"):
        detach(other)
    assert adapters(other) == ["fox"]


# --- several text encoders --------------------------------------------------------------------------------------------


def _clip(kind: Any, tokenizer: Any, width: int, end: int) -> Any:
    sizes: dict[str, Any] = {"hidden_size": width, "intermediate_size": 8, "num_hidden_layers": 1}
    sizes |= {
        "num_attention_heads": 2,
        "max_position_embeddings": 20,
        "projection_dim": 6,
        "vocab_size": len(tokenizer),
    }
    sizes |= {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return kind(CLIPTextConfig(**sizes, eos_token_id=end))


@pytest.fixture
def several(pipe: Any) -> Any:
    """Tokenizers and encoders as SD3 has them, narrow; it has no maybe_convert_prompt."""
    tokenizer = pipe.tokenizer
    t5 = T5EncoderModel(T5Config(vocab_size=len(tokenizer) + 9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    encoders = {
        "text_encoder": _clip(CLIPTextModel, tokenizer, 8, tokenizer.eos_token_id),
        "text_encoder_2": _clip(CLIPTextModelWithProjection, tokenizer, 12, 2),
        "text_encoder_3": t5,
    }
    made = SimpleNamespace(**encoders, tokenizer=tokenizer, tokenizer_2=tokenizer, tokenizer_3=tokenizer)
    made.components = vars(made)
    return made


def test_each_text_encoder_gets_its_vectors_and_pools_where_a_prompt_ends(several: Any) -> None:
    vectors = {"clip_l": rows(1, 8, 1), "clip_g": rows(1, 12, 2), "t5": rows(1, 8, 3)}
    encoders = {
        kind: several.components[c]
        for kind, c in zip(vectors, [f"text_encoder{n}" for n in ("", "_2", "_3")], strict=True)
    }
    weights = {kind: encoder.get_input_embeddings().weight for kind, encoder in encoders.items()}
    ids = torch.tensor([several.tokenizer("a fox").input_ids])
    bare = {kind: encoder.eval()(input_ids=ids)[0] for kind, encoder in encoders.items()}
    attach(several, AdapterFile({}, embeddings={"<x>": Embedding("<x>", vectors)}), name="x")
    for kind, encoder in encoders.items():
        (number,) = several.tokenizer_2.convert_tokens_to_ids(["<x>"])
        assert encoder.get_input_embeddings()(torch.tensor(number)).equal(vectors[kind][0])
        assert encoder(input_ids=ids)[0].equal(bare[kind])  # a prompt without the word is as it was
    t5 = encoders["t5"]
    assert t5.encoder.embed_tokens.weight is t5.shared.weight  # the tie holds, and so the word is looked up
    assert not t5(input_ids=torch.tensor([[number, 1]]))[0].equal(t5(input_ids=torch.tensor([[5, 1]]))[0])  # pyright: ignore[reportPossiblyUnboundVariable] # three kinds
    with_word = torch.tensor([several.tokenizer_2("a <x> fox").input_ids])
    second = encoders["clip_g"]
    states = second.text_model(input_ids=with_word).last_hidden_state if hasattr(second, "text_model") else None
    assert states is not None
    pooled = second.text_projection(states[:, -1])  # its last is the end of the prompt
    assert torch.allclose(second(input_ids=with_word).text_embeds, pooled)
    detach(several)
    for kind, encoder in encoders.items():
        assert encoder.get_input_embeddings().weight is weights[kind]
        assert encoder(input_ids=ids)[0].equal(bare[kind])
    assert second.text_model.eos_token_id == 2
    assert t5.encoder.embed_tokens.weight is weights["t5"]


def test_a_pipeline_that_takes_a_word_for_one_vector_is_warned_of(several: Any) -> None:
    with pytest.warns(UserWarning, match="write '<x> <x>_1' for '<x>'"):
        attach(several, AdapterFile({}, embeddings={"<x>": Embedding("<x>", {"clip_g": rows(2, 12)})}), name="x")
    detach(several)


def test_a_failure_at_the_second_encoder_undoes_the_first(several: Any) -> None:
    several.tokenizer_2 = _Full(several.tokenizer)
    weight = several.text_encoder.get_input_embeddings().weight
    vectors = {"clip_l": rows(1, 8), "clip_g": rows(1, 12)}
    with pytest.raises(StateError, match="does not take <x>"):
        attach(several, AdapterFile({}, embeddings={"<x>": Embedding("<x>", vectors)}), name="x")
    assert several.text_encoder.get_input_embeddings().weight is weight
    assert (several.tokenizer is not several.tokenizer_2, adapters(several)) == (True, [])


class _Full:
    """A tokenizer that takes no words, and so gives all of them the number of what it does not know."""

    eos_token_id = None

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __len__(self) -> int:
        return len(self.inner)

    def get_vocab(self) -> dict[str, int]:
        return self.inner.get_vocab()

    def add_tokens(self, tokens: list[str]) -> int:
        return 0

    def convert_tokens_to_ids(self, tokens: list[str]) -> list[int]:
        return [3 for _ in tokens]


def test_swap_refuses_a_file_with_words(pipe: Any) -> None:
    attach(pipe, LoRA(rank=2), name="a")
    file = collect(pipe, "a")
    words = {"ohwx": Embedding("ohwx", {"any": torch.randn(1, 128)})}
    with pytest.raises(StateError, match=r"the file brings words \(ohwx\): detach 'a'"):
        swap(pipe, replace(file, embeddings=words), name="a")
    detach(pipe)
