"""What an attack on the trainers found: each test is of something that went wrong, or was passed over in silence."""

import json
import math
import os
import resource
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image
from torch import Tensor, nn

from imgadapt import live
from imgadapt.atomic import atomically
from imgadapt.errors import ConfigError, DataError, OutputError
from imgadapt.methods import Full, LoKr, LoRA, Method
from imgadapt.training import (
    buckets,
    checkpoint,
    data,
    families,
    flags,
    framing,
    loop,
    noise,
    objective,
    plan,
    probe,
    recipe,
    subject,
    words,
)
from imgadapt.training.averaging import Averages
from imgadapt.training.config import DreamBoothConfig, InversionConfig, TrainConfig
from imgadapt.training.evidence import Evidence
from imgadapt.training.job import Job, pictures
from imgadapt.training.material import Material
from imgadapt.training.objective import Sampling, Schedule
from tests import tiny

LAYER = "unet.mid_block*to_q"
Program = Callable[[str, Sequence[str]], None]


def settings(folder: Path, **values: Any) -> dict[str, Any]:
    usual = {"folder": folder, "output": folder / "out", "steps": 2, "batch_size": 2, "warmup_steps": 0}
    return {**usual, "targets": [LAYER], "log_with": [], "report": False, "rank": 2, **values}


# --- settings that would be passed over


@pytest.mark.parametrize(
    ("kind", "values", "said"),
    [
        (TrainConfig, {"restarts": 2}, "'restarts' has no effect without schedule = restarts"),
        (TrainConfig, {"huber_c": 0.2}, "'huber_c' has no effect without huber"),
        (TrainConfig, {"logit_mean": 1.0}, "'logit_mean' has no effect without timesteps = logit_normal"),
        (TrainConfig, {"mode_scale": 1.0, "timesteps": "uniform"}, "'mode_scale' has no effect"),
        (TrainConfig, {"crops": 2}, "'crops' has no effect without crop = random"),
        (TrainConfig, {"unmasked_weight": 0.1}, "'unmasked_weight' has no effect without mask"),
        (TrainConfig, {"keep_tags": 2, "caption_variants": 3}, "'keep_tags' has no .*'caption_variants' has no"),
        (TrainConfig, {"strengths": [0.7], "report": False}, "'strengths' has no effect without report"),
        (DreamBoothConfig, {"class_count": 20}, "'class_count' has no effect without preservation = classic"),
        (DreamBoothConfig, {"preservation": "none", "preservation_weight": 2}, "'preservation_weight' has no effect"),
    ],
)
def test_a_setting_without_the_one_that_it_is_part_of_is_an_error(
    kind: type[TrainConfig], values: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        kind.of({"folder": "x", **values})


def test_a_setting_with_the_one_that_it_is_part_of_is_taken() -> None:
    made = TrainConfig.of({"folder": "x", "huber": "snr", "huber_c": 0.2, "crop": "pad", "unmasked_weight": 0.1})
    assert (made.huber_c, made.unmasked_weight) == (0.2, 0.1)


def test_a_name_that_no_file_can_hold_is_an_error_before_the_training() -> None:
    for values in ({"output": os.fsdecode(b"caf\xe9")}, {"sample_prompts": ["a \udce9"]}):
        with pytest.raises(ConfigError, match=r"not UTF-8 and cannot be written into files; rename it"):
            TrainConfig.of({"folder": "x", **values})


def test_toml_of_every_kind_has_numbers_where_numbers_belong_and_paths_from_its_folder(tmp_path: Path) -> None:
    for line in ('vectors = "2"', "preservation_weight = true"):
        (tmp_path / "a.toml").write_text(line)
        with pytest.raises(ConfigError, match="wanted a number"):
            flags.read_toml(tmp_path / "a.toml")
    (tmp_path / "a.toml").write_text('score_with = ["models/clip"]')
    assert flags.read_toml(tmp_path / "a.toml") == {"score_with": [tmp_path / "models" / "clip"]}


# --- plans


def test_the_planned_scale_is_one_whatever_rank_the_method_or_a_target_has(folder: Path) -> None:
    for given in ({"method": "lora(rank=4)"}, {"method": "dora(lora(rank=4))"}, {"ranks": {"unet.mid*": 4}}):
        made = recipe.methods(plan.of({"folder": folder, **given}).config)
        assert {method.scale for method in made.values() if isinstance(method, Method)} == {1.0}


@pytest.mark.parametrize("given", [{"targets": ["transformer"]}, {"optimizer": "prodigy"}])
def test_a_plan_gives_no_rate_to_text_encoders_that_are_not_trained_at_one(folder: Path, given: dict[str, Any]) -> None:
    usual = plan.of({"folder": folder, "base": "sd1", "trigger": "ohwx"}).config
    assert (usual.targets, usual.learning_rates) == (["transformer", "text"], {"text_encoder*": 5e-5})
    made = plan.of({"folder": folder, "base": "sd1", "trigger": "ohwx", **given}).config
    assert (made.targets, made.learning_rates) == (["transformer"], {})
    made = plan.of({"folder": folder, "base": "sd1", "trigger": "ohwx", "targets": ["text_encoder*"]}).config
    assert made.learning_rates == {"text_encoder*": 5e-5}


def test_a_run_that_was_planned_goes_on_with_other_settings_of_what_is_watched(
    folder: Path, tmp_path: Path, run: Program, quick: Any
) -> None:
    arguments = [str(folder), "--output", str(tmp_path / "o"), "--kind", "style", "--steps", "20", "--batch-size", "1"]
    arguments += ["--targets", LAYER, "--log-with", "--no-report", "--sample-prompts", "--checkpoint-every"]
    run("train", [*arguments, "20"])
    run("train", [*arguments, "10", "--title", "other"])
    assert flags.read_toml(tmp_path / "o" / "config.toml")["title"] == "other"
    with pytest.raises(ConfigError, match="belongs to a run that has begun: learning_rate was"):
        run("train", [*arguments, "10", "--learning-rate", "0.5"])


# --- a subject


@pytest.mark.parametrize(
    ("caption", "wanted"),
    [("OHWX man, a hat", "man, a hat"), ("a photo of ohwx, smiling", "a photo of, smiling"), ("ohwxs", "ohwxs")],
)
def test_the_trigger_is_taken_out_in_whatever_case_and_as_a_whole_word(caption: str, wanted: str) -> None:
    assert subject.without(caption, DreamBoothConfig.of({"folder": "x", "trigger": " ohwx "})) == wanted


def test_no_step_of_class_free_preservation_encodes_text(
    folder: Path, run: Program, quick: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stepping = list[bool]()
    monkeypatch.setattr(loop.Run, "learn", _marking(loop.Run.learn, stepping))
    plainly = families.Family.encode_text

    def encode(self: families.Family, caption: str) -> dict[str, Tensor]:
        assert not stepping
        return plainly(self, caption)

    monkeypatch.setattr(families.Family, "encode_text", encode)
    flags_ = ["--output", str(folder / "out"), "--steps", "3", "--batch-size", "2", "--trigger", "ohwx", "--rank", "2"]
    flags_ += ["--targets", LAYER, "--log-with", "--no-report", "--preservation-share", "1", "--shuffle-tags"]
    run("dreambooth", [str(folder), *flags_])
    assert len([json.loads(line)["drift"] for line in (folder / "out" / "log.jsonl").read_text().splitlines()]) == 3


def _marking(learn: Any, stepping: list[bool]) -> Any:
    def marked(*args: Any) -> None:
        stepping.append(True)
        learn(*args)
        stepping.clear()

    return marked


def test_class_pictures_that_cannot_be_written_are_an_error_that_says_where(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    config = DreamBoothConfig.of({"folder": "x", "class_prompt": "a man", "preservation": "classic"})
    with pytest.raises(OutputError, match=r"cannot write class pictures to .*file"):
        subject._fill(config, SimpleNamespace(), tmp_path / "file")  # pyright: ignore[reportArgumentType] # not reached


def test_a_word_alone_is_never_shown_without_its_caption(folder: Path) -> None:
    given = {"folder": folder, "word": "<x>"}
    assert words.settled(InversionConfig.of(given)).caption_dropout == 0
    assert words.settled(InversionConfig.of({**given, "adapter": True})).caption_dropout == 0.05
    with pytest.raises(ConfigError, match="a word alone learns nothing"):
        words.settled(InversionConfig.of({**given, "caption_dropout": 0.3}))


# --- what is computed before the steps, and beside them


def test_thousands_of_captions_do_not_hold_as_many_files_open(folder: Path, quick: Any) -> None:
    config = TrainConfig.of(settings(folder))
    for k in range(60):
        (folder / f"more{k}.txt").write_text(f"number {k}")
        Image.new("RGB", (64, 64), (k, 0, 0)).save(folder / f"more{k}.png")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 40, hard))
    try:
        job = Job(config)
        assert len(job.material.texts()) == 66
        assert len(job.material.batch(0, range(2)).latents) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_what_rests_is_brought_back_once_for_all_pictures_and_texts(folder: Path, quick: Any) -> None:
    config = TrainConfig.of(settings(folder))
    family = families.load("demo")
    moves = list[str]()
    fake = SimpleNamespace(to=lambda device: moves.append(str(device)))
    family._resting = [fake]  # pyright: ignore[reportAttributeAccessIssue] # as `away` does on a GPU
    Material(config, family, pictures(config)[0]).prepare()
    assert moves == ["cpu"] * 4  # there and back, for the pictures and for the texts
    family._resting = []


def test_large_pictures_are_drawn_one_by_one_whoever_asks() -> None:
    family, calls = families.StableDiffusion(tiny.sd1(), torch.device("cpu"), torch.float32), list[int]()

    def pipeline(prompts: list[str], **options: Any) -> Any:
        calls.append(len(prompts))
        return SimpleNamespace(images=torch.stack([torch.full((4, 2, 2), float(g.initial_seed())) for g in options["generator"]]))  # fmt: skip  # noqa: E501

    pipeline.set_progress_bar_config = lambda **_: None  # pyright: ignore[reportFunctionMemberAccess] # of diffusers
    family.pipeline, vae_scale = pipeline, family.pipeline.vae_scale_factor
    pipeline.vae_scale_factor = vae_scale  # pyright: ignore[reportFunctionMemberAccess] # of diffusers
    family.decode = lambda latent: float(latent.mean())
    assert family.draw(["a", "b", "c"], [5, 6, 7], side=768) == [5, 6, 7]
    assert family.draw(["a", "b", "c"], [5, 6, 7], side=384) == [5, 6, 7]
    assert calls == [1, 1, 1, 3]


def test_pictures_are_drawn_by_the_forward_process_that_is_trained() -> None:
    family = families.StableDiffusion(tiny.sd1(), torch.device("cpu"), torch.float32)
    before, schedule = family.pipeline.scheduler, family.schedule
    family.follow(schedule)
    assert family.pipeline.scheduler is before
    family.follow(Schedule("v_prediction", schedule.alphas))
    assert (family.schedule.prediction, family.pipeline.scheduler.config.prediction_type) == ("v_prediction",) * 2
    family.follow(family.schedule.with_zero_terminal_snr())
    sampler = family.pipeline.scheduler
    assert isinstance(sampler, DDIMScheduler)
    assert sampler.config["timestep_spacing"] == "trailing"
    assert family.schedule.alphas is not None
    assert (sampler.alphas_cumprod - family.schedule.alphas).abs().max() < 1e-5


def test_pictures_that_are_trained_are_not_held_out_too(folder: Path, tmp_path: Path) -> None:
    held = tmp_path / "held"
    held.mkdir()
    (held / "another.png").write_bytes((folder / "cat.png").read_bytes())
    (held / "another.txt").write_text("a cat")
    with pytest.raises(DataError, match=r"1 of its pictures are among those of .*\(another.png\)"):
        pictures(TrainConfig.of(settings(folder, held_out=held)))


def test_prompts_are_read_however_an_editor_saved_them(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_bytes(b"\xef\xbb\xbfa fox\r\n\n a caf\xe9 \n")
    found = Evidence.wanted(SimpleNamespace(prompts=tmp_path / "prompts.txt", spelled=str))  # pyright: ignore[reportArgumentType] # all that it reads
    assert found == ["a fox", "a caf\ufffd"]


# --- going on


def test_a_mean_that_is_gone_on_with_is_where_its_parameters_are() -> None:
    learnt = Averages(0.9, [nn.Parameter(torch.ones(2))], torch.optim.AdamW([nn.Parameter(torch.ones(1))]))
    told = learnt.states()["ema"].state_dict()
    elsewhere = [nn.Parameter(torch.ones(2, device="meta"))]  # as on a GPU, where a checkpoint is read on the CPU
    again = Averages(0.9, elsewhere, torch.optim.AdamW(elsewhere))
    again.states()["ema"].load_state_dict(told)
    assert [mean.device.type for mean in again.ema.shadow_params] == ["meta"]
    again.step()


def test_only_unfinished_files_of_runs_are_removed(tmp_path: Path) -> None:
    names = ("checkpoints/.a.safetensors.0a.tmp", "cache/ab/.b.safetensors.1b.tmp", ".status.json.2c.tmp")
    others = (".vim.tmp", "letters/.mine.safetensors.0a.tmp", "letters/deep/.x.1.tmp", "a.0a.tmp")
    for name in (*names, *others):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    loop._tidy(tmp_path)
    assert not any((tmp_path / name).exists() for name in names)
    assert all((tmp_path / name).exists() for name in others)


@pytest.mark.skipif(sys.platform == "win32", reason="files are not locked there")
def test_what_another_process_is_writing_is_not_removed(tmp_path: Path) -> None:
    with atomically(tmp_path / "status.json") as file:
        file.write(b"{}")
        loop._tidy(tmp_path)
    assert (tmp_path / "status.json").read_bytes() == b"{}"


def test_processes_that_find_the_same_torn_checkpoint_all_pass_it_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {"a": torch.ones(2)}
    for step in (1, 2):
        checkpoint.save(tmp_path, step, tensors, {}, {})
    torn = tmp_path / "step-0000002.safetensors"
    torn.write_bytes(torn.read_bytes()[:-2])

    def first(self: Path, target: Path) -> Path:
        renamed(self, target)  # by another process, a moment before
        return renamed(self, target)

    renamed = Path.rename
    monkeypatch.setattr(Path, "rename", first)
    assert checkpoint.resume(tmp_path, tensors, {}, {}) == 1


def test_moving_class_pictures_does_not_make_it_another_run() -> None:
    given = {"folder": "x", "preservation": "classic", "class_prompt": "a man"}
    here, there = (DreamBoothConfig.of({**given, "class_folder": name}) for name in ("here", "there"))
    assert here.identity({}) == there.identity({})


# --- the second wave


@pytest.mark.parametrize(("kind", "more"), [("dropout", ["--checkpointing"]), ("module-dropout", [])])
def test_dropout_is_in_the_steps_and_nowhere_else(
    folder: Path, tmp_path: Path, run: Program, quick: Any, monkeypatch: pytest.MonkeyPatch, kind: str, more: list[str]
) -> None:
    modes: dict[str, set[bool]] = {"learn": set(), "look": set(), "finish": set()}

    def watched(name: str, owner: Any, attribute: str) -> None:
        plainly = getattr(owner, attribute)

        def call(*args: Any, **options: Any) -> Any:
            modes[name] |= {slot.training for _, _, slot in live.slots(quick)}
            return plainly(*args, **options)

        monkeypatch.setattr(owner, attribute, call)

    watched("learn", loop.Run, "learn")
    watched("look", Evidence, "measure")
    watched("finish", probe, "take")
    arguments = [
        "--steps",
        "2",
        "--batch-size",
        "2",
        "--targets",
        "transformer",
        "--log-with",
        "--no-report",
        "--rank",
        "2",
    ]
    arguments += ["--cache", str(tmp_path / "cache"), "--learning-rate", "0.01", "--warmup-steps", "0", *more]
    losses = list[list[float]]()
    for share in ("0.0", "0.5"):
        out = tmp_path / share
        run("style", [str(folder), "--output", str(out), *arguments, f"--{kind}", share])
        losses.append([json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()])
        assert modes == {"learn": {share == "0.5"}, "look": {False}, "finish": {False}}
        modes |= {name: set() for name in modes}
    assert losses[0][1] != losses[1][1]


def test_times_are_shifted_by_the_size_of_what_is_trained(folder: Path) -> None:
    family = families.Flux(tiny.flux(), torch.device("cpu"), torch.float32)
    made = objective.of(
        TrainConfig.of({"folder": folder}), family.schedule, family.sampling(64, 64), lambda h, w: 1.0 + h * w / 8
    )
    small, large = (made.ask(torch.zeros(2, 4, side, side), 0, 0, range(2), 4).times for side in (2, 8))
    plain = made.times(0, 0, 4)[:2]
    u = noise.stratified(0, 0, 4)[:2].double()
    for times, shift in ((small, 1.5), (large, 9.0), (plain, made.sampling.shift)):
        x = torch.special.expit(math.sqrt(2) * torch.erfinv(2 * u - 1))
        assert torch.allclose(times.double(), 1000 * shift * x / (1 + (shift - 1) * x), rtol=1e-5)
    fixed = objective.of(TrainConfig.of({"folder": folder, "shift": 2}), family.schedule, Sampling(), lambda h, w: 9.0)
    assert fixed.shift is None
    assert fixed.sampling.shift == 2


def test_a_mask_that_no_picture_has_is_an_error_and_masks_that_are_not_used_are_told(
    folder: Path, quick: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match=r"no picture in .* has transparent pixels"):
        pictures(TrainConfig.of(settings(folder, mask="alpha")))
    with pytest.raises(ConfigError, match=r"no picture in .* has one: fox-mask.png beside fox.png"):
        pictures(TrainConfig.of(settings(folder, mask="file")))
    Image.new("L", (64, 64), 255).save(folder / "ant-mask.png")
    Job(TrainConfig.of(settings(folder, resolution=[128])))
    said = capsys.readouterr().out
    assert "the masks of 1 pictures are not used; --mask file does" in said
    assert "5 pictures are enlarged, up to 2.00 times" in said


@pytest.mark.parametrize("name", ["../up", "kohya", "words", "a/b", ""])
def test_exports_are_files_of_their_own_in_the_output(folder: Path, quick: Any, name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be in a file's name"):
        Job(TrainConfig.of(settings(folder, exports={name: "*"})))


@pytest.mark.parametrize("content", ["a fox".encode("utf-16-le"), b"a \x00"])
def test_a_caption_with_what_is_no_text_is_named(folder: Path, content: bytes) -> None:
    (folder / "ant.txt").write_bytes(content)
    with pytest.raises(DataError, match=r"ant.txt: .* characters that are no text; is it UTF-16"):
        pictures(TrainConfig.of(settings(folder)))
    (folder / "ant.txt").unlink()
    rows = [json.dumps({"file_name": p.name, "text": "a \ud800"}) for p in sorted(folder.glob("*.png"))]
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    with pytest.raises(DataError, match="characters that are no text"):
        pictures(TrainConfig.of(settings(folder)))


@pytest.mark.parametrize("given", [{"batch_size": "x"}, {"trigger": 5}, {"folder": 5}])
def test_what_a_plan_is_made_of_is_checked_first(folder: Path, given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"'{next(iter(given))}' is "):
        plan.of({"folder": folder, **given})


def test_a_mask_that_the_crop_leaves_nothing_of_is_an_error(tmp_path: Path) -> None:
    Image.effect_mandelbrot((300, 100), (-2, -1.5, 1, 1.5), 60).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a")
    mask = Image.new("L", (300, 100))
    mask.paste(255, (0, 0, 40, 100))
    mask.save(tmp_path / "a-mask.png")
    (view,) = buckets.views(data.scan(tmp_path), [64], 8, square=True)
    with pytest.raises(DataError, match=r"a.png: cropped to 64 x 64, nothing is left of its mask.*--crop pad"):
        framing.frame(view, framing.Options(use_mask="file"))
    padded = framing.frame(view, framing.Options("pad", use_mask="file")).mask
    assert padded is not None
    assert padded.sum() > 0


def test_kohyas_folder_names_are_captions_for_subjects_and_words_too(folder: Path, tmp_path: Path) -> None:
    inside = tmp_path / "set" / "3_red fox"
    inside.mkdir(parents=True)
    shutil.copy(folder / "ant.png", inside / "ant.png")
    asked = DreamBoothConfig.of({"folder": tmp_path / "set", "trigger": "ohwx", "class_prompt": "a fox"})
    assert subject.with_caption(asked).caption is None
    examples, _ = pictures(subject.with_caption(asked))
    assert [(e.captions, e.repeats) for e in examples] == [(("ohwx, red fox",), 3)]
    word = words.settled(InversionConfig.of({"folder": tmp_path / "set", "word": "<w>"}))
    assert (word.caption, word.trigger) == (None, "<w>")
    assert subject.with_caption(asked.model_copy(update={"folder": folder})).caption == "ohwx fox"


def test_an_evaluation_without_memory_is_left_out_and_said(
    quick: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = TrainConfig.of({"folder": folder, "output": tmp_path / "o", "targets": ["attn2.to_q"], "log_with": []})
    made = Job(config)
    monkeypatch.setattr(made.evidence, "look", _no_memory)
    made._look(7)
    assert "out of memory in the evaluation after step 7: it is left out (CUDA out of memory" in capsys.readouterr().out


def _no_memory(done: int) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")  # pyright: ignore[reportPrivateImportUsage]


def test_a_plan_is_one_that_its_program_takes(folder: Path) -> None:
    word = plan.of({"folder": folder, "word": "<w>"})
    assert (word.kind, words.settled(word.config).trigger) == ("concept", "<w>")  # pyright: ignore[reportArgumentType] # a concept's
    assert "rank" not in word.why
    assert (
        plan.of({"folder": folder, "word": "<w>", "adapter": True}).why["rank"]
        == "usual for a concept on the embedded base"
    )
    with pytest.raises(ConfigError, match="a subject needs a word of its own: --trigger ohwx"):
        plan.of({"folder": folder}, "character")
    with pytest.raises(ConfigError, match=r"'word' is not given: --word"):
        plan.of({"folder": folder}, "concept")
    with pytest.raises(ConfigError, match=r"'class_prompt' is for another kind of training: --kind character"):
        plan.of({"folder": folder, "class_prompt": "a man"}, "style")


def test_rates_of_methods_follow_what_was_measured_those_of_text_encoders_too(folder: Path) -> None:
    for method in (LoRA, LoKr, Full):
        plain = plan.of({"folder": folder, "method": method.name})
        assert plain.config.learning_rate == pytest.approx(2e-3 * method.rate_over_lora)
        asked = {"folder": folder, "method": method.name, "base": "sd1", "trigger": "ohwx"}
        config = plan.of(asked, "character").config
        assert config.learning_rate == pytest.approx(1e-4 * method.rate_over_lora)
        assert config.learning_rates == {"text_encoder*": pytest.approx(5e-5 * method.rate_over_lora, rel=1e-2)}
    norms = plan.of({"folder": folder, "method": "norm"})
    assert (norms.config.targets, norms.why["targets"]) == (["norm*"], "the layers that it is for")
    assert "times 0.15 for full" in plan.of({"folder": folder, "method": "full"}).why["learning_rate"]


@pytest.mark.parametrize(
    ("flag", "hint"),
    [("--lr", "here it is --learning-rate"), ("--network_dim", "here it is --rank"), ("--resume", "goes on by itself"),
     ("--lerning-rate", "did you mean --learning-rate"), ("--gradient-checkpointing", "here it is --checkpointing"),
     ("--zzzz", "--help lists them all")],
)  # fmt: skip
def test_flags_of_other_trainers_are_translated(flag: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        flags.parser("", TrainConfig).parse_args(["x", flag, "1"])
    assert hint in capsys.readouterr().err
