"""Settings of a training: from flags and TOML and back, methods from text, and tensors with their rates."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from imgadapt import LoHa, LoKr, LoRA
from imgadapt.errors import ConfigError, TargetError
from imgadapt.methods import DoRA, Method, TLoRA
from imgadapt.training import optimizers, recipe, spelling
from imgadapt.training.config import OPTIMIZERS, InversionConfig, TrainConfig
from imgadapt.training.flags import from_arguments, parser, read_toml, write_toml


def config(**values: Any) -> TrainConfig:
    return TrainConfig.of({"folder": "x", **values})


def given(*flags: str) -> TrainConfig:
    return from_arguments(parser("", TrainConfig).parse_args(flags), TrainConfig)


# --- config, flags, TOML


def test_an_unknown_key_is_an_error_that_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="unknown key 'learning_rat', did you mean 'learning_rate'"):
        config(learning_rat=1)


@pytest.mark.parametrize(
    ("key", "value"),
    [("steps", 0), ("rank", "many"), ("learning_rate", float("nan")), ("learning_rate", -1), ("caption_dropout", 1.5),
     ("precision", "fp8"), ("steps", 1.5), ("optimizer", "adam"), ("timestep_range", (0.7, 0.2)), ("ema", 1),
     ("ranks", {"": 3}), ("lora_plus", 0), ("batch_size", 0)],
)  # fmt: skip
def test_a_value_out_of_range_or_of_the_wrong_type_is_named(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"'{key}' is"):
        config(**{key: value})


def test_flags_win_over_toml_and_toml_over_defaults(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text(
        'folder = "pictures"\nsteps = 7\nrank = 3\nflip = true\ntargets = ["to_q", "!unet.mid*"]\n'
        'learning_rates = {"text_encoder*" = 5e-5}\n'
    )
    made = given("--config", str(tmp_path / "a.toml"), "--steps", "9", "--no-flip", "--alpha", "0.5")
    assert (made.steps, made.rank, made.flip, made.alpha, made.seed) == (9, 3, False, 0.5, 0)
    assert made.targets == ["to_q", "!unet.mid*"]
    assert made.learning_rates == {"text_encoder*": 5e-5}
    assert made.folder == tmp_path / "pictures"


@pytest.mark.parametrize(("steps", "warm"), [(1000, 20), (201, 20), (150, 15), (19, 1), (9, 0)])
def test_the_warm_up_is_a_tenth_of_few_steps_where_it_is_not_given(steps: int, warm: int) -> None:
    assert given("x", "--steps", str(steps)).warmup_steps == warm
    assert given("x", "--steps", str(steps), "--warmup-steps", "7").warmup_steps == 7
    assert config().warmup_steps == 20
    with pytest.raises(ConfigError, match=r"^'steps' is -30: [^;]*$"):
        config(steps=-30)


def test_pairs_are_split_at_the_first_equals_sign_and_typed() -> None:
    made = given(
        *("x", "--methods", "convolution=lokr(factor=4)", "--ranks", "unet.mid*=16", "--optimizer-options"),
        *("d_coef=2", "safeguard_warmup=false"),
    )
    assert made.methods == {"convolution": "lokr(factor=4)"}
    assert made.ranks == {"unet.mid*": 16}
    assert made.optimizer_options == {"d_coef": 2.0, "safeguard_warmup": False}


@pytest.mark.parametrize("text", ["steps = ", "\xff\xfe", "steps = 3\nsteps = 4"])
def test_toml_that_is_none_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.toml").write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"a\.toml: "):
        given("x", "--config", str(tmp_path / "a.toml"))
    with pytest.raises(ConfigError, match=r"none\.toml: "):
        given("x", "--config", str(tmp_path / "none.toml"))


def test_toml_of_the_wrong_type_and_shortened_flags_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.toml").write_text("steps = true\n")
    with pytest.raises(ConfigError, match="'steps' is True, wanted a number"):
        given("x", "--config", str(tmp_path / "a.toml"))
    with pytest.raises(SystemExit):
        given("x", "--step", "7")
    assert "unknown flag --step: did you mean --steps?" in capsys.readouterr().err


ODD: dict[str, Any] = {
    "folder": Path('/tmp/it\'s a "folder" \\ ünï 🎉'),
    "caption": 'a "quoted" \\ back\tslash\nnew line = # [x]',
    "trigger": "œhwx",
    "learning_rates": {"text_encoder*": 5e-05, 'a "b"': 1e-20},
    "methods": {"convolution": "dora(lokr(factor=4))"},
    "ranks": {"unet.mid_block.*": 32},
    "optimizer_options": {"weight_lr_power": 1.0, "safeguard_warmup": False},
    "exports": {"style": "up_blocks.1*"},
    "timestep_range": (0.25, 0.75),
    "resolution": [512, 768],
    "sample_prompts": ["a fox", "", "ein Füchslein 🦊"],
    "log_with": [],
    "flip": True,
    "learning_rate": 1e-05,
    "seed": 2**62,
}


def test_toml_that_was_written_gives_the_same_config(tmp_path: Path) -> None:
    made = TrainConfig.of(ODD)
    (tmp_path / "c.toml").write_text(write_toml(made, {"seed": "as before"}), "utf-8")
    again = TrainConfig.of(read_toml(tmp_path / "c.toml"))
    absolute = {"output": made.output.absolute(), "folder": made.folder}
    assert again == made.model_copy(update=absolute)
    assert "seed = 4611686018427387904  # as before" in (tmp_path / "c.toml").read_text("utf-8")
    assert "# rank =  #" in write_toml(made)
    word = InversionConfig.of({"folder": tmp_path, "word": "<ohwx>", "output": tmp_path})
    (tmp_path / "w.toml").write_text(write_toml(word), "utf-8")
    assert InversionConfig.of(read_toml(tmp_path / "w.toml")) == word


def test_what_only_watches_or_says_where_does_not_change_the_identity() -> None:
    before = config().identity({})
    same = config(
        output="/elsewhere", checkpoint_every=7, pieces=2, checkpointing=True, formats=["kohya"], private=True
    )
    assert same.identity({}) == before
    for key, value in {"seed": 1, "steps": 999, "rank": 3, "ema": 0.9, "flip": True, "dropout": 0.1}.items():
        after = config(**{key: value}).identity({})
        assert [k for k in before if before[k] != after[k]] == [key]


# --- methods from text


@pytest.mark.parametrize(
    ("text", "defaults", "expected"),
    [
        ("lora", {}, LoRA()),
        ("lora", {"rank": 3, "alpha": 2.0}, LoRA(rank=3, alpha=2)),
        ("LoRA(rank=5)", {"rank": 3, "alpha": 2.0}, LoRA(rank=5, alpha=2)),
        ("dora", {"rank": 3}, DoRA(LoRA(rank=3))),
        ("dora(loha(rank=4))", {"rank": 3, "alpha": 1.0}, DoRA(LoHa(rank=4, alpha=1))),
        (" lokr ( factor = 4 ) ", {"rank": 3}, LoKr(rank=3, factor=4)),
        ("lokr(factor=-1)", {}, LoKr(factor=-1)),
        ("T-LoRA(rank=4)", {}, TLoRA(rank=4)),
        ("lokr(both=true, tucker=False)", {}, LoKr(both=True)),
    ],
)
def test_methods_are_read_from_text(text: str, defaults: dict[str, Any], expected: Method) -> None:
    assert spelling.method(text, defaults) == expected


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lorra", "no method 'lorra', did you mean 'lora'"),
        ("zzz", "no method 'zzz'; there are: lora"),
        ("lora(rang=3)", "lora has no field 'rang'; it has: rank"),
        ("trainable_tokens", "trainable_tokens needs tokens: trainable_tokens(tokens=...)"),
        ("lora(3)", "lora takes its fields by name: rank"),
        ("lora(rank=open('x'))", "rank is open('x'); wanted a number"),
        ("lora(", "is not NAME or NAME"),
        ("__import__('os')", "no method '__import__'"),
        ("os.system('x')", "wanted a name, and fields by name"),
        ("lora(**{})", "wanted a name, and fields by name"),
        ("lora; loha", "is not NAME or NAME"),
        ("", "is not NAME or NAME"),
        ("lora(rank=0)", "rank"),
        ("lora(rank='x')", "rank"),
        ("dora(lorra)", "did you mean 'lora'"),
        ("dora(dora)", "it works over additive methods: LoRA"),
        ("dora(lora, lora)", "dora takes one method in its brackets"),
        ("dora(lora, inner=3)", "dora takes one method in its brackets"),
    ],
)
def test_what_is_no_method_is_answered_with_the_way_out(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        spelling.method(text, {})
    assert said in str(error.value)


def test_ranks_and_methods_of_targets_go_on_those_layers_and_the_rest_has_the_main_one(pipe: Any) -> None:
    made = config(
        method="dora", rank=2, alpha=1, targets=["unet.mid_block*attn1*", "unet.conv_in"],
        ranks={"to_k": 3}, methods={"unet.conv_in": "lokr(factor=4)"},
    )  # fmt: skip
    recipe.put_on(made, pipe)
    rows = {(row.layer.rpartition(".attn1.")[2], row.key): tuple(row.parameter.shape) for row in recipe.tensors(pipe)}
    assert rows["to_k", "down"][0] == 3
    assert rows["to_q", "down"][0] == 2
    assert ("to_k", "magnitude") in rows
    assert {key for layer, key in rows if layer == "unet.conv_in"} >= {"w1"}


def test_settings_that_a_method_has_no_use_for_are_refused(pipe: Any) -> None:
    with pytest.raises(ConfigError, match="ia3 has no rank"):
        recipe.methods(config(method="ia3", rank=4))
    with pytest.raises(ConfigError, match="oft has no rank"):
        recipe.methods(config(method="oft", ranks={"to_q": 4}))
    assert set(recipe.methods(config(method="ia3", rank=4, methods={"to_q": "lora"}))) == {"to_q", "*"}
    with pytest.raises(TargetError):
        recipe.put_on(config(targets=["unet.mid*to_q"], ranks={"conv_nope": 4}), pipe)


# --- rates and optimisers


def rows() -> list[recipe.Tensor]:
    torch.manual_seed(0)
    shapes = {"down": (2, 3), "up": (4, 2)}
    return [
        recipe.Tensor(layer, key, nn.Parameter(torch.zeros(shape) if key == "up" else torch.randn(shape)))
        for layer in ("unet.a.to_q", "text_encoder.b.q_proj")
        for key, shape in shapes.items()
    ]


def test_rates_are_the_layers_own_and_lora_plus_speeds_up_what_starts_at_zero() -> None:
    made = config(learning_rate=1e-3, learning_rates={"text_encoder*": 1e-4}, lora_plus=8)
    trained = rows()
    found = {id(p): group["lr"] for group in recipe.groups(made, trained) for p in group["params"]}
    assert [found[id(row.parameter)] for row in trained] == pytest.approx([1e-3, 8e-3, 1e-4, 8e-4])
    assert all(group["peak"] == group["lr"] for group in recipe.groups(made, trained))
    plain = recipe.groups(config(learning_rate=1e-3), trained)
    assert [len(group["params"]) for group in plain] == [4]
    with pytest.raises(ConfigError, match=r"learning_rates names text_encoder_2\*, which no trained layer matches"):
        recipe.groups(config(learning_rates={"text_encoder_2*": 1e-4}), trained)


def test_rates_are_of_tensors_too_and_the_first_glob_that_matches_counts() -> None:
    trained = rows()
    wanted = {"unet.*.down": 2.0, "text_encoder*": 3.0, "*.up": 4.0}
    found = {id(p): g["lr"] for g in recipe.groups(config(learning_rates=wanted), trained) for p in g["params"]}
    assert [found[id(row.parameter)] for row in trained] == [2.0, 4.0, 3.0, 3.0]
    with pytest.raises(ConfigError, match=r"names \*\.bank, which no .* none of its tensors \(down, up\)"):
        recipe.groups(config(learning_rates={"*.bank": 1.0}), trained)


def test_lora_plus_needs_tensors_that_start_at_zero() -> None:
    trained = [row for row in rows() if row.key == "down"]
    with pytest.raises(ConfigError, match="lora_plus is for tensors that start at zero, and lora has none"):
        recipe.groups(config(lora_plus=4), trained)


def test_the_names_of_optimisers_are_those_that_can_be_built() -> None:
    assert set(OPTIMIZERS) == set(optimizers.KINDS)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimiser_has_the_rates_the_decay_and_its_options(name: str) -> None:
    made = config(optimizer=name, learning_rate=0.5, weight_decay=0.25)
    found = optimizers.build(made, recipe.groups(made, rows()))
    assert type(found).__name__ == optimizers.KINDS[name].name
    (group,) = found.param_groups
    assert (group["lr"], group["peak"], group["weight_decay"]) == (0.5, 0.5, 0.25)
    for option, value in optimizers.KINDS[name].options.items():
        assert group.get(option, value) == value
    bad = config(optimizer=name, learning_rate=0.5, optimizer_options={"beta": 1})
    with pytest.raises(ConfigError, match=f"{name} has no option 'beta'; it has: "):
        optimizers.build(bad, recipe.groups(bad, rows()))


def test_prodigy_with_the_rate_of_another_optimiser_is_refused() -> None:
    groups = [{"params": [nn.Parameter(torch.ones(2))], "lr": 1e-4}]
    with pytest.raises(
        ConfigError, match=r"learning_rate is a factor of it, usually 1; it is 0.0001, .*--learning-rate 1"
    ):
        optimizers.build(config(optimizer="prodigy"), groups)
    optimizers.build(config(optimizer="prodigy", learning_rate=0.5), [{**groups[0], "lr": 0.5}])


def test_a_base_in_toml_counts_from_the_file_where_it_is_there(tmp_path: Path) -> None:
    (tmp_path / "bases" / "mine").mkdir(parents=True)
    for base, wanted in (("bases/mine", str(tmp_path / "bases" / "mine")), ("sdxl", "sdxl"), ("a/b", "a/b")):
        (tmp_path / "a.toml").write_text(f'base = "{base}"\n')
        assert read_toml(tmp_path / "a.toml")["base"] == wanted


def test_prodigy_has_one_rate_and_says_so() -> None:
    for more in ({"lora_plus": 4}, {"learning_rates": {"text_encoder*": 0.5}}):
        made = config(optimizer="prodigy", learning_rate=1, **more)
        with pytest.raises(ConfigError, match="finds one rate for all tensors"):
            optimizers.build(made, recipe.groups(made, rows()))
