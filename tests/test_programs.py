"""The programs, as a user runs them: what they write, what they say to bad input, and that a kill costs nothing."""

import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from imgadapt import LoKr, cli, demo, load, prompting
from imgadapt.errors import ConfigError, DataError, FormatError, OutputError, TargetError
from imgadapt.methods import METHODS
from imgadapt.training import spelling

Run = Callable[[str, Sequence[str]], None]
QUICK = [
    *("--steps", "8", "--checkpoint-every", "1", "--batch-size", "3", "--rank", "2", "--alpha", "1", "--log-with"),
    *("--targets", "attention", "--no-report"),
]


def imgadapt(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "imgadapt", *arguments]


def computed() -> float:
    """Seconds of CPU that processes which have ended took."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_help_needs_no_torch_and_no_time() -> None:
    code = "import sys, imgadapt.cli as c; sys.argv = ['x', '--help']; c.main(); assert 'torch' not in sys.modules"
    seconds: list[float] = []
    done = None
    for _ in range(3):
        start = computed()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        seconds.append(computed() - start)
    assert done is not None
    assert all(name in done.stdout for name in cli.PROGRAMS)
    assert min(seconds) < 0.3


def test_every_program_is_there_and_answers_help(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    for name in cli.PROGRAMS:
        with pytest.raises(SystemExit) as stop:
            run(name, ["--help"])
        assert stop.value.code == 0
        assert f"imgadapt {name}" in capsys.readouterr().out


def test_methods_lists_all_that_method_takes_as_method_takes_it(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run("methods", [])
    rows = [line for line in capsys.readouterr().out.splitlines() if "  rate x" in line]
    assert [row.split()[0] for row in rows] == [kind.name for kind in (*METHODS, *prompting.KINDS)]
    run("methods", ["T-LoRA", "lokr"])
    said = capsys.readouterr().out
    for called in [line for line in said.splitlines() if line.startswith(("tlora(", "lokr("))]:
        assert spelling.method(called.replace("None", "3"), {}).name in ("tlora", "lokr")
    assert "delta = kron(w1, w2)" in said
    run("methods", ["lokr", "--json"])
    about = json.loads(capsys.readouterr().out)["lokr"]
    assert about["settings"]["rank"] == "8"
    assert about["rate_over_lora"] == LoKr.rate_over_lora > 1
    run("methods", ["dora(lora(rank=8))"])
    assert capsys.readouterr().out.startswith("dora(lora(rank=16), axis='output')")
    with pytest.raises(ConfigError, match="pissa is where LoRA starts: --start pissa"):
        run("methods", ["pissa"])
    with pytest.raises(ConfigError, match="no method 'lokrr', did you mean 'lokr'"):
        run("methods", ["lokrr"])


def test_importing_imgadapt_imports_no_diffusers_transformers_or_gradio() -> None:
    code = (
        "import sys, imgadapt; [getattr(imgadapt, n) for n in imgadapt.__all__]; "
        "print([m for m in ('diffusers', 'transformers', 'gradio', 'accelerate') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_unknown_program_is_answered_with_the_nearest() -> None:
    done = subprocess.run(imgadapt("trian"), capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "did you mean 'train'" in done.stderr


def test_a_run_that_was_killed_and_one_stopped_by_ctrl_c_go_on_and_end_in_the_same_bytes(
    folder: Path, tmp_path: Path
) -> None:
    """As a user does it, in processes of their own; test_resume.py does it at every moment."""
    whole, broken = tmp_path / "whole" / "out", tmp_path / "broken" / "out"
    arguments = ["style", str(folder), "--flip", "--caption-dropout", "0.3", *QUICK]
    subprocess.run(imgadapt(*arguments, "--output", str(whole)), check=True, capture_output=True)
    reached: list[int] = []
    for number in (signal.SIGKILL, signal.SIGINT):
        process = subprocess.Popen(
            imgadapt(*arguments, "--output", str(broken)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        before = newest(broken)
        while newest(broken) <= before and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
        reached.append(newest(broken))
        assert process.returncode in ((-number,) if number == signal.SIGKILL else (130,)), said
    assert "run the same command to go on" in said
    assert 0 < reached[0] < reached[1] < 8, reached
    done = subprocess.run(imgadapt(*arguments, "--output", str(broken)), check=True, capture_output=True, text=True)
    assert f"going on after step {reached[1]}" in done.stdout
    assert (broken / "adapter.safetensors").read_bytes() == (whole / "adapter.safetensors").read_bytes()
    steps = [[json.loads(line)["step"] for line in (f / "log.jsonl").read_text().splitlines()] for f in (whole, broken)]
    assert steps == [list(range(8))] * 2
    assert not list(broken.rglob("*.tmp"))


def newest(output: Path) -> int:
    return max((int(path.stem.removeprefix("step-")) for path in output.glob("checkpoints/step-*")), default=0)


def test_style_generate_show_and_convert_hang_together(
    run: Run, folder: Path, tmp_path: Path, quick: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    held_out = demo.STYLE / "held_out"
    few = tmp_path / "few"
    few.mkdir()
    for path in sorted(held_out.iterdir())[:6]:
        (few / path.name).write_bytes(path.read_bytes())
    out = tmp_path / "out"
    rate = ["--learning-rate", "0.01", "--warmup-steps", "0"]
    run(
        "style", [str(folder), *QUICK, *rate, "--output", str(out), "--held-out", str(few), "--sample-prompts", "a fox"]
    )
    said = capsys.readouterr().out
    assert "read back, predictions differ by 0.0e+00" in said
    assert "held-out loss: adapted" in said
    with Image.open(out / "samples" / "step-0000008.png") as sheet:
        assert sheet.size[0] > 64
    adapter = out / "adapter.safetensors"
    with safe_open(adapter, framework="pt") as file:
        settings = json.loads(file.metadata()["imgadapt_settings"])
    assert (settings["rank"], settings["alpha"], settings["steps"]) == ("2", "1.0", "8")

    run("convert", [str(adapter), str(tmp_path / "k.safetensors"), "--to", "kohya"])
    run("convert", [str(tmp_path / "k.safetensors"), str(tmp_path / "d.safetensors"), "--to", "diffusers"])
    run("show", [str(tmp_path / "k.safetensors")])
    said = capsys.readouterr().out
    assert "rank 2, alpha 1 (scale 0.5): 128 layers" in said
    assert "kohya format" in said
    run("show", [str(tmp_path / "d.safetensors"), "--layers"])
    assert "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_v: lora, norm" in capsys.readouterr().out

    pictures = []
    for name, adapters in (("base", []), ("on", [f"{adapter}:1"]), ("off", [f"{adapter}:0"])):
        flags = [x for a in adapters for x in ("--adapter", a)]
        run("generate", ["a fox", "--steps", "2", *flags, "--output", str(tmp_path / f"{name}.png")])
        with Image.open(tmp_path / f"{name}.png") as picture:
            pictures.append(picture.tobytes())
            assert picture.info["parameters"].startswith("a fox" if name == "base" else "a fox <lora:adapter:")
    assert pictures[0] == pictures[2] != pictures[1]


def test_a_folder_is_converted_and_what_cannot_be_is_said(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    truth = Path(__file__).parent / "ground_truth" / "lycoris"
    folder = tmp_path / "in"
    (folder / "deep").mkdir(parents=True)
    shutil.copy(truth / "lora.safetensors", folder / "a.safetensors")
    shutil.copy(truth / "boft.safetensors", folder / "deep" / "b.safetensors")
    with pytest.raises(SystemExit, match="1"):
        run("convert", [str(folder), str(tmp_path / "out"), "--to", "diffusers", "--json"])
    good, bad = json.loads(capsys.readouterr().out)
    assert (good["from"], good["base"], good["layers"], good["loss"]) == ("lycoris", "sd1", 16, {"exact": 16})
    assert load(good["written"]).format == "diffusers"
    assert "16 of 16 layers cannot be written as diffusers" in bad["error"]
    assert not (tmp_path / "out" / "deep" / "b.safetensors").exists()

    with pytest.raises(SystemExit, match="1"):
        run("convert", [str(folder), "--to", "diffusers"])
    said = capsys.readouterr()
    assert "1 of 2 files written" in said.out
    assert "diffusers has no word for boft" in said.err
    run("convert", [str(folder), "--to", "diffusers", "--plan"])
    assert "16 impossible" in capsys.readouterr().out


def test_a_file_is_not_converted_onto_itself_nor_into_another(run: Run, tmp_path: Path) -> None:
    truth = Path(__file__).parent / "ground_truth" / "lycoris" / "lora.safetensors"
    shutil.copy(truth, tmp_path / "a.safetensors")
    with pytest.raises(ConfigError, match="is the input; wanted another name"):
        run("convert", [str(tmp_path / "a.safetensors"), str(tmp_path / "a.safetensors"), "--to", "kohya"])
    assert (tmp_path / "a.safetensors").read_bytes() == truth.read_bytes()
    (tmp_path / "in").mkdir()
    shutil.copy(truth, tmp_path / "in" / "x.safetensors")
    shutil.copy(truth, tmp_path / "in" / "x.pt")
    with pytest.raises(ConfigError, match="would both be written as"):
        run("convert", [str(tmp_path / "in"), str(tmp_path / "out"), "--to", "kohya"])
    assert not (tmp_path / "out").exists()


def test_alpha_that_peft_s_file_alone_does_not_say_is_remarked(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = {f"base_model.model.mid_block.attentions.0.proj_in.lora_{x}.weight": torch.ones(2, 2) for x in "AB"}
    save_file(tensors, tmp_path / "lone.safetensors")
    run("show", [str(tmp_path / "lone.safetensors")])
    run("convert", [str(tmp_path / "lone.safetensors"), "--to", "kohya"])
    said = capsys.readouterr().out
    assert said.count("peft's file without its adapter_config.json: alpha is not known") == 2


def test_show_says_what_would_not_fit_and_writes_json(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = Path(__file__).parent / "ground_truth" / "lycoris" / "lokr_full.safetensors"
    run("show", [str(file), "--json"])
    said = json.loads(capsys.readouterr().out)
    assert (said["format"], said["base"], len(said["rows"])) == ("lycoris", "sd1", 16)
    tensors = load(file).parts["unet.conv_in"].tensors
    wanted = float(torch.kron(tensors["w1"][:, :, None, None], tensors["w2"]).norm())
    row = next(row for row in said["rows"] if row["layer"] == "unet.conv_in")
    assert row["norm"] == pytest.approx(wanted, rel=1e-5)
    assert said["blocks"]["unet.conv_in"] == pytest.approx(wanted, rel=1e-5)
    with pytest.raises(SystemExit, match="1"):
        run("show", [str(file), "--base", "sdxl"])
    assert "layers do not fit" in capsys.readouterr().out
    run("show", [str(demo.ADAPTERS / "ink.safetensors"), "--base", "demo", "--no-norms"])
    assert "on demo       all of it fits" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="1"):
        run("show", [str(file), "--base", "demo"])  # of SD1's sizes
    assert "16 layers do not fit" in capsys.readouterr().out


@pytest.mark.parametrize("value", [float("nan"), float("-inf")], ids=str)
@pytest.mark.parametrize("options", [[], ["--json"], ["--layers"]], ids=str)
def test_show_ends_with_an_error_after_all_it_says_of_an_adapter_that_is_not_finite(
    value: float, options: list[str], run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = {
        f"unet.down_blocks.{k}.attentions.0.proj_in.lora.{x}.weight": torch.ones(2, 2)
        for k in (0, 1)
        for x in ("up", "down")
    }
    tensors["unet.down_blocks.1.attentions.0.proj_in.lora.up.weight"][0, 1] = value
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(FormatError, match=r"cannot draw: .* NaN or infinity: unet\.down_blocks\.1\.\S+proj_in\. "):
        run("show", [str(tmp_path / "x.safetensors"), *options])
    said = capsys.readouterr().out
    if options == ["--json"]:
        assert json.loads(said)["broken"] == ["unet.down_blocks.1.attentions.0.proj_in"]
    else:
        assert "parameters    16, float32" in said
    run("show", [str(tmp_path / "x.safetensors"), *options, "--no-norms"])  # which looks at no number


def test_show_counts_the_numbers_of_words(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"emb_params": torch.ones(2, 768, dtype=torch.float16)}, tmp_path / "fox.safetensors")
    run("show", [str(tmp_path / "fox.safetensors")])
    assert "\nparameters    1,536, float16\n" in capsys.readouterr().out
    save_file({"emb_params": torch.full((2, 768), float("inf"))}, tmp_path / "fox.safetensors")
    with pytest.raises(FormatError, match="1 layers or words hold NaN or infinity: <fox>"):
        run("show", [str(tmp_path / "fox.safetensors")])


def test_bad_input_is_answered_with_the_way_out(run: Run, folder: Path, tmp_path: Path, quick: Any) -> None:
    out = ["--output", str(tmp_path / "out")]
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DataError, match="no pictures in it"):
        run("style", [str(empty), *out])
    with pytest.raises(ConfigError, match="'folder' is not given"):
        run("style", out)
    with pytest.raises(ConfigError, match="nowhere"):
        run("style", [str(folder), "--base", "nowhere", *out])
    with pytest.raises(ConfigError, match="resolution is 60; it must be a multiple of 8"):
        run("style", [str(folder), "--resolution", "60", *out])
    with pytest.raises(TargetError, match="no layer matches"):
        run("style", [str(folder), "--targets", "to_x", *out])
    with pytest.raises(FormatError, match="no such file"):
        run("generate", ["a fox", "--adapter", str(tmp_path / "none.safetensors")])
    with pytest.raises(FormatError, match=r"ink: no such file; of the library, write <lora:ink:0\.8> in the prompt"):
        run("generate", ["a fox", "--adapter", "ink:0.8"])
    (tmp_path / "text.safetensors").write_text("<html>404</html>")
    for name, arguments in (("show", []), ("convert", [str(tmp_path / "y"), "--to", "kohya"])):
        with pytest.raises(FormatError, match="not a safetensors file"):
            run(name, [str(tmp_path / "text.safetensors"), *arguments])
    (tmp_path / "file").write_text("kept")
    with pytest.raises(OutputError, match=r"cannot make the folder .*: Not a directory"):
        run("style", [str(folder), "--output", str(tmp_path / "file" / "under")])
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.skipif(sys.platform == "win32", reason="rlimits are POSIX's")
def test_a_full_disk_is_one_clear_line_and_leaves_no_stray_file(folder: Path, tmp_path: Path) -> None:
    import resource

    def small_files() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writes past the limit then fail with EFBIG
        resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))

    out = tmp_path / "out"
    done = subprocess.run(
        imgadapt("style", str(folder), *QUICK, "--output", str(out)),
        preexec_fn=small_files, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("imgadapt: error: cannot write ")
    assert "what was there is untouched" in last
    assert not list(out.rglob("*.tmp"))
    assert "Traceback" not in done.stderr
    assert not any(said in done.stderr for rows in cli._NOISE.values() for said in rows)


def test_what_libraries_say_of_themselves_is_left_out_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in cli._NOISE:
        monkeypatch.setattr(logging.getLogger(name), "filters", [])
    cli._hush()

    def shown(name: str, text: str, *values: Any) -> Any:
        return logging.getLogger(name).filter(logging.LogRecord(name, logging.WARNING, "x.py", 1, text, values, None))

    enum = "%s is an Enum subclass and is now natively supported. Calling register_constant() on Enum subclasses is ..."
    assert not shown("torch.utils._pytree", enum, "KernelPreference")
    assert shown("torch.utils._pytree", "%s is registered twice", "X")
    assert not shown("torchao", "Failed to load /a/_C_cutlass_90a.abi3.so: Could not load this library")
    assert shown("torchao", "this version is deprecated")


def test_programs_are_found_in_a_wheel_layout(tmp_path: Path) -> None:
    """A wheel carries them under imgadapt/_programs; the command runs them there by path."""
    package = tmp_path / "imgadapt"
    package.mkdir()
    for name in ("cli.py", "__init__.py", "__main__.py", "errors.py", "stopping.py", "shortage.py"):
        (package / name).write_bytes((Path(cli.__file__).parent / name).read_bytes())
    program = package / "_programs" / cli.PROGRAMS["show"][0]
    program.parent.mkdir(parents=True)
    program.write_text("def main(arguments):\n    print('ran', __file__, arguments)\n")
    done = subprocess.run(
        imgadapt("show", "x"), cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == f"ran {program} ['x']"


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    command = f"{sys.executable} -m imgadapt merge --list | head -n 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode in (0, 141)  # it may have been quicker than head
    assert done.stdout.startswith("weighted")
    assert "Traceback" not in done.stderr
    assert "Broken pipe" not in done.stderr
