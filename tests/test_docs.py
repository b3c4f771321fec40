"""What the pages show runs; what the README's tables list is what there is."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import imgadapt
from imgadapt import LoRA, cli
from imgadapt.arch import architectures
from imgadapt.combining.recipes import from_toml
from imgadapt.combining.rules import RULES
from imgadapt.formats import FORMATS
from imgadapt.methods import METHODS
from imgadapt.training import flags, plan, recipe

ROOT = Path(__file__).parents[1]
_BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize(
    "page", ["README.md", *(f"docs/{name}.md" for name in ("models", "methods", "prompting", "formats", "merging"))]
)
def test_every_snippet_of_a_page_runs(page: str, pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("demo_out").mkdir()
    imgadapt.attach(pipe, LoRA(rank=2))
    for tensor in imgadapt.parameters(pipe):
        torch.nn.init.normal_(tensor, std=0.05)  # as trained: a merge of nothing is an error
    for path in ("demo_out/style.safetensors", "other.safetensors"):  # what the README says `make demo` made
        imgadapt.save(imgadapt.collect(pipe), path)
    imgadapt.detach(pipe)
    monkeypatch.setattr(imgadapt.demo, "pipeline", lambda: pipe)
    blocks = _BLOCK.findall((ROOT / page).read_text("utf-8"))
    assert len(blocks) >= (1 if page == "docs/merging.md" else 3)
    names: dict[str, Any] = {"torch": torch, "unet": pipe.unet, "optimizer": None}
    for block in blocks:
        exec(compile(block, page, "exec"), names)
        if page == "README.md" and "saved" not in names and imgadapt.adapters(pipe):
            imgadapt.detach(pipe)


def test_the_readme_lists_the_usual_methods_once_and_counts_all() -> None:
    page = (ROOT / "README.md").read_text("utf-8")
    listed = list(dict.fromkeys(re.findall(r"^\| `(\w+)\(", page, re.MULTILINE)))
    assert listed == [method.__name__ for method in METHODS if method.__name__ in listed]
    assert "LoRA" in listed
    assert re.findall(r"(?:has all|the) (\d+)(?:,| of)", page) == [str(len(METHODS))] * 2


def test_the_page_of_formats_lists_every_format_and_architecture_once() -> None:
    page = (ROOT / "docs/formats.md").read_text("utf-8")
    assert re.findall(r"^\| `([\w-]+)` \| ", page.partition("## The architectures")[0], re.MULTILINE) == [
        form.name for form in FORMATS
    ]
    table = page.partition("## The architectures")[2].partition("They are derived")[0]
    cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    named = [name for cell in cells for name in re.findall(r"`(\w+)`", cell)]
    assert sorted(named) == [a.name for a in architectures()]


def test_every_command_shown_has_the_flags_of_its_program(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    shown: dict[str, set[str]] = {}
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for block in re.findall(r"^```sh\n(.*?)^```", page.read_text("utf-8"), re.DOTALL | re.MULTILINE):
            for line in block.replace("\\\n", " ").splitlines():
                if found := re.match(r"imgadapt (\w+)", line):
                    shown.setdefault(found[1], set()).update(
                        re.findall(r"(?<!\S)--[a-z][a-z_-]+", line.partition(" # ")[0])
                    )
    assert {"train", "style", "generate", "show", "convert", "merge", "bake", "extract", "resize", "zip"} <= set(shown)
    for name, flags_shown in shown.items():
        with pytest.raises(SystemExit):
            run(name, ["--help"])
        known = set(re.findall(r"(?<!\w)--[a-z][a-z_-]+", capsys.readouterr().out))
        known |= {
            f"--{option.replace('_', '-')}" for rule in RULES for option in rule.options if name in ("merge", "bake")
        }
        assert flags_shown <= known, name


def test_the_page_of_merging_lists_every_rule_once_and_its_recipe_is_one() -> None:
    page = (ROOT / "docs/merging.md").read_text("utf-8")
    table = page.partition("## The rules")[2].partition("## What they keep")[0]
    assert re.findall(r"^\| `(\w+)` \| ", table, re.MULTILINE) == [rule.name for rule in RULES]
    for name, low in re.findall(r"^\| `(\w+)` \|[^|]*\| (\w+) \|", table, re.MULTILINE):
        rule = next(rule for rule in RULES if rule.name == name)
        assert low == ("no" if rule.elements else "rotations" if rule.rotations else "yes"), name
    recipe = re.search(r"^```toml\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    assert recipe
    assert from_toml(recipe[1]).rule == "ties"


def test_every_method_has_its_section_or_its_row() -> None:
    page = (ROOT / "docs/methods.md").read_text("utf-8")
    for method in METHODS:
        shown = rf"^(## .*\b{method.__name__}\b|\| [^|]+ \| `{method.__name__}\()"
        assert re.search(shown, page, re.MULTILINE), method.__name__


def test_every_flag_program_and_config_of_the_page_of_training_is_there() -> None:
    page = (ROOT / "docs/training.md").read_text("utf-8")
    fields = {name for _, kind in plan.PROGRAMS.values() for name in kind.model_fields}
    others = {"kind", "config", "help", "output", "adapter", "strength", "to", "plan", "base", "index-url"}
    others |= {"num_processes", "module", "nproc-per-node"}  # accelerate's and torchrun's
    others |= {"first", "average-times"}  # of resize and convert
    named = [flag.removeprefix("no-") for flag in re.findall(r"--([a-z][a-z_-]+)", page)]
    assert {f for f in named if f.replace("-", "_") not in fields and f not in others} == set()
    programs = re.findall(r"^imgadapt (\w+)", page, re.MULTILINE)
    assert {"train", "check", "style"} <= set(programs) <= set(cli.PROGRAMS)


@pytest.mark.parametrize("path", sorted((ROOT / "train_scripts" / "configs").glob("*.toml")), ids=lambda p: p.stem)
def test_every_config_to_copy_is_one_of_the_program_that_it_names(path: Path) -> None:
    program = re.search(r"imgadapt (\w+) ", path.read_text("utf-8"))
    assert program
    kinds = dict(plan.PROGRAMS.values())
    values = {"folder": path.parent, "trigger": "ohwx", **flags.read_toml(path)}
    config = kinds[program[1]].of(values)
    recipe.methods(config)
