"""Trainings of the playground: started, watched, stopped, resumed, found again; and the folders they are of."""

import io
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from imgadapt import demo, load
from imgadapt.errors import ConfigError, DataError, ImgadaptError, OutputError
from imgadapt.playground.desk import Busy
from imgadapt.playground.pictures.album import Album
from imgadapt.playground.session import Playground
from imgadapt.playground.settings import Limits, Settings
from imgadapt.playground.trainings import datasets, launching, watching
from imgadapt.playground.trainings.runs import Run, Runs, TrainRequest
from imgadapt.playground.trainings.trainings import Training

SMALL = {"kind": "style", "steps": 20, "batch_size": 2, "rank": 2, "resolution": 64, "learning_rate": 1e-3}


@pytest.fixture
def playground(tmp_path: Path) -> Iterator[Playground]:
    made = Playground(Settings(tmp_path / "home"))
    yield made
    made.close()


@pytest.fixture
def runs(playground: Playground) -> Iterator[Runs]:
    made = Runs(playground)
    yield made
    made.close()


def png(side: int = 64, number: int = 0) -> bytes:
    file = io.BytesIO()
    Image.effect_mandelbrot((side, side), (-2 + 0.2 * number, -1.5, 1, 1.5), 60).save(file, "PNG")
    return file.getvalue()


def zipped(files: Mapping[str, bytes]) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return made.getvalue()


def pictures(count: int = 4, caption: str = "a thing of kind {}") -> list[tuple[str, bytes]]:
    rows = [(f"p{k}.png", png(number=k)) for k in range(count)]
    return [*rows, *((f"p{k}.txt", caption.format(k).encode()) for k in range(count))]


def until(runs: Runs, id: str, ready: Callable[[Run], bool], seconds: float = 300) -> Run:
    """What another process does has no event here."""
    deadline = time.monotonic() + seconds
    while not ready(run := runs.get(id)):
        assert time.monotonic() < deadline, run
        time.sleep(0.05)
    return run


@pytest.mark.parametrize(
    ("data", "kind", "name"),
    [
        ("emoji style (embedded)", "style", "emoji-style"),
        ("my cat", "character", "my-cat-character"),
        ("(all)", "style", "training-style"),
        ("Style", "style", "Style"),
    ],
)
def test_a_training_without_a_name_is_called_plainly(data: str, kind: str, name: str) -> None:
    assert launching.named_after(data, kind) == name


def over(run: Run) -> bool:
    return run.state in ("done", "stopped", "failed")


# --- real trainings


def test_a_training_is_stopped_resumed_after_a_restart_and_its_adapters_are_cards(
    playground: Playground, runs: Runs
) -> None:
    data = runs.add_dataset("three things", pictures(3, "a thing"))  # one caption: one prompt for samples
    asked = TrainRequest.of({**SMALL, "data": data.id, "name": "things", "sample_every": 10, "trigger": "--plan"})
    run = runs.start(asked)
    assert (run.state, run.step, run.steps, run.name) == ("starting", 0, 20, "things")
    for again in (lambda: runs.start(asked), lambda: runs.resume(run.id)):
        with pytest.raises(Busy, match="things is being trained"):
            again()
    until(runs, run.id, lambda run: run.step >= 5 or over(run))
    told = runs.running()
    assert told is not None
    assert (told.name, told.steps) == ("things", 20)
    assert told.step >= 5
    runs.stop(run.id)
    runs.stop(run.id)  # a second signal would end it without saving
    stopped = until(runs, run.id, over)
    assert stopped.state == "stopped"
    assert runs.running() is None
    assert 5 <= stopped.step < 20
    assert [step for step, _, _ in stopped.loss] == list(range(1, stopped.step + 1))

    later = Runs(playground)
    assert [(one.id, one.state, one.step) for one in later.all()] == [(run.id, "stopped", stopped.step)]
    assert later.resume(run.id).state == "starting"
    done = until(later, run.id, over)
    assert (done.state, done.step) == ("done", 20)
    assert done.loss[: stopped.step] == stopped.loss
    assert [step for step, _, _ in done.loss] == list(range(1, 21))
    assert all(0 < loss < 5 and 0 < rate <= 1e-3 for _, loss, rate in done.loss)
    assert [step for step, _ in done.samples] == [10, 20]
    assert all(picture.width >= 64 and playground.album.get(picture.id).path.is_file() for _, picture in done.samples)
    assert [row["step"] for row in done.evaluations] == [20]
    assert [card.path.name for card in done.cards] == ["step-0000020.safetensors", "adapter.safetensors"]
    assert not any(card.fault for card in done.cards)
    assert {part.method.file_rank for part in load(done.cards[-1].path).parts.values()} == {2}
    assert load(done.cards[-1].path).metadata["modelspec.title"] == "things"
    assert "--plan things of" not in done.message
    assert str(playground.settings.home) not in f"{done.message}{done.name}"
    with pytest.raises(ConfigError, match="things is done"):
        later.resume(run.id)
    again = later.get(run.id)
    assert [picture.id for _, picture in again.samples] == [picture.id for _, picture in done.samples]
    later.close()


def test_a_failed_training_says_why_without_folders(playground: Playground, runs: Runs) -> None:
    data = runs.add_dataset("broken", pictures())
    run = runs.start(TrainRequest.of({**SMALL, "data": data.id}))
    (playground.settings.home / "data" / "broken" / "p1.png").write_bytes(b"no picture")  # after it was planned
    failed = until(runs, run.id, over)
    assert failed.state == "failed"
    assert failed.message.startswith("broken: 1 of 4 pictures cannot be read; mend or remove p1.png")
    assert str(playground.settings.home) not in failed.message
    assert runs.get(run.id).cards == []


def test_no_name_of_a_folder_stands_in_the_way_of_the_list_of_owners(tmp_path: Path) -> None:
    kept = datasets.Datasets(Settings(tmp_path, shared=True))
    for name in ("owners.json", ".owners.json"):
        kept.add(name, [("a.png", png(8))], "ann")
    assert [one.name for one in kept.all("ann")] == ["emoji style (embedded)", "owners.json", "owners.json-2"]
    assert len(kept.all("bob")) == 1


def test_a_check_plans_and_shows_the_pictures_and_trains_nothing(playground: Playground, runs: Runs) -> None:
    files = [*pictures(), ("copy.png", png(number=1)), ("copy.txt", b"the same")]
    data = runs.add_dataset("checked", files)
    check = runs.check(TrainRequest.of({**SMALL, "data": data.id})).result()
    assert any(level == "warning" and "copy.png" in text for level, text in check.findings)
    assert check.summary[0] == "style: lora of rank 2, 20 steps of 2, 5 pictures"
    assert check.summary[1].startswith("memory: 0.0")
    planned = {name: (value, why) for name, value, why in check.plan}
    assert "learning_rate" not in planned
    assert planned["warmup_steps"] == ("5", "a twentieth, 5 at least")
    assert planned["targets"][0] == "transformer, convolution"
    assert planned["flip"] == ("yes", "a style has no sides")
    assert not [why for _, why in planned.values() if "--" in why]
    assert check.sheet is not None
    assert playground.album.get(check.sheet.id).width > 300
    assert list((playground.settings.home / "runs").iterdir()) == []
    assert playground.studio.base is None


# --- processes


def fake(folder: Path, program: str) -> "subprocess.Popen[bytes]":
    """A process that says it trains into a folder, once it has begun to wait for signals."""
    lines = "import signal", "signals = {signal.SIGTERM}", "signal.pthread_sigmask(signal.SIG_BLOCK, signals)"
    code = "\n".join([*lines, "print(flush=True)", program])
    process = subprocess.Popen(
        [sys.executable, "-c", code, f"--output={folder}"], stdout=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    return process


def kept(root: Path, **more: Any) -> None:
    """The record of an earlier run, `old`."""
    (root / "old").mkdir(parents=True, exist_ok=True)
    record = {"id": "f" * 16, "name": "old", "owner": "", "began": 1.0, "request": {}, "steps": 20, **more}
    (root / "old" / "run.json").write_text(json.dumps(record))


def test_a_training_that_an_earlier_playground_left_running_is_watched_and_stopped(playground: Playground) -> None:
    root = (playground.settings.home / "runs").resolve()
    process = fake(root / "old", "signal.sigwait(signals)")
    kept(root, pid=process.pid)
    (root / "old" / "status.json").write_text('{"state": "training", "step": 3, "steps": 20, "eta_seconds": 4.5}')
    later = Runs(playground)
    run = later.get("f" * 16)
    assert (run.state, run.step, run.eta) == ("training", 3, 4.5)
    (style,) = [one.id for one in later.datasets() if one.pictures == 40]
    with pytest.raises(Busy, match="old is being trained"):
        later.start(TrainRequest.of({"data": style}))
    later.close()
    assert process.wait() == 0
    assert later.get("f" * 16).state == "stopped"
    with pytest.raises(Busy, match="closing"):
        later.start(TrainRequest.of({"data": style}))


def test_one_that_does_not_end_is_killed(playground: Playground) -> None:
    root = (playground.settings.home / "runs").resolve()
    process = fake(root / "old", "while True: signal.sigwait(signals)")
    kept(root, pid=process.pid)
    later = Runs(playground)
    later.patience = 0.1
    later.close()
    assert process.wait() == -signal.SIGKILL


def test_another_process_that_has_the_number_by_now_is_left_alone(playground: Playground) -> None:
    root = (playground.settings.home / "runs").resolve()
    kept(root, pid=os.getpid())
    later = Runs(playground)
    assert later.get("f" * 16).state == "failed"
    assert "killed" in later.get("f" * 16).message
    later.stop("f" * 16)
    later.close()


def test_records_of_others_are_passed_by(playground: Playground) -> None:
    root = playground.settings.home / "runs"
    for name, text in {"a": "{", "b": "[]", "c": '{"id": 3}', "d": '{"unknown": 1}'}.items():
        (root / name).mkdir()
        (root / name / "run.json").write_text(text)
    assert Runs(playground).all() == []


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        ({"kind": "style", "word": "<x>"}, "another kind of training"),
        ({"kind": "concept"}, "'word' is not given"),
        ({"method": "nonsense"}, "no method 'nonsense'"),
        ({"method": "lora(rank=__import__('os').getpid())"}, "wanted a number"),
        ({"method": "dora(loha(rank=99999))"}, "rank 99999 is more than 1024"),
        ({"data": "0" * 16}, "no such folder"),
        ({"base": "0" * 16}, "no such base"),
        ({"trigger": "a\nb"}, "line"),
        ({"name": "a\tb"}, "line|character"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"steps": 10**9}, "steps"),
        ({"resolution": 64.5}, "resolution"),
        ({"data": "/etc"}, "data"),
        ({"output": "/etc"}, "output"),
    ],
)
def test_what_cannot_be_trained_is_refused_and_leaves_no_folder(
    runs: Runs, playground: Playground, request_: Mapping[str, Any], said: str
) -> None:
    (style,) = [one.id for one in runs.datasets() if one.pictures == 40]
    with pytest.raises(ConfigError, match=said):
        runs.start(TrainRequest.of({"data": style, **request_}))
    assert list((playground.settings.home / "runs").iterdir()) == []


def test_no_value_becomes_a_flag_and_none_is_read_by_a_shell(tmp_path: Path) -> None:
    given = {
        "folder": tmp_path / "-x",
        "trigger": "--no-report",
        "title": "$(reboot); -y",
        "resolution": [64],
        "steps": 3,
    }
    made = launching.command(given, "style", tmp_path / "out")
    assert made[:4] == [sys.executable, "-m", "imgadapt", "train"]
    assert made[4:] == [
        str(tmp_path / "-x"), "--kind=style", "--trigger=--no-report", "--title=$(reboot); -y", "--resolution=64",
        "--steps=3", f"--output={tmp_path / 'out'}", "--no-report", "--log-with",
    ]  # fmt: skip


def test_a_training_computes_where_the_playground_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    assert launching._environment("cuda:1")["CUDA_VISIBLE_DEVICES"] == "5"
    assert launching._environment("cuda")["CUDA_VISIBLE_DEVICES"] == "2,5"
    assert launching._environment("cpu")["ACCELERATE_USE_CPU"] == "true"


def test_one_that_cannot_be_started_leaves_no_folder(
    runs: Runs, playground: Playground, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launching, "command", lambda *_: ["/nowhere/python"])
    (style,) = [one.id for one in runs.datasets() if one.pictures == 40]
    with pytest.raises(OutputError, match="cannot start the training: No such file"):
        runs.start(TrainRequest.of({"data": style}))
    assert list((playground.settings.home / "runs").iterdir()) == []


def test_one_whose_process_cannot_be_written_down_is_ended(
    runs: Runs, playground: Playground, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[subprocess.Popen[bytes]] = []
    start, keep = launching.start, Training.keep

    def kept(self: Training, **changes: Any) -> None:
        if changes.get("pid") is not None:
            raise OutputError("cannot write run.json: No space left on device")
        keep(self, **changes)

    def begun(*given: Any) -> subprocess.Popen[bytes]:
        started.append(start(*given))
        return started[-1]

    monkeypatch.setattr(launching, "start", begun)
    monkeypatch.setattr(Training, "keep", kept)
    monkeypatch.setattr(launching, "command", lambda *_: [sys.executable, "-c", "import signal; signal.pause()"])
    (style,) = [one.id for one in runs.datasets() if one.pictures == 40]
    with pytest.raises(OutputError, match="No space left"):
        runs.start(TrainRequest.of({"data": style}))
    assert [process.poll() for process in started] == [-signal.SIGKILL]
    assert list((playground.settings.home / "runs").iterdir()) == []


# --- what its files say


def test_a_log_is_read_as_it_grows_and_anew_when_it_was_cut(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    losses = watching.Losses(path)
    assert losses.read() == []
    path.write_text('{"step": 0, "loss": 1.5, "lr": 0.1}\n{"step": 1, "lo')
    assert losses.read() == [(1, 1.5, 0.1)]
    with path.open("a") as file:
        file.write('ss": 2.0, "lr": 0.2}\n{"step": 2, "loss": null, "lr": 0}\nnot json\n[]\n')
    assert losses.read() == [(1, 1.5, 0.1), (2, 2.0, 0.2)]
    other = tmp_path / "other"
    other.write_text('{"step": 0, "loss": 9.0, "lr": 0.1}\n')
    other.replace(path)
    assert losses.read() == [(1, 9.0, 0.1)]


def test_a_long_curve_is_thinned_to_means() -> None:
    rows = [(k + 1, float(k % 10), 0.1) for k in range(100_000)]
    thin = watching.thinned(rows)
    assert len(thin) <= watching.POINTS
    assert thin[-1][0] == 100_000
    assert sum(loss for _, loss, _ in thin) / len(thin) == pytest.approx(4.5, abs=0.02)
    assert watching.thinned(rows[:1500]) == rows[:1500]


def test_samples_are_lent_to_the_album_and_drive_nothing_out_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Album, "given", 4)
    album = Album(tmp_path / "a", tmp_path / "b", most_bytes=10**6, most_pixels=10**6)
    mine = album.accept(png(16))
    watch = watching.Watch(tmp_path / "run", album)
    assert watch.samples(None) == []
    samples = tmp_path / "run" / "samples"
    samples.mkdir(parents=True)
    for step in range(10, 1010, 10):
        (samples / f"step-{step:07d}.png").write_bytes(png(16))
    (samples / "step-one.png").write_bytes(png(16))
    first = watch.samples(None)
    assert len(first) <= watching.SAMPLES + 1
    assert first[-1][0] == 1000
    assert all(album.get(picture.id).path.parent == samples for _, picture in first)
    album.accept(png(16, 1))
    assert album.get(mine.id).path.is_file()
    assert album.recent() == []
    assert [path.name for path in (tmp_path / "b").iterdir() if path.stem == mine.id] == [f"{mine.id}.png"]
    album.remove(first[0][1].id)
    assert (samples / "step-0000010.png").is_file()
    assert watching.Watch(tmp_path / "run", album).samples(None) == first
    (samples / "step-0000010.png").write_bytes(b"broken")
    album.remove(first[0][1].id)
    assert [step for step, _ in watch.samples(None)] == [step for step, _ in first[1:]]


def test_samples_are_their_owners_and_no_links(tmp_path: Path) -> None:
    album = Album(tmp_path / "a", tmp_path / "b", most_bytes=10**6, most_pixels=10**6)
    (tmp_path / "run" / "samples").mkdir(parents=True)
    (tmp_path / "secret.png").write_bytes(png(16))
    (tmp_path / "run/samples/step-1.png").write_bytes(png(16))
    (tmp_path / "run/samples/step-2.png").symlink_to(tmp_path / "secret.png")
    ((step, picture),) = watching.Watch(tmp_path / "run", album).samples("ann")
    assert (step, album.get(picture.id, "ann").owner) == (1, "ann")
    with pytest.raises(ConfigError, match="another's"):
        album.get(picture.id, "bob")


def test_the_console_tells_the_error_and_not_the_progress(tmp_path: Path) -> None:
    watch = watching.Watch(tmp_path, None)  # pyright: ignore[reportArgumentType] # no pictures are looked at
    assert watch.said() == watch.fault() == ""
    bar = "\rtraining:  40%|####      | 8/20 [00:01<00:02,  5.88step/s, loss=0.1174]"
    (tmp_path / "console.log").write_bytes(f"{'x' * 10**6}\n40 pictures\n{bar * 90}\n".encode())
    assert watch.said() == "40 pictures"
    with (tmp_path / "console.log").open("a") as file:
        file.write("imgadapt: error: it is so\nsome warning\n")
    assert watch.fault() == "it is so"


# --- folders of pictures


def test_the_embedded_style_and_the_settings_folders_are_there(tmp_path: Path) -> None:
    (tmp_path / "more" / "inner" / "10_cat").mkdir(parents=True)
    (tmp_path / "more" / "inner" / "10_cat" / "a.png").write_bytes(png(8))
    (tmp_path / "more" / "inner" / "10_cat" / "a-mask.png").write_bytes(png(8))
    (tmp_path / "more" / "empty").mkdir()
    (tmp_path / "more" / ".hidden").mkdir()
    (tmp_path / "more" / ".hidden" / "a.png").write_bytes(png(8))
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "a.png").write_bytes(png(8))
    (tmp_path / "more" / "link").symlink_to(tmp_path / "secret")
    made = datasets.Datasets(Settings(tmp_path / "home", data=(tmp_path / "more",)))
    assert [(one.name, one.pictures) for one in made.all()] == [("emoji style (embedded)", 40), ("inner", 1)]
    assert made.folder(made.all()[0].id) == demo.STYLE / "train"
    with pytest.raises(ConfigError, match="no such folder"):
        made.folder("../../etc")


def given(home: Path, files: Sequence[tuple[str, bytes]], **limits: Any) -> tuple[datasets.Dataset, dict[str, bytes]]:
    """What became of files."""
    made = datasets.Datasets(Settings(home, limits=Limits(**limits)))
    found = made.add("mine", files)
    return found, {path.name: path.read_bytes() for path in made.folder(found.id).iterdir()}


def test_pictures_and_captions_are_kept_under_plain_names(tmp_path: Path) -> None:
    files = [
        ("fox.png", png(8)),
        ("fox.txt", b"\xef\xbb\xbfa fox\x00"),
        ("con.PNG", png(9)),
        ("../../evil.png", png(10)),
    ]
    found, kept = given(tmp_path, [*files, ("alone.txt", b"x"), ("notes.pdf", b"x"), (r"C:\up\cat.png", png(11))])
    assert kept == {"fox.png": png(8), "fox.txt": b"a fox", "con_.png": png(9), "evil.png": png(10), "cat.png": png(11)}
    assert found.pictures == 4
    assert len(found.notes) == 2
    assert "1 captions belong to no picture (alone.txt)" in found.notes[0]
    assert "notes.pdf" in found.notes[1]


def test_a_zip_stands_for_its_files_and_none_of_them_lies_elsewhere(tmp_path: Path) -> None:
    inside = {
        "set/a/1.png": png(8), "set/a/1.txt": b"first", "set/b/1.png": png(9), "set/b/1.txt": b"second",
        "set/b/1-mask.png": png(9), "../../../tmp/up.png": png(10), "/abs.png": png(11), "__MACOSX/set/a/._1.png": b"x",
    }  # fmt: skip
    home = tmp_path / "deep" / "home"
    found, kept = given(home, [("all.zip", zipped(inside))])
    assert kept == {
        "1.png": png(8), "1.txt": b"first", "1-2.png": png(9), "1-2.txt": b"second", "1-2-mask.png": png(9),
        "up.png": png(10), "abs.png": png(11),
    }  # fmt: skip
    assert found.pictures == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep"]


BOMB = zipped({f"{k}.png": bytes(300_000) for k in range(40)})


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ([], "none of the 0 files is a picture"),
        ([("a.txt", b"x")], "none of the 1 files is a picture: 1 captions"),
        ([("a.png", b"")], "a.png: .*empty"),
        ([("a.png", b"<svg onload=alert(1)>")], "a.png: "),
        ([("a.png", png(64)[:200])], "a.png: .*broken"),
        ([("a.png", png(300))], "a.png: .*pixels"),
        ([("a.png", bytes(200_000))], "a.png has more than the 100,000 bytes"),
        ([("a.png", png(8)), ("a.txt", b"\xff\xfe")], "a.txt is no UTF-8"),
        ([("a.png", png(8)), ("a.txt", b"x" * 70_000)], "a.txt has 70,000 bytes"),
        ([("a.png", png(8)), ("a.png", png(8))], "a.png was given twice"),
        ([("a.zip", b"PK\x03\x04 no zip")], "a.zip is no zip"),
        ([("a.zip", zipped({"a.png": png(8)})[:-30])], "a.zip is no zip"),
        ([("a.zip", zipped({"a.png": bytes(10**7)}))], "a.png has more than the 100,000 bytes"),
        ([("bomb.zip", BOMB)], "more than the 100,000 bytes"),
        ([("a.zip", zipped({f"{k}.txt": b"" for k in range(5000)}))], "a.zip has 5000 files"),
        ([(f"{k}.png", png(8) + bytes(90_000)) for k in range(12)], "too much: 4000 files and 800,000 bytes"),
    ],
)
def test_what_is_no_set_of_pictures_is_refused_and_leaves_nothing(
    tmp_path: Path, files: Sequence[tuple[str, bytes]], said: str
) -> None:
    with pytest.raises(DataError, match=said) as error:
        given(tmp_path / "home", files, upload=100_000, upload_pixels=200 * 200)
    assert str(tmp_path) not in str(error.value)
    assert list((tmp_path / "home" / "data").iterdir() if (tmp_path / "home" / "data").exists() else []) == []


def test_a_zip_that_lies_about_its_sizes_is_read_no_further_than_it_may(tmp_path: Path) -> None:
    data = bytearray(zipped({"a.png": bytes(10**7)}))
    where = data.rindex(b"PK\x01\x02")
    data[where + 24 : where + 28] = (10).to_bytes(4, "little")
    with pytest.raises(DataError, match=r"a\.zip is (no|a broken) zip|a\.png"):
        given(tmp_path, [("a.zip", bytes(data))], upload=100_000)


def test_a_name_that_is_taken_gets_a_number(tmp_path: Path) -> None:
    made = datasets.Datasets(Settings(tmp_path))
    names = [made.add(name, [("a.png", png(8))]).name for name in ("../x", "x", "", "con", "x" * 400)]
    assert names == ["x", "x-2", "pictures", "con_", "x" * 100]


def test_others_see_and_train_their_own_pictures_only_where_many_share(tmp_path: Path) -> None:
    shared = Playground(Settings(tmp_path, shared=True))
    runs = Runs(shared)
    try:
        mine = runs.add_dataset("mine", [("a.png", png(8))], owner="me")
        assert [one.name for one in runs.datasets("me")] == ["emoji style (embedded)", "mine"]
        assert [one.name for one in runs.datasets("you")] == ["emoji style (embedded)"]
        with pytest.raises(ConfigError, match="no such folder"):
            runs.start(TrainRequest.of({"data": mine.id}), owner="you")
        for _ in range(datasets._EACH - 1):
            runs.add_dataset("more", [("a.png", png(8))], owner="me")
        with pytest.raises(DataError, match="16 folders of pictures are yours already"):
            runs.add_dataset("more", [("a.png", png(8))], owner="me")
    finally:
        runs.close()
        shared.close()


def test_others_see_their_own_trainings_only_where_many_share(tmp_path: Path) -> None:
    shared = Playground(Settings(tmp_path, shared=True))
    runs = Runs(shared)
    kept(tmp_path / "runs", owner="me", ended=1)
    try:
        assert [run.name for run in runs.all("me")] == ["old"]
        assert runs.all("you") == []
        for act in (runs.get, runs.stop, runs.resume):
            with pytest.raises(ConfigError, match="no such training, or it is another's"):
                act("f" * 16, "you")
    finally:
        runs.close()
        shared.close()


def test_a_full_disk_while_pictures_are_kept_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OutputError(f"cannot write {path}: No space left on device")

    made = datasets.Datasets(Settings(tmp_path))
    monkeypatch.setattr(datasets, "write_bytes", full)
    with pytest.raises(ImgadaptError, match="No space left"):
        made.add("x", [("a.png", png(8))])
    assert list((tmp_path / "data").iterdir()) == []
