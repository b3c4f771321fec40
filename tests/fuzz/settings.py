"""Settings as text: training configs, methods, accounts."""

import os
from collections.abc import Iterator
from pathlib import Path

from imgadapt import cli
from imgadapt.playground.serving import accounts
from imgadapt.playground.trainings.runs import TrainRequest
from imgadapt.training import flags, recipe, spelling
from imgadapt.training.config import DreamBoothConfig, InversionConfig, TrainConfig
from tests.fuzz.files import placed
from tests.fuzz.target import Target

_CONFIGS = Path(__file__).resolve().parents[2] / "train_scripts" / "configs"


def _text(data: bytes) -> str:
    """What a terminal or a page gives: half characters in it, where the bytes are no UTF-8."""
    return data.decode("utf-8", "surrogateescape")


# --- TOML


def _config(data: bytes) -> None:
    path = placed(data, "config.toml")
    values = flags.read_toml(path)
    kind = DreamBoothConfig if "class_prompt" in values else InversionConfig if "word" in values else TrainConfig
    config = kind.of({"folder": "x", **values})
    again = placed(flags.write_toml(config).encode(), "again.toml")
    back = kind.of(flags.read_toml(again))
    for name, value in config:
        other = getattr(back, name)
        paths = isinstance(value, Path)
        assert (os.path.abspath(value) == os.path.abspath(other)) if paths else (value == other), name
    recipe.methods(config)


def _configs() -> Iterator[bytes]:
    for path in sorted(_CONFIGS.glob("*.toml")):
        yield path.read_bytes()
    yield flags.write_toml(TrainConfig.of({"folder": "x"})).encode()
    yield b'steps = 10\nlearning_rates = {"text_encoder*" = 5e-5}\nranks = {"unet.mid_block.*" = 32}\ntrigger = "\\u00e9"'  # noqa: E501


_TOML = (
    *(
        "= ",
        '""',
        "''",
        '"""',
        "'''",
        "[",
        "]",
        "{",
        "}",
        "[[x]]",
        "0x",
        "1e999",
        "inf",
        "-nan",
        "1979-05-27T07:32:00Z",
    ),
    *("a.a.a.a", "\\u0000", "\\ud800", "true", "method = ", "targets = [", "base = ", "rank = ", "score_with = ['/']"),
    *("lokr(factor=8)", "word = '<a>'", "class_prompt = 'a man'", "optimizer_options = {", "9" * 30, "../" * 9),
)


# --- methods


def _method(data: bytes) -> None:
    spelling.method(_text(data), {"rank": 4, "alpha": None})


def _methods() -> Iterator[bytes]:
    yield from (b"lora", b"lokr(factor=8)", b"dora(loha(rank=4))", b"lora(rank=4, alpha=2.0, rank_stabilised=True)")
    yield from (b"oft(block_size=4)", b"boft(block_size=4, factors=2)", b"dora(lora(rank=-1))", b"glora(rank=10**9)")


def _train(data: bytes) -> None:
    """A method that a page's visitor gives."""
    TrainRequest.of({"data": "a" * 16, "method": _text(data)})
    _method(data)


# --- accounts


def _accounts(data: bytes) -> None:
    path = placed(data, "accounts")
    for stored in list(accounts.read(path).values())[:1]:
        accounts._matches("a password", stored)


def _account_files() -> Iterator[bytes]:
    line = "eve:scrypt$2$1$1$c2FsdA==$aGFzaA=="
    yield f"{line}\n# nobody else\n\nadam:scrypt$4$1$1$AAAA$BBBB\n".encode()


# --- FILE:STRENGTH


def _adapter(data: bytes) -> None:
    text = _text(data.replace(b"\0", b""))
    path, strength = cli.adapter(text)
    whole, (before, _, after) = Path(text), text.rpartition(":")
    assert (path, strength) == (whole, 1.0) or (path == Path(before) and repr(strength) == repr(float(after)))


def _adapters() -> Iterator[bytes]:
    yield from (b"style.safetensors:0.8", b"a:b", b"C:\\x.safetensors", b":", b"x:nan", b"x:-1e5", b"a" * 300)


TARGETS = (
    Target("train-config", _config, _configs, _TOML),
    Target(
        "method",
        _method,
        _methods,
        ("lora(", "dora(", "rank=", "alpha=", "factor=", "True", "1e999", "-" * 40, "(" * 40),
    ),
    Target("method-asked", _train, _methods, ("lora(", "dora(", "rank=", "lambda:", "[0]*9", "'x'", "**{}", ":=")),
    Target("accounts", _accounts, _account_files, ("scrypt$", "$", "9999999", "=", ":", "\n", "#")),
    Target("file-strength", _adapter, _adapters, (":", "inf", "nan", "1_0", "/", "\\", "..", "a" * 256)),
)
