"""`imgadapt check`: bases without weights, memory and what to change, time, disk, and what is said of a folder."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from imgadapt.errors import ConfigError, DataError, TrainingError
from imgadapt.training import families, fit, ladder, memory, outlay, trial
from imgadapt.training.buckets import View
from imgadapt.training.config import DreamBoothConfig, InversionConfig, TrainConfig
from imgadapt.training.data import Example, scan
from imgadapt.training.families import Family, hub
from imgadapt.training.families.sketch import sketch, tokenizer_of
from imgadapt.training.swap import repeated
from tests import tiny

MIB = 2**20
PARAMETERS = {  # of the denoisers, as their model cards say
    "sd1": 859_520_964, "sd2": 865_910_724, "sdxl": 2_567_463_684, "sd3": 2_028_328_000, "sd35_medium": 2_243_171_520,
    "sd35_large": 8_056_627_520, "flux": 11_901_408_320, "flux-schnell": 11_891_178_560,
}  # fmt: skip


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base in diffusers format: 16 x 16 pixels, 77 tokens of a letter each."""
    return _saved(tmp_path_factory, "sd1")


def _saved(factory: pytest.TempPathFactory, name: str) -> Path:
    torch.manual_seed(0)
    folder = factory.mktemp("base") / name
    tiny.PIPELINES[name]().save_pretrained(folder)
    return folder


def _config(folder: Path, base: Path | str, kind: type[TrainConfig] = TrainConfig, **settings: Any) -> TrainConfig:
    return kind.of({"folder": folder, "base": str(base), "rank": 4, "batch_size": 8, **settings})


def _of(config: TrainConfig) -> Family:
    return sketch(config.base)


def _bytes(*modules: torch.nn.Module) -> int:
    return sum(tensor.nbytes for module in modules for tensor in (*module.parameters(), *module.buffers()))


# --- sketches


@pytest.mark.parametrize("name", list(hub.NAMES))
def test_every_name_is_sketched_without_weights_and_without_the_hub(name: str) -> None:
    before = memory.resident()
    made = sketch(name, torch.bfloat16)
    parts = [made.denoiser, made.vae, *made.encoders.values()]
    assert sum(p.numel() for p in made.denoiser.parameters()) == PARAMETERS[name]
    assert all(t.is_meta for part in parts for t in (*part.parameters(), *part.buffers()))
    assert {p.dtype for p in made.denoiser.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in made.vae.parameters()} == {torch.float32}
    assert memory.resident() - before < 150 * MIB
    assert tokenizer_of(made) is None or made.pipeline.tokenizer is not None


@pytest.mark.parametrize("name", list(tiny.PIPELINES))
def test_a_sketch_is_the_base_itself_but_for_its_numbers(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = _saved(tmp_path_factory, name)
    made, real = sketch(str(folder)), families.load(str(folder))
    assert {n: p.shape for n, p in made.denoiser.named_parameters()} == {
        n: p.shape for n, p in real.denoiser.named_parameters()
    }
    assert (made.native, made.step, made.latent_shape) == (real.native, real.step, real.latent_shape)
    assert made.schedule.prediction == real.schedule.prediction
    said = {key: tuple(value.shape[1:]) for key, value in real.text(["a fox"]).items()}
    assert dict(made.text_shapes) == said
    counted = tokenizer_of(made)
    assert counted is not None
    count, limit = counted
    assert limit == {"sd3": 256, "flux": 512}.get(name, 77)  # T5's, where there is one
    assert count("a fox") == {"sd3": 7, "flux": 7}.get(name, 6)


def test_fp16_keeps_what_t5_must_not_have_in_it(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = _saved(tmp_path_factory, "flux")
    made, real = sketch(str(folder), torch.float16), families.load(str(folder), dtype=torch.float16)
    for name, encoder in real.encoders.items():
        assert {n: p.dtype for n, p in encoder.named_parameters()} == {
            n: p.dtype for n, p in made.encoders[name].named_parameters()
        }


def test_what_cannot_be_sketched_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="base owner/nothing is not on this machine; bring it with: hf download"):
        sketch("owner/nothing")
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxFillPipeline"}')
    with pytest.raises(ConfigError, match="FluxFillPipeline, for inpainting"):
        sketch(str(tmp_path))
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline", "vae": ["diffusers", "AutoencoderKL"]}')
    with pytest.raises(ConfigError, match=r"is not whole: .*vae/config.json"):
        sketch(str(tmp_path))


# --- memory


def test_settings_that_save_memory_do_so_in_the_prediction(folder: Path, base: Path) -> None:
    config = _config(folder, base)
    whole = fit.predicted(config, _of(config), (16, 16))
    numbers = whole.adapter // 4
    assert whole.optimizer == 8 * numbers
    family = _of(config)
    assert whole.weights == _bytes(family.denoiser, family.vae, *family.encoders.values())
    pieces = fit.predicted(config.model_copy(update={"pieces": 8}), _of(config), (16, 16))
    assert pieces.activations < whole.activations / 3
    averaged = config.model_copy(update={"ema": 0.9, "checkpointing": True})
    frugal = fit.predicted(averaged, _of(config), (16, 16))
    assert frugal.ema == 4 * numbers
    assert frugal.activations < whole.activations
    assert fit.predicted(config, _of(config), (32, 16)).activations > 1.8 * whole.activations
    on_gpu = fit.predicted(config, _of(config), (16, 16), device="cuda")
    assert on_gpu.weights == _bytes(family.denoiser)


def test_a_trained_text_encoder_keeps_its_activations(folder: Path, base: Path) -> None:
    alone = _config(folder, base)
    both = _config(folder, base, targets=["transformer", "text"])
    assert not fit.learns_text(alone, _of(alone))
    assert fit.learns_text(both, _of(both))
    least = 8 * 77 * tiny.CLIP * 4  # of the inputs of its 12 layers, fp32
    gap = fit.predicted(both, _of(both), (16, 16)).activations - fit.predicted(alone, _of(alone), (16, 16)).activations
    assert gap > 12 * least
    gpu = fit.predicted(both, _of(both), (16, 16), device="cuda")
    assert gpu.weights == _bytes(_of(both).denoiser, *_of(both).encoders.values())


def test_preservation_has_two_graphs_at_once(folder: Path, base: Path) -> None:
    plain = _config(folder, base, DreamBoothConfig, trigger="ohwx", preservation="none")
    one = fit.predicted(plain, _of(plain), (16, 16)).activations
    for kind in ("class-free", "classic"):
        kept = plain.model_copy(update={"preservation": kind})
        assert 1.8 * one < fit.predicted(kept, _of(kept), (16, 16)).activations < 2.2 * one


def test_a_word_is_trained_without_an_adapter(folder: Path, base: Path) -> None:
    config = _config(folder, base, InversionConfig, word="<ohwx>", vectors=3)
    family = _of(config)
    made = fit.predicted(config, family, (16, 16))
    assert made.adapter == 4 * 3 * tiny.CLIP
    assert made.activations > 0
    assert not family.denoiser.training
    assert not family.encoders["text_encoder"].get_input_embeddings()._forward_hooks  # pyright: ignore[reportCallIssue]


def test_what_goes_on_beside_the_steps_is_counted(folder: Path, base: Path) -> None:
    config = _config(folder, base, sample_prompts=["a fox"])
    step = fit.predicted(config, _of(config), (16, 16))
    found = fit.beside(config, _of(config), (16, 16), step)
    fixed = step.weights + step.adapter + step.optimizer
    assert set(found) == {"when pictures become latents", "when losses are watched", "when samples are drawn"}
    assert all(peak > fixed for peak in found.values())
    stored = config.model_copy(update={"quantise": "nf4"})
    step = fit.predicted(stored, _of(stored), (16, 16))
    family = _of(stored)
    whole = _bytes(family.denoiser, family.vae, *family.encoders.values())
    buffers = sum(t.nbytes for m in family.encoders.values() for t in m.buffers())
    assert fit.beside(stored, family, (16, 16), step)["when the base is read"] == whole - buffers


# --- the ladder


def _formula(config: TrainConfig) -> int:
    """Bytes of a made-up base."""
    return _fixed(config) + _graph(config)


def _fixed(config: TrainConfig) -> int:
    element = {None: 4 if config.precision == "fp32" else 2, "int8": 1, "nf4": 0.5}[config.quantise]
    return int(1000 * element + (config.rank or 0) * (4 + (2 if config.optimizer == "adamw8bit" else 8)))


def _graph(config: TrainConfig) -> int:
    side = max(config.resolution or [64])
    kept = 0.25 if config.checkpointing else 1
    return int(fit.micro_batch(config) * 400 * (side / 64) ** 2 * kept * (1 if config.precision == "fp32" else 0.5))


def _flags(room: int, **settings: Any) -> list[str]:
    config = _config(Path("x"), "demo", rank=16, **settings)
    changes = ladder.ladder(config, room, _formula, _fixed, sides=(48, 32))
    named = config.model_copy(update={k: v for change in changes for k, v in change.settings.items()})
    assert changes[-1].peak == _formula(named)
    return [change.flags for change in changes]


def test_the_ladder_goes_from_what_changes_nothing_to_what_costs_most() -> None:
    rooms = {  # whole: 7392
        7000: ["--pieces 2"],
        5600: ["--pieces 4"],
        4900: ["--pieces 4", "--checkpointing"],
        4700: ["--pieces 8", "--checkpointing", "--optimizer adamw8bit"],
        2600: ["--pieces 3", "--checkpointing", "--precision bf16"],
        1400: ["--pieces 8", "--checkpointing", "--optimizer adamw8bit", "--quantise int8"],
        900: ["--pieces 8", "--checkpointing", "--quantise nf4"],
    }
    for room, wanted in rooms.items():
        assert _flags(room) == wanted, room


def test_the_ladder_s_last_rungs_are_fewer_pixels_and_a_lower_rank() -> None:
    most = ["--pieces 8", "--checkpointing", "--optimizer adamw8bit", "--precision bf16", "--quantise nf4"]
    assert _flags(690) == [*most, "--resolution 48"]
    assert _flags(590, alpha=8.0) == [*most, "--resolution 32", "--rank 4 --alpha 2.0"]
    # with a lower rank, fewer pixels are needless, and so is an optimiser of 8 bits
    assert _flags(660, alpha=8.0) == [m for m in most if "optimizer" not in m] + ["--rank 4 --alpha 2.0"]


def test_on_a_gpu_blocks_wait_in_ram_before_the_base_is_quantised() -> None:
    def fixed(config: TrainConfig) -> int:
        return _fixed(config) - (800 if config.swap_blocks else 0)

    def whole(config: TrainConfig) -> int:
        return fixed(config) + _graph(config)

    config = _config(Path("x"), "demo", rank=16, precision="bf16", batch_size=1)
    flags = {room: [c.flags for c in ladder.ladder(config, room, whole, fixed, blocks=7)] for room in (1700, 1150)}
    assert flags[1700] == ["--swap-blocks 7 --checkpointing"]
    assert flags[1150] == ["--quantise nf4 --swap-blocks 0 --checkpointing"]  # the two do not go together


def test_a_gpu_has_less_of_a_base_whose_blocks_wait_and_a_cpu_has_not(folder: Path) -> None:
    family = sketch("demo")
    plain, swapped = (
        _config(folder, "demo", checkpointing=True, swap_blocks=count, targets=["attn2.to_q"]) for count in (0, 16)
    )
    at = {
        (name, device): fit.predicted(config, family, (64, 64), device=device, bare=True).weights
        for name, config in (("plain", plain), ("swapped", swapped))
        for device in ("cpu", "cuda")
    }
    blocks = repeated(family.denoiser)
    sizes = [sum(4 * p.numel() for p in block.parameters()) for block in blocks]
    assert len(blocks) == 16
    assert at["plain", "cpu"] == at["swapped", "cpu"]
    assert at["plain", "cuda"] - at["swapped", "cuda"] == sum(sizes) - max(sizes)


def test_the_ladder_says_what_is_needed_where_nothing_is_enough() -> None:
    config = _config(Path("x"), "demo", rank=16)
    changes = ladder.ladder(config, 100, _formula, _fixed)
    assert changes[-1].peak == 574
    assert not ladder.fits(changes[-1].peak, 100)


@pytest.mark.slow
def test_what_the_ladder_finds_fits_when_it_is_predicted_anew(folder: Path, base: Path) -> None:
    predictor = fit.Predictor(scan(folder))
    config = _config(folder, base, caption_dropout=0.0)
    peak = predictor.peak(config)
    room = int(peak * 0.6)
    changes = ladder.ladder(config, room, predictor.peak, predictor.floor, sides=[12, 8])
    named = config.model_copy(update={k: v for change in changes for k, v in change.settings.items()})
    assert changes
    assert changes[-1].peak == fit.Predictor(scan(folder)).peak(named) <= room / (1 + memory.RESERVE)


# --- time and disk


def _view(repeats: int = 1, size: tuple[int, int] = (64, 64)) -> View:
    return View(Example(Path(f"{repeats}.png"), (f"a {repeats}",), f"{repeats:064x}", 64, 64, repeats=repeats), size)


def test_time_is_the_sum_of_what_was_tried() -> None:
    config = _config(
        Path("x"), "demo", steps=100, batch_size=4, evaluate_every=30, sample_prompts=["a", "b"],
        strengths=[0.5, 1.0], caption_dropout=0.0, flip=True,
    )  # fmt: skip
    tried = trial.Trial("CPU", None, picture=2.0, caption=1.0, step=3.0, look=0.5)
    views = [_view(1), _view(3, (32, 64))]  # 5/8 of the largest bucket's pixels on average
    made = outlay.durations(config, sketch("demo"), tried, views, 2, live=False)
    assert made["steps"] == pytest.approx(100 * 3 * 0.625)
    assert made["latents and text states"] == pytest.approx(2 * 2 * 2.0 * 0.625 + 2)
    assert made["losses that are watched"] == pytest.approx(5 * 8 * 4 * 0.5 * 0.625)
    assert made["samples and report"] == pytest.approx((2 * 2 + 2 * (1 + 4 * 2)) * (40 * 0.5 + 2))
    assert outlay.durations(config, sketch("flux"), tried, views, 2, live=True)["samples and report"] == 22 * 12.0


def test_class_free_preservation_is_in_a_share_of_the_steps() -> None:
    config = _config(Path("x"), "demo", DreamBoothConfig, steps=10, batch_size=2, preservation_share=0.25)
    tried = trial.Trial("CPU", None, picture=0, caption=0, step=7.0, look=0.5)
    made = outlay.durations(config, sketch("demo"), tried, [_view()], 0, live=False)
    assert made["steps"] == pytest.approx(10 * (0.25 * 7 + 0.75 * 3))


def test_disk_is_what_files_come_to(folder: Path, base: Path, tmp_path: Path) -> None:
    config = _config(folder, base, output=tmp_path / "a" / "b", steps=100, caption_dropout=0.0, flip=True)
    family, views = _of(config), fit.bucketed(config, _of(config), scan(folder))
    step = fit.predicted(config, family, (16, 16))
    (disk,) = outlay.disks(config, family, views, step, live=False)
    assert disk.free > 0
    assert disk.needed["latents"] == 2 * (4 * 4 * sum(v.size[0] * v.size[1] // 4 for v in views) + 5 * 500)
    assert disk.needed["text states"] == 5 * (77 * tiny.CLIP * 4 + 500)
    assert disk.needed["checkpoints"] == 3 * 3 * step.adapter
    assert disk.needed["snapshots"] == 2 * step.adapter
    first, second = outlay.disks(config.model_copy(update={"cache": tmp_path / "c"}), family, views, step, live=True)
    assert set(second.needed) == {"latents"}
    assert first.total + second.total == disk.total - disk.needed["text states"]


# --- the program


Check = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def check(
    run: Callable[[str, Sequence[str]], None], base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Check:
    """(exit status, its JSON) of a check without a real step."""

    def call(folder: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
        status = 0
        common = ["--base", str(base), "--output", str(tmp_path / "out"), "--no-step", "--json"]
        try:
            run("check", [str(folder), *common, *arguments])
        except SystemExit as end:
            status = int(end.code or 0)
        return status, json.loads(capsys.readouterr().out)

    return call


def _said(found: dict[str, Any], level: str) -> str:
    return "\n".join(row["text"] for row in found["findings"] if row["level"] == level)


def test_a_good_folder_is_ready(check: Check, folder: Path, tmp_path: Path) -> None:
    status, found = check(folder, "--batch-size", "2", "--steps", "40")
    assert (status, found["faults"]) == (0, [])
    assert found["pictures"] == 5
    assert found["tokens"] == {"least": 6, "most": 6, "read": 77}
    assert sum(bucket["pictures"] for bucket in found["buckets"]) == 5
    assert found["memory"]["fits"]
    assert found["memory"]["available"] > found["memory"]["predicted"] > 200 * MIB
    assert found["memory"]["measured"] is found["step"] is None
    assert (found["untried"], found["seconds"]) == ("--no-step", {})
    with Image.open(found["crops"]) as sheet:
        assert sheet.width > 500
    assert found["crops"] == str(tmp_path / "out" / "check" / "crops.png")
    assert not (tmp_path / "out" / "cache").exists()


def _picture(folder: Path, name: str, caption: str | None = "a fox", size: tuple[int, int] = (64, 64)) -> None:
    Image.effect_mandelbrot(size, (-1, -1, 0.5 + len(name) / 9, 1), 50).save(folder / name)
    if caption is not None:
        (folder / name).with_suffix(".txt").write_text(caption)


def test_what_is_odd_is_said(check: Check, folder: Path) -> None:
    (folder / "copy.png").write_bytes((folder / "ant.png").read_bytes())
    (folder / "copy.txt").write_text("a copy")
    (folder / "lost.txt").write_text("of no picture")
    (folder / "notes.md").write_text("of no use")
    (folder / "more").mkdir()
    (folder / "more" / "photo.png").write_bytes((folder / "bee.png").read_bytes())
    _picture(folder, "small.png", size=(10, 10))
    _picture(folder, "long.png", size=(256, 32))
    _picture(folder, "wordy.png", "a fox, " + "and another fox, " * 20)
    status, found = check(folder)
    assert (status, found["faults"]) == (0, [])  # odd, but nothing stops a run
    warned = _said(found, "warning")
    for text in (
        "2 pictures are the same file", "1 pictures are below 16x16 and would be enlarged, small.png",
        "long.png (256x32)", "1 captions are longer than the 77 tokens that the model reads; of wordy.png",
        "1 caption files belong to no picture", "lost.txt", "1 pictures are not part of it", "more/photo.png",
    ):  # fmt: skip
        assert text in warned, warned
    assert "1 files are not used: notes.md" in _said(found, "note")


def test_a_trigger_that_is_cut_off_is_an_error(check: Check, folder: Path) -> None:
    _picture(folder, "wordy.png", "and another fox, " * 10 + "ohwx")
    status, found = check(folder, "--trigger", "ohwx", "--kind", "style")
    assert status == 1
    assert found["faults"] == ["in 1 captions the trigger 'ohwx' is among what is cut; put it first"]


def test_what_cannot_be_read_ends_it(check: Check, folder: Path) -> None:
    (folder / "photo.heic").write_bytes(b"of a phone")
    status, found = check(folder)
    assert status == 1
    assert "photo.heic" in found["faults"][0]
    (folder / "photo.heic").unlink()
    (folder / "bee.png").write_bytes(b"\x89PNG not at all")
    status, found = check(folder)
    assert status == 1
    assert "1 of 5 pictures cannot be read; mend or remove bee.png" in found["faults"][0]


def test_a_picture_without_caption_is_an_error_that_names_it(
    run: Callable[[str, Sequence[str]], None], folder: Path, base: Path
) -> None:
    (folder / "cat.txt").unlink()
    with pytest.raises(DataError, match=r"1 of 5 pictures have no caption \(cat.png\)"):
        run("check", [str(folder), "--base", str(base), "--no-step"])


def test_what_does_not_fit_is_an_error_with_a_remedy(
    run: Callable[[str, Sequence[str]], None], folder: Path, base: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    config = _config(folder, base, rank=8)
    one = fit.Predictor(scan(folder)).peak(config.model_copy(update={"batch_size": 20}))
    monkeypatch.setattr(memory, "process", lambda: 0)
    monkeypatch.setattr(ladder, "available", lambda _: one)
    with pytest.raises(SystemExit) as end:
        run("check", [str(folder), "--base", str(base), "--output", str(tmp_path / "out"), "--batch-size", "64",
                      "--method", "lora", "--rank", "8", "--report"])  # fmt: skip
    said = capsys.readouterr().out
    assert end.value.code == 1
    assert "it does not fit; change" in said
    assert "--pieces" in said
    assert "not known, no real step was tried: it would not fit" in said
    assert "not ready: it does not fit into memory; add --pieces" in said


def test_a_full_disk_is_an_error(check: Check, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(outlay.shutil, "disk_usage", lambda _: usage)
    status, found = check(folder)
    assert status == 1
    assert "there is no space for it on the disk of" in found["faults"][0]


def test_a_base_that_is_not_here_is_planned_and_the_command_that_brings_it_is_said(
    run: Callable[[str, Sequence[str]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    from imgadapt.training import preflight

    said = preflight._untried(_config(Path("x"), "sdxl"), step=True, fits=True)
    assert "hf download stabilityai/stable-diffusion-xl-base-1.0" in said


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (1, "a real step was tried, and failed: no layer matches"),
        (-9, "a real step was tried, and failed: it was killed, as systems do when memory is out"),
    ],
)
def test_a_step_that_fails_says_why(status: int, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    done = subprocess.CompletedProcess([], status, "", "a warning\nno layer matches\n")
    monkeypatch.setattr(trial.subprocess, "run", lambda *_, **__: done)
    with pytest.raises(TrainingError, match=said):
        trial.run(_config(Path("x"), "demo"), _view())


def test_a_step_is_tried_in_every_kind_of_training(folder: Path, base: Path) -> None:
    views = fit.bucketed(_config(folder, base), _of(_config(folder, base)), scan(folder))
    for config in (
        _config(folder, base, targets=["transformer", "text"], ema=0.9, pieces=3),
        _config(folder, base, DreamBoothConfig, trigger="ohwx", checkpointing=True),
        _config(folder, base, InversionConfig, word="<ohwx>", precision="bf16"),
    ):
        made = trial.measure(config, views[0])
        assert made.device == f"CPU, {torch.get_num_threads()} threads"
        assert made.peak is None or made.peak > 100 * MIB
        assert min(made.picture, made.caption, made.step, made.look) > 0
        assert made.look * 8 < made.step


def test_a_base_that_gives_nan_is_found_out(folder: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = _config(folder, base)
    view = fit.bucketed(config, _of(config), scan(folder))[0]
    monkeypatch.setattr(fit, "loss", lambda *_: torch.full((), torch.nan, requires_grad=True))
    with pytest.raises(TrainingError, match="the loss is not finite in fp32"):
        trial.measure(config, view)


def test_the_embedded_base_takes_what_was_predicted(folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "imgadapt", "check", str(folder), "--output", str(tmp_path / "out"), "--json",
               "--batch-size", "8", "--steps", "100"]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    took, said = found["memory"]["measured"], found["memory"]["predicted"]
    assert abs(took / said - 1) < 0.15
    assert 85 < found["seconds"]["steps"] / found["step"]["step"] <= 100  # some buckets are smaller
    assert "trying real steps" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("name", "weights"), [("sdxl", 7_107_000_000), ("flux", 33_906_000_000)])
def test_jobs_of_full_size_are_planned_without_their_weights(name: str, weights: int, folder: Path) -> None:
    config = _config(folder, name, precision="bf16", checkpointing=True, batch_size=1, rank=16)
    before = memory.resident()
    made = fit.Predictor(scan(folder)).need(config)
    assert made.step.weights == pytest.approx(weights, rel=0.01)
    assert 0.3e9 < made.step.activations < 5e9
    assert memory.resident("VmHWM") - before < 1e9
