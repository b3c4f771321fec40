"""New words: what is trained of a pipeline and what is not, with which gradient, and the files that come of it."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from imgadapt import AdapterFile, attach, demo, detach, load
from imgadapt.errors import ConfigError, TrainingError
from imgadapt.training import families, probe, results, words
from imgadapt.training.config import InversionConfig
from imgadapt.training.job import Job
from imgadapt.training.loop import Run, Terms
from imgadapt.training.words import NewWord
from tests import tiny

CPU = torch.device("cpu")
WORD = "<emo>"
LAYERS = ["unet.mid_block.*to_q", "unet.up_blocks.1.*to_q"]
"""Of the tiny SDXL, that are in the real one, too, so that every format has them."""
FAMILIES: Mapping[str, type[families.Family]] = {
    "sd1": families.StableDiffusion,
    "sdxl": families.StableDiffusionXL,
    "sd3": families.StableDiffusion3,
    "flux": families.Flux,
}


def config(folder: Path, output: Path, **values: Any) -> InversionConfig:
    usual = {"folder": folder, "output": output, "word": WORD, "initial": "fox", "batch_size": 2, "log_with": [],
             "report": False, "warmup_steps": 0}  # fmt: skip
    return words.settled(InversionConfig.of({**usual, **values}))


def train(config: InversionConfig, *, stop: int | None = None, each: Callable[[Job, int], None] | None = None) -> Job:
    """As the program does it, up to a step before which it is killed; then without files."""
    job = Job(config, word=lambda family: NewWord(config, family), adapter=config.adapter)

    def loss(step: int, places: range) -> Terms:
        batch = job.material.batch(step, places)
        asked = job.objective.ask(batch.latents, config.seed, step, places, config.batch_size)
        guess = job.family.predict(asked.noisy, batch.conditions, asked.times)
        losses = job.objective.losses(guess, batch.latents, asked.noise, asked.times, batch.mask)
        return Terms(losses.weighted, losses.raw, asked.times, batch.names)

    def go(run: Run) -> None:
        for step in run.steps():
            if step == stop:
                return
            run.learn(step, loss)
            if each:
                each(job, step)
            job.look(run, step + 1)

    with job.run() as run:
        go(run)
    if stop is None:
        job.finish(run)
    return job


def live(job: Job) -> NewWord:
    assert job.word is not None
    return job.word


def vectors(word: NewWord) -> dict[str, Tensor]:
    return {row.layer: row.parameter.detach().clone() for row in word.rows()}


def family(kind: str) -> families.Family:
    return FAMILIES[kind](tiny.PIPELINES[kind](), CPU, torch.float32)


def new(kind: str, **values: Any) -> tuple[NewWord, families.Family]:
    made = family(kind)
    return NewWord(config(Path(), Path(), **values), made), made


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four pictures of the embedded style with their captions."""
    made = tmp_path_factory.mktemp("pictures")
    for path in sorted((demo.STYLE / "train").glob("*.png"))[:4]:
        for file in (path, path.with_suffix(".txt")):
            (made / file.name).write_bytes(file.read_bytes())
    return made


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """A tiny base of a family, by its name, in a folder."""
    root = tmp_path_factory.mktemp("bases")

    def saved(kind: str) -> str:
        if not (root / kind).exists():
            torch.manual_seed(0)
            tiny.PIPELINES[kind]().save_pretrained(root / kind)
        return str(root / kind)

    return saved


@pytest.fixture(scope="module")
def trained(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Job]:
    """A word of two vectors, trained on the embedded base for 20 steps."""
    output = tmp_path_factory.mktemp("word")
    torch.manual_seed(0)
    return output, train(config(pictures, output, steps=20, vectors=2, embedding_rate=2e-2, batch_size=1))


# --- what is trained


def test_only_the_words_vectors_change(trained: tuple[Path, Job]) -> None:
    _, job = trained
    fresh = demo.pipeline()
    for name in ("text_encoder", "unet", "vae"):
        before, after = getattr(fresh, name).state_dict(), getattr(job.family.pipeline, name).state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
    start = words._start(live(job).config, fresh.tokenizer, fresh.text_encoder.get_input_embeddings().weight)
    (moved,) = vectors(live(job)).values()
    assert ((moved - start).abs().amax(1) > 0.05).all()
    assert sum(row.parameter.numel() for row in job.trained) == 2 * 128


def test_the_loss_falls_on_fixed_noise(trained: tuple[Path, Job]) -> None:
    output, _ = trained
    (row,) = [json.loads(line) for line in (output / "evaluations.jsonl").read_text().splitlines()]
    assert row["seen_gain_low"] > 0
    assert row["seen"] < 0.85 * row["seen_base"]


@pytest.mark.parametrize("kind", ["sd1", "sdxl", "sd3", "flux"])
def test_the_gradient_is_that_of_the_whole_matrix_in_the_words_rows(kind: str) -> None:
    """diffusers' textual_inversion.py: the token embedding is trained whole, and all but the word's rows put back."""
    torch.manual_seed(1)
    made = family(kind)
    latents = torch.randn(2, made.latent_shape[0], 8, 8)
    times = torch.tensor([700, 30])
    sizes = torch.tensor([[16.0, 16, 0, 0, 16, 16]] * 2)
    captions = [f"a {WORD} and {WORD}, a fox", f"{WORD}"]

    def loss() -> Tensor:
        conditions = {**made.text(captions), "sizes": sizes}
        return (made.predict(latents, conditions, times) - latents).square().mean()

    word = NewWord(config(Path(), Path()), made)
    loss().backward()
    gradients = {row.layer.removesuffix(".words"): row.parameter.grad for row in word.rows()}
    word.take_off()
    matrices = {name: made.encoders[name].get_input_embeddings().weight.requires_grad_(True) for name in gradients}  # pyright: ignore[reportCallIssue] # transformers'
    loss().backward()
    for place in word.places:
        mine, whole = gradients[place.component], matrices[place.component].grad
        assert mine is not None
        assert mine.abs().max() > 1e-6
        torch.testing.assert_close(mine, whole[place.ids], rtol=1e-4, atol=1e-8)
        assert whole[: place.ids.min()].abs().max() > 0  # the vocabulary's rows have one there, and none here
    assert sorted(gradients) == ["text_encoder", "text_encoder_2"][: 2 if kind in ("sdxl", "sd3") else 1]


def test_the_vectors_start_as_the_tokens_of_the_initial_words() -> None:
    made = family("sd1")
    tokenizer: Any = made.pipeline.tokenizer
    weight = made.pipeline.text_encoder.get_input_embeddings().weight.detach().clone()
    a, b, c = (weight[k] for k in tokenizer("abc", add_special_tokens=False).input_ids)

    def start(count: int) -> Tensor:
        return words._start(config(Path(), Path(), initial="abc", vectors=count), tokenizer, weight)

    torch.testing.assert_close(start(1), torch.stack([(a + b + c) / 3]))
    torch.testing.assert_close(start(2), torch.stack([a, (b + c) / 2]))
    torch.testing.assert_close(start(5), torch.stack([a, a, b, b, c]))


def test_norm_control_pulls_each_vector_a_tenth_of_the_way() -> None:
    word, _ = new("sdxl", vectors=2)
    place = word.places[1]
    weight = word.pipeline.text_encoder_2.get_input_embeddings().weight
    spread = weight[: place.ids.min()].std(1).mean()
    torch.testing.assert_close(torch.tensor(place.spread), spread)
    with torch.no_grad():
        place.vectors.copy_(torch.stack([torch.randn(tiny.CLIP_2) * 3, torch.randn(tiny.CLIP_2) / 3]))
    before = place.vectors.detach().clone()
    word.control()
    ratio = place.vectors.detach().std(1) / spread
    torch.testing.assert_close(ratio, (before.std(1) / spread) ** 0.9)
    assert torch.allclose(place.vectors / before, (place.vectors / before)[:, :1])
    place.vectors.requires_grad_(False)
    word.control()
    torch.testing.assert_close(place.vectors.std(1) / spread, ratio, rtol=0, atol=0)


def test_the_optimiser_is_followed_by_norm_control_unless_told_otherwise() -> None:
    for on in (True, False):
        word, _ = new("sd1", norm_control=on)
        (row,) = word.rows()
        with torch.no_grad():
            row.parameter.mul_(100)
        before = row.parameter.detach().clone()
        optimizer = torch.optim.SGD(word.groups(), lr=0)
        word.follow(optimizer)
        row.parameter.grad = torch.zeros_like(row.parameter)
        optimizer.step()
        assert (row.parameter.norm().item() < 0.9 * before.norm().item()) is on


# --- with an adapter


@pytest.mark.parametrize("optimizer", ["adamw", "prodigy", "schedule-free"])
def test_the_pivot_stops_the_word_and_not_the_adapter(
    optimizer: str, pictures: Path, base: Callable[[str], str], tmp_path: Path
) -> None:
    held: list[tuple[list[Tensor], list[Tensor], list[float]]] = []

    def each(job: Job, step: int) -> None:
        own = [row.parameter.detach().clone() for row in live(job).rows()]
        others = [row.parameter.detach().clone() for row in job.trained if not row.layer.endswith(".words")]
        held.append((own, others, [group["lr"] for group in job.optimizer.param_groups]))

    rate = 1.0 if optimizer == "prodigy" else 1e-2
    made = config(pictures, tmp_path, base=base("sdxl"), steps=6, adapter=True, rank=2, targets=LAYERS,
                  pivot=0.4, optimizer=optimizer, learning_rate=rate, weight_decay=0.1)  # fmt: skip
    train(made, each=each)
    for k in range(2):  # of six steps, 0.4 are two
        assert not torch.equal(held[0][0][k], held[1][0][k])
        assert all(torch.equal(held[1][0][k], step[0][k]) for step in held[2:])
    for before, after in pairwise(held[1:]):
        assert all(not torch.equal(a, b) for a, b in zip(before[1], after[1], strict=True))
    assert [step[2][-1] > 0 for step in held] == [True, True, False, False, False, False]
    assert all(step[2][0] > 0 for step in held[:-1])


def test_a_resumed_run_is_the_same_to_the_bit(pictures: Path, base: Callable[[str], str], tmp_path: Path) -> None:
    def made(name: str) -> InversionConfig:
        return config(pictures, tmp_path / name, base=base("sdxl"), steps=6, vectors=2, adapter=True, rank=2, ema=0.9,
                      targets=LAYERS, caption_dropout=0.3, pieces=2, checkpoint_every=2, learning_rate=1e-2, pivot=0.6,
                      title="a word")  # fmt: skip

    train(made("whole"))
    for stop in (3, 5):  # before and after the pivot
        train(made("cut"), stop=stop)
    train(made("cut"))
    names = [path.name for path in sorted((tmp_path / "whole").glob("*.safetensors"))]
    assert names == [f"{name}.safetensors" for name in ("adapter.diffusers", "adapter", "adapter.words", "probe")]
    for name in names:
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_word_and_adapter_are_in_one_file_and_apart_for_diffusers(
    pictures: Path, base: Callable[[str], str], tmp_path: Path
) -> None:
    made = config(pictures, tmp_path, base=base("sdxl"), steps=2, vectors=2, adapter=True, rank=2, learning_rate=1e-2,
                  targets=LAYERS, exports={"up": "unet.up_blocks*"})  # fmt: skip
    job = train(made)
    keys = set(load_file(tmp_path / "adapter.safetensors"))
    bundled = {f"bundle_emb.{WORD}.{kind}" for kind in ("clip_l", "clip_g")}
    assert {key for key in keys if not key.startswith("lora_unet_")} == bundled
    held = vectors(live(job))
    assert load(tmp_path / "snapshots/step-0000002.safetensors").format == load(tmp_path / "adapter.safetensors").format
    for name in ("adapter", "snapshots/step-0000002", "adapter.up"):
        file = load(tmp_path / f"{name}.safetensors")
        assert torch.equal(file.embeddings[WORD].vectors["clip_g"], held["text_encoder_2.words"])
        assert file.parts

    import diffusers

    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(base("sdxl"))
    pipe.load_lora_weights(str(tmp_path / "adapter.diffusers.safetensors"))
    loaded_by_diffusers(pipe, load_file(tmp_path / "adapter.words.safetensors"))
    ours = diffusers.StableDiffusionXLPipeline.from_pretrained(base("sdxl"))
    attach(ours, load(tmp_path / "adapter.safetensors"))
    prompt = f"a fox, {WORD}"
    for x, y in zip(pipe.encode_prompt(prompt)[::2], ours.encode_prompt(prompt)[::2], strict=True):
        torch.testing.assert_close(x, y)
    noisy, states, pooled = torch.randn(1, 4, 8, 8), *ours.encode_prompt(prompt)[::2]
    added = {"text_embeds": pooled, "time_ids": torch.ones(1, 6)}
    outputs = [p.unet(noisy, 500, states, added_cond_kwargs=added).sample for p in (pipe, ours)]
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)


def loaded_by_diffusers(pipe: Any, tensors: Mapping[str, Tensor]) -> None:
    """SDXL's two tensors, as diffusers' documentation loads them."""
    pipe.load_textual_inversion(tensors["clip_l"], token=WORD, text_encoder=pipe.text_encoder, tokenizer=pipe.tokenizer)
    pipe.load_textual_inversion(
        tensors["clip_g"], token=WORD, text_encoder=pipe.text_encoder_2, tokenizer=pipe.tokenizer_2
    )


# --- files


def test_the_files_give_the_same_text_states_in_diffusers(trained: tuple[Path, Job]) -> None:
    output, job = trained
    prompt = f"{WORD}, a fox"
    states: list[Tensor] = []
    for name, token in (("adapter", {}), ("adapter.kohya", {"token": WORD})):
        pipe: Any = demo.pipeline()
        pipe.load_textual_inversion(str(output / f"{name}.safetensors"), **token)
        states.append(pipe.encode_prompt(prompt, "cpu", 1, False)[0])
    pipe = demo.pipeline()
    attach(pipe, load(output / "snapshots" / "step-0000020.safetensors"))
    states.append(pipe.encode_prompt(prompt, "cpu", 1, False)[0])
    assert torch.equal(states[0], states[1])
    assert torch.equal(states[0], states[2])
    assert not torch.allclose(states[0], demo.pipeline().encode_prompt(prompt, "cpu", 1, False)[0])
    assert set(load_file(output / "adapter.kohya.safetensors")) == {"emb_params"}
    assert torch.equal(load_file(output / "adapter.safetensors")[WORD], vectors(live(job))["text_encoder.words"])


def test_the_live_word_acts_as_its_rows_would(trained: tuple[Path, Job]) -> None:
    output, job = trained
    taken = probe.load(output / "probe.safetensors")
    bare = families.load("demo")
    assert probe.error(bare, taken) > 1e-2
    attach(bare.pipeline, load(output / "adapter.safetensors"))
    assert probe.error(bare, taken) < 1e-5
    assert not job.family.pipeline.text_encoder.get_input_embeddings()._forward_hooks


def test_a_file_that_acts_otherwise_is_caught(trained: tuple[Path, Job], tmp_path: Path) -> None:
    output, _ = trained
    taken, bare = probe.load(output / "probe.safetensors"), families.load("demo")
    paths = [output / "adapter.safetensors", output / "adapter.kohya.safetensors"]
    assert results.prove(bare, paths, taken, [WORD]) < 1e-5
    file = load(paths[0])
    (embedding,) = file.embeddings.values()
    for vectors_ in (embedding.vectors["any"] * 1.01, embedding.vectors["any"].flip(0)):
        wrong = replace(file, embeddings={WORD: replace(embedding, vectors={"any": vectors_})})
        (path,) = results.write(wrong, tmp_path, ["kohya"], {})
        with pytest.raises(TrainingError, match="acts otherwise than what was trained"):
            results.prove(bare, [path], taken, [WORD])


@pytest.mark.parametrize("kind", ["sdxl", "sd3", "flux"])
@pytest.mark.filterwarnings("ignore:StableDiffusion3Pipeline takes a word")
def test_every_family_trains_its_clip_encoders(
    kind: str, pictures: Path, base: Callable[[str], str], tmp_path: Path
) -> None:
    values: dict[str, Any] = {"resolution": [32]} if kind == "flux" else {}
    made = config(pictures, tmp_path, base=base(kind), steps=2, vectors=2, caption_dropout=0.0, **values)
    before = vectors(NewWord(made, families.load(base(kind))))
    job = train(made)
    after = vectors(live(job))
    assert {name: tuple(x.shape) for name, x in after.items()} == {
        "text_encoder.words": (2, tiny.CLIP),
        **({"text_encoder_2.words": (2, tiny.CLIP_2)} if kind != "flux" else {}),
    }
    assert all((after[name] != before[name]).any(1).all() for name in after)  # every vector, also the second
    tensors = load_file(tmp_path / "adapter.safetensors")
    assert list(tensors) == {"flux": [WORD]}.get(kind, ["clip_g", "clip_l"])
    if kind == "sdxl":
        pipe = family("sdxl").pipeline.__class__.from_pretrained(base(kind))
        loaded_by_diffusers(pipe, tensors)
        attach(job.family.pipeline, load(tmp_path / "snapshots" / "step-0000002.safetensors"))
        ours = job.family.pipeline.encode_prompt(f"a {WORD}")
        assert all(torch.equal(x, y) for x, y in zip(pipe.encode_prompt(f"a {WORD}")[::2], ours[::2], strict=True))


# --- prompts and settings


@pytest.mark.filterwarnings("ignore:StableDiffusion3Pipeline takes a word")
def test_a_word_of_several_vectors_is_spelled_out_where_the_pipeline_does_not() -> None:
    word, _ = new("sd3", vectors=3)
    whole = f"{WORD} {WORD}_1 {WORD}_2"
    assert word.spelled(f"a {WORD}, {WORD.upper()}") == f"a {whole}, {whole}"
    assert word.spelled(f"a {whole}") == f"a {whole}"
    word, made = new("sdxl", vectors=3)
    assert word.spelled(f"a {WORD.upper()}") == f"a {WORD}"
    for place in word.places:
        tokenizer: Any = getattr(made.pipeline, {"clip_l": "tokenizer", "clip_g": "tokenizer_2"}[place.kind])
        assert words._tokens_of(made.pipeline, tokenizer, f"a {WORD}")[-4:-1] == place.ids.tolist()


def test_captions_that_cut_the_word_off_are_named(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(next(pictures.glob("*.png")).read_bytes())
    (tmp_path / "a.txt").write_text(f"a very long caption of a fox on a green field, in the style of {WORD}")
    made = config(tmp_path, tmp_path / "out", steps=2)
    with pytest.raises(ConfigError, match=r"1 of 1 captions .* 1 vectors of '<emo>' in the 20 tokens .*\('a very long"):
        train(made)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"word": "fox"}, "word 'fox' is in text_encoder's vocabulary already; choose a new one: --word '<my-fox>'"),
        ({"initial": " "}, "initial is ' ', for which this base has no tokens; .* --initial dog"),
    ],
)
def test_words_of_the_vocabulary_and_initial_ones_beyond_it_are_refused(
    values: dict[str, str], message: str, pipe: Any
) -> None:
    made = families.StableDiffusion(pipe, CPU, torch.float32)
    with pytest.raises(ConfigError, match=message):
        NewWord(config(Path(), Path(), **values), made)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"trigger": "ohwx"}, "trigger is 'ohwx', and the word '<emo>' is one: leave --trigger out"),
        (
            {"rank": 4, "pivot": 0.7},
            "rank, pivot: for an adapter, and none is trained: give --adapter, or leave it out",
        ),
        ({"start": "pissa", "freeze_down": True, "nested_ranks": "all"}, "start, freeze_down, nested_ranks: for an ad"),
        ({"learning_rate": 1e-3}, "learning_rate: .* own rate is --embedding-rate"),
        ({"word": "two words"}, "'word' is 'two words': wanted one word without spaces"),
    ],
)
def test_settings_that_would_be_passed_over_are_errors(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(Path(), Path(), **values)


def test_the_words_vectors_do_not_decay() -> None:
    word, _ = new("sd1", norm_control=False)
    optimizer = torch.optim.AdamW(word.groups(), weight_decay=0.5)
    (row,) = word.rows()
    before = row.parameter.detach().clone()
    row.parameter.grad = torch.zeros_like(row.parameter)
    optimizer.step()
    assert torch.equal(row.parameter, before)


def test_in_bf16_the_word_is_trained_in_fp32_and_acts_as_its_row_would() -> None:
    made = families.StableDiffusionXL(tiny.sdxl(), CPU, torch.bfloat16)
    word = NewWord(config(Path(), Path()), made)
    with torch.no_grad():
        for place in word.places:
            place.vectors.add_(torch.randn_like(place.vectors))
    states = made.text([f"a {WORD}"])["states"]
    states.sum().backward()
    gradients = [place.vectors.grad for place in word.places]
    assert [None if grad is None else grad.dtype for grad in gradients] == [torch.float32] * 2
    word.take_off()
    detach(made.pipeline)
    attach(made.pipeline, AdapterFile({}, embeddings=word.embeddings()))
    assert torch.equal(made.text([f"a {WORD}"])["states"], states)


def test_prodigy_finds_the_words_rate_itself() -> None:
    word, _ = new("sd1", optimizer="prodigy", learning_rate=1.0)
    assert [group["lr"] for group in word.groups()] == [1.0]
    word, _ = new("sd1", optimizer="prodigy", learning_rate=1.0, embedding_rate=0.5)
    assert [group["lr"] for group in word.groups()] == [0.5]


def test_the_program_trains_and_says_what_it_made(
    run: Callable[[str, Sequence[str]], None], pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("textual_inversion", [str(pictures), "--word", WORD, "--initial", "fox", "--steps", "2", "--batch-size", "1",
                              "--output", str(tmp_path), "--log-with"])  # fmt: skip
    said = capsys.readouterr().out
    assert f"{WORD}: 1 vectors, 128 wide, from 'fox'" in said
    assert "times the spread of the vocabulary's" in said
    assert (tmp_path / "adapter.kohya.safetensors").exists()
    assert "the base's, where the word is as it began" in said
