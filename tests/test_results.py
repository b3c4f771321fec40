"""What a training leaves: files that other tools load to the same effect, proved, and what they say of themselves."""

import copy
import json
import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from imgadapt import LoRA, __version__, attach, collect, demo, detach, load, save
from imgadapt.errors import ConfigError, DataError, TrainingError
from imgadapt.tensors import read_tensors
from imgadapt.training import families, probe, results

Run = Callable[[str, Sequence[str]], None]
QUICK = (
    *("--steps", "3", "--batch-size", "3", "--learning-rate", "0.02", "--warmup-steps", "0", "--schedule", "constant"),
    *("--targets", "unet.down_blocks.0*attn1*", "--log-with", "--no-report", "--max-grad-norm", "100"),
)


def predicted(unet: Any) -> Tensor:
    """(2, 16, 12, 10), of a prediction that is not square."""
    source = torch.Generator().manual_seed(1)
    x = torch.randn(2, unet.config.in_channels, 12, 10, generator=source)
    states = torch.randn(2, 20, unet.config.cross_attention_dim, generator=source)
    with torch.no_grad():
        return unet(x, torch.tensor([100, 700]), states).sample


def adapted(pipe: Any, path: Path) -> Tensor:
    attach(pipe, load(path))
    made = predicted(pipe.unet)
    detach(pipe)
    return made


def same(theirs: Tensor, ours: Tensor, bare: Tensor) -> None:
    assert (ours - bare).abs().max() > 1e-3 * bare.abs().max()
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)


def trained(run: Run, folder: Path, out: Path, *more: str) -> Path:
    run("style", [str(folder), *QUICK, "--output", str(out), *more])
    return out / "adapter.safetensors"


def told(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata()


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_lora_and_dora_trained_here_do_the_same_in_diffusers(
    method: str, run: Run, folder: Path, tmp_path: Path, quick: Any
) -> None:
    path = trained(run, folder, tmp_path / "out", "--method", method, "--rank", "3", "--alpha", "2")
    names = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    other = {"lora": "kohya", "dora": "lycoris"}[method]
    assert names == [f"adapter.{other}.safetensors", "adapter.safetensors", "probe.safetensors"]
    bare, ours = predicted(quick.unet), adapted(quick, path)
    for name in names[:2] if method == "lora" else ["adapter.safetensors"]:  # diffusers reads no other DoRA
        theirs = demo.pipeline()
        theirs.load_lora_weights(str(tmp_path / "out" / name))
        same(predicted(theirs.unet), ours, bare)
        torch.testing.assert_close(adapted(quick, tmp_path / "out" / name), ours)


@pytest.mark.parametrize(
    "method",
    ["loha", "lokr", "lokr(factor=4)", "oft(block_size=4)", "boft(block_size=8, factors=4)", "dora(loha(rank=2))",
     "dora", "full"],
)  # fmt: skip
def test_other_methods_trained_here_do_the_same_in_lycoris(
    method: str, run: Run, folder: Path, tmp_path: Path, quick: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    lycoris: Any = pytest.importorskip("lycoris")
    path = trained(run, folder, tmp_path / "out", "--method", method)
    path = path if method != "dora" else path.with_name("adapter.lycoris.safetensors")
    assert load(path).format == "lycoris"
    bare, ours = predicted(quick.unet), adapted(quick, path)
    monkeypatch.setattr(lycoris.LycorisNetwork, "LORA_PREFIX", "lora_unet")
    unet = copy.deepcopy(quick.unet)
    network, _ = lycoris.create_lycoris_from_weights(1.0, str(path), unet)
    assert len(network.loras) == len(load(path).parts) == 8
    network.eval().apply_to()
    same(predicted(unet), ours, bare)


def test_files_of_half_the_size_are_proved_within_their_rounding(
    run: Run, folder: Path, tmp_path: Path, quick: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes: dict[str, int] = {}
    for precision in ("fp32", "fp16"):
        path = trained(run, folder, tmp_path / precision, "--rank", "3", "--save-precision", precision)
        sizes[precision] = sum(
            t.numel() * t.element_size() for p in load(path).parts.values() for t in p.tensors.values()
        )
    assert sizes["fp32"] == 2 * sizes["fp16"]
    errors = re.findall(r"read back, predictions differ by (\S+) ", capsys.readouterr().out)
    assert float(errors[0]) == 0 < float(errors[1]) < 1e-3


def test_files_of_parts_of_the_layers_and_other_formats_are_written_as_asked(
    run: Run, folder: Path, tmp_path: Path, quick: Any
) -> None:
    more = ["--targets", "unet.up_blocks.[12]*attn2.to_[qv]", "--rank", "2"]
    more += ["--exports", "content=unet.up_blocks.2*", "style=unet.up_blocks.1*", "--formats", "kohya", "imgadapt"]
    path = trained(run, folder, tmp_path / "out", *more)
    whole = load(path)
    assert (whole.format, load(path.with_name("adapter.imgadapt.safetensors")).format) == ("kohya", "imgadapt")
    parts = {name: load(path.with_name(f"adapter.{name}.safetensors")) for name in ("content", "style")}
    assert {file.format for file in parts.values()} == {"kohya"}
    assert set(parts["content"].parts) | set(parts["style"].parts) == set(whole.parts)
    assert all(name.startswith("unet.up_blocks.1") for name in parts["style"].parts)
    for file in parts.values():
        for name, part in file.parts.items():
            assert torch.equal(part.tensors["up"], whole.parts[name].tensors["up"])


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--formats", "koya"], "no format 'koya'; there are: "),
        (["--exports", "style=unet.conv_nope"], "exports: no trained layer matches 'unet.conv_nope'"),
        (["--method", "boft", "--formats", "diffusers"], "of 8 layers cannot be written as diffusers"),
    ],
)
def test_what_cannot_be_written_is_said_before_the_training(
    more: list[str], said: str, run: Run, folder: Path, tmp_path: Path, quick: Any
) -> None:
    with pytest.raises(ConfigError, match=said):
        trained(run, folder, tmp_path / "out", *more)
    assert not (tmp_path / "out" / "log.jsonl").exists()


def test_the_best_snapshot_is_that_of_the_least_held_out_loss(
    run: Run, folder: Path, tmp_path: Path, quick: Any
) -> None:
    out = tmp_path / "out"
    trained(run, folder, out, "--held-out-count", "2", "--evaluate-every", "1", "--learning-rate", "9", "--steps", "4")
    rows = [json.loads(line) for line in (out / "evaluations.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    best = min(rows, key=lambda row: row["held_out"])["step"]
    assert best < 4  # a rate that large harms
    assert (out / "best.safetensors").read_bytes() == (out / f"snapshots/step-{best:07d}.safetensors").read_bytes()
    last = load(out / "snapshots" / "step-0000004.safetensors").parts
    for name, part in load(out / "adapter.safetensors").parts.items():
        assert torch.equal(part.tensors["up"], last[name].tensors["up"])
    assert all(row["held_out_base"] == rows[0]["held_out_base"] for row in rows)


PERSONAL = ("ohwx", "elk", "pictures", "secret", "My")


def test_the_file_says_how_it_was_made_and_private_says_nothing_of_the_users(
    run: Run, folder: Path, tmp_path: Path, quick: Any
) -> None:
    words = ["--trigger", "ohwx", "--rank", "3", "--alpha", "2", "--title", "My fox", "--sample-prompts", "a secret"]
    path = trained(run, folder, tmp_path / "open", *words, "--min-snr-gamma", "5")
    said = told(path.with_name("adapter.kohya.safetensors"))
    expected = {
        "ss_network_dim": "3", "ss_network_alpha": "2", "ss_learning_rate": "0.02", "ss_max_train_steps": "3",
        "ss_min_snr_gamma": "5.0", "ss_resolution": "(64, 64)", "ss_sd_model_name": "demo", "ss_num_train_images": "5",
        "modelspec.sai_model_spec": "1.0.0", "modelspec.title": "My fox", "modelspec.trigger_phrase": "ohwx",
    }  # fmt: skip
    assert {key: said.get(key) for key in expected} == expected
    assert json.loads(said["ss_tag_frequency"])["pictures"]["ohwx"] == 5
    settings = json.loads(said["imgadapt_settings"])
    assert said["imgadapt_version"] == __version__
    assert (settings["steps"], settings["seed"], settings["method"]) == ("3", "0", '"lora"')
    text = json.dumps(said)
    assert all(word in text for word in PERSONAL if word != "secret")
    out = tmp_path / "closed"
    path = trained(run, folder, out, *words, "--private")
    for file in (path, path.with_name("adapter.kohya.safetensors")):
        assert not [word for word in PERSONAL if word in json.dumps(told(file))]
        assert told(file)["ss_max_train_steps"] == "3"


def test_a_file_that_was_tampered_with_and_one_that_changes_nothing_are_caught(
    run: Run, folder: Path, tmp_path: Path, quick: Any
) -> None:
    path = trained(run, folder, tmp_path / "out", "--rank", "2")
    family = families.StableDiffusion(quick, torch.device("cpu"), torch.float32)
    taken = probe.load(tmp_path / "out" / "probe.safetensors")
    assert results.prove(family, [path], taken) <= 1e-6
    tensors, _ = read_tensors(path)
    up = next(name for name in tensors if "up" in name or "lora_B" in name)
    for change, said in ((1.001, None), (2.0, "acts otherwise than what was trained: predictions differ by")):
        save_file({**tensors, up: tensors[up] * change}, tmp_path / "other.safetensors", told(path))
        if said:
            with pytest.raises(TrainingError, match=f"other.safetensors, read back, {said}"):
                results.prove(family, [path, tmp_path / "other.safetensors"], taken)
    zero = {name: tensor * 0 for name, tensor in tensors.items()}
    save_file(zero, tmp_path / "zero.safetensors", told(path))
    attach(quick, load(tmp_path / "zero.safetensors"))
    nothing = {**taken, "prediction": probe._predict(family, taken)}
    with pytest.raises(TrainingError, match=r"zero.safetensors changes nothing: the base alone predicts the same"):
        results.prove(family, [tmp_path / "zero.safetensors"], nothing)
    with pytest.raises(TrainingError, match="acts otherwise"):
        results.prove(family, [path], nothing)


@pytest.mark.parametrize(("learnt", "error", "caught"), [(2e-6, 1.4e-6, False), (9e-6, 5e-6, True)])
def test_what_is_learnt_within_rounding_is_no_fault_of_the_file(
    learnt: float, error: float, caught: bool, quick: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AdaLoRA's file has fewer ranks than the live model: sums in another order."""
    attach(quick, LoRA(rank=2), targets="unet.mid_block*attn1.to_q")
    path = save(collect(quick), tmp_path / "a.safetensors")
    family = families.StableDiffusion(quick, torch.device("cpu"), torch.float32)
    errors = iter([learnt, error])
    monkeypatch.setattr(probe, "error", lambda *_: next(errors))
    with pytest.raises(TrainingError, match="acts otherwise") if caught else nullcontext():
        assert results.prove(family, [path], {"prediction": torch.ones(2)}) == error


def test_a_run_that_was_done_says_again_what_it_learnt(
    run: Run, folder: Path, tmp_path: Path, quick: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    path = trained(run, folder, tmp_path / "out", "--held-out-count", "2")
    first, bytes_ = capsys.readouterr().out, path.read_bytes()
    trained(run, folder, tmp_path / "out", "--held-out-count", "2")
    again = capsys.readouterr().out
    loss = [[line for line in text.splitlines() if "loss: adapted" in line] for text in (first, again)]
    assert loss[0] == loss[1] != []
    assert path.read_bytes() == bytes_


def test_a_picture_that_breaks_after_it_was_looked_at_is_named(
    run: Run, folder: Path, tmp_path: Path, quick: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one whose kept latent is not a number, in the step that meets it, while the last checkpoint stays."""
    data = (folder / "bee.png").read_bytes()
    (folder / "bee.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match=r"bee\.png"):
        trained(run, folder, tmp_path / "out")
    (folder / "bee.png").write_bytes(data)
    encode = families.StableDiffusion.encode_image
    count: list[int] = []

    def third(self: Any, image: Tensor) -> Tensor:
        count.append(1)
        return encode(self, image) * (float("nan") if len(count) == 3 else 1)

    monkeypatch.setattr(families.StableDiffusion, "encode_image", third)
    more = ["--steps", "9", "--checkpoint-every", "1", "--batch-size", "1"]
    with pytest.raises(TrainingError, match=r"not finite in step \d \((ant|bee|cat|dog|elk)\.png at t=\d+\)"):
        trained(run, folder, tmp_path / "out", *more)
    for path in (tmp_path / "out" / "checkpoints").iterdir():
        held, _ = read_tensors(path)
        assert all(tensor.isfinite().all() for tensor in held.values())
    assert not (tmp_path / "out" / "adapter.safetensors").exists()
