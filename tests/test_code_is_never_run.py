"""Code that comes with files is never run: in pickles, and in the folders of bases, whatever asks for it there."""

import ast
import json
import pickle
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import imgadapt
from imgadapt.demo import PIPELINE
from imgadapt.errors import ConfigError, FormatError, ImgadaptError
from imgadapt.training import families

ROOT = Path(__file__).parents[1]
PROGRAMS = [path for name in ("imgadapt", "converters", "train_scripts", "ui", "supply")
            for path in (ROOT / name).rglob("*.py")]  # fmt: skip


class _Trap:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, left: Path) -> None:
        self.left = left

    def __reduce__(self) -> Any:
        return Path.touch, (self.left,)


def test_the_trap_shuts_where_code_is_run(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(_Trap(tmp_path / "left")))
    assert (tmp_path / "left").exists()


@pytest.mark.parametrize("name", ["x.pt", "x.bin", "x.ckpt", "x.safetensors"])
@pytest.mark.parametrize("protocol", [0, 2, 5])
@pytest.mark.parametrize("asked", [False, True])
def test_a_pickle_that_runs_code_is_refused_and_its_code_is_not_run(
    tmp_path: Path, name: str, protocol: int, asked: bool
) -> None:
    left = tmp_path / "left"
    (tmp_path / name).write_bytes(pickle.dumps({"a.lora_up.weight": _Trap(left)}, protocol))
    with pytest.raises(FormatError):
        imgadapt.load(tmp_path / name, pickle=asked)
    assert not left.exists()


@pytest.mark.parametrize("name", ["x.pt", "x.bin", "x.ckpt", "x.pth", "x.safetensors"])
def test_a_pickled_base_that_runs_code_is_refused_and_its_code_is_not_run(tmp_path: Path, name: str) -> None:
    left = tmp_path / "left"
    (tmp_path / name).write_bytes(pickle.dumps({"model.diffusion_model.x": _Trap(left)}, 2))
    with pytest.raises(ImgadaptError):
        families.load(str(tmp_path / name))
    assert not left.exists()


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("model_index.json", {"unet": ["trap", "Trap"]}),
        ("model_index.json", {"unet": ["unet.trap", "Trap"]}),
        ("model_index.json", {"scheduler": ["os", "system"]}),
        ("model_index.json", {"_class_name": ["trap", "Trap"]}),
        ("model_index.json", {"_class_name": "trap"}),
        ("model_index.json", {"_custom_pipeline": "trap", "custom_pipeline": "trap"}),
        ("unet/config.json", {"_class_name": "Trap", "auto_map": {"AutoModel": "trap.Trap"}}),
        ("text_encoder/config.json", {"auto_map": {"AutoModel": "trap.Trap", "AutoConfig": "trap.Trap"}}),
        ("text_encoder/config.json", {"_attn_implementation_internal": "someone/kernels"}),
        ("text_encoder/config.json", {"_attn_implementation": "someone/kernels"}),
        ("tokenizer/tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["trap.Trap", "trap.Trap"]}}),
    ],
)
def test_the_code_in_a_bases_folder_is_not_run(
    tmp_path: Path, file: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A base may load without it, or be refused; there is no network for what it would fetch (conftest.py looks)."""
    folder, left = tmp_path / "base", tmp_path / "left"
    shutil.copytree(PIPELINE, folder)
    trap = f"from pathlib import Path\nPath({str(left)!r}).touch()\nclass Trap:\n    pass\n"
    for place in (folder, *(path for path in folder.iterdir() if path.is_dir())):
        for name in ("trap.py", "pipeline.py", "Trap.py", "__init__.py", "diffusers.py", "transformers.py"):
            (place / name).write_text(trap)
    if (folder / file).exists():
        settings = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(settings | changes))
    monkeypatch.chdir(folder)
    with suppress(ConfigError):
        families.load(str(folder))
    assert not left.exists()
    assert "trap" not in sys.modules


FORBIDDEN = {
    "eval", "exec", "compile", "__import__", "pickle.load", "pickle.loads", "os.system", "os.popen", "marshal.loads",
    "yaml.load", "yaml.unsafe_load", "extractall", "shell=True", "trust_remote_code=True", "weights_only=False",
    "autoescape=False",
}  # fmt: skip


def test_no_line_of_ours_runs_text_opens_a_shell_or_unpacks_unseen() -> None:
    found = {f"{path.relative_to(ROOT)}: {name}" for path in PROGRAMS for name in _risky(ast.parse(path.read_text()))}
    assert found == set()


def test_such_lines_would_be_seen() -> None:
    code = (
        "eval('1'); pickle.load(f); subprocess.run('x', shell=True); z.extractall(p); torch.load(p); "
        "f(weights_only=False); jinja2.Environment(); m.eval(); torch.compile(m); re.compile('')"
    )
    assert set(_risky(ast.parse(code))) == {
        "eval", "pickle.load", "shell=True", "extractall", "torch.load without weights_only=True", "weights_only=False",
        "jinja2.Environment without autoescape=True",
    }  # fmt: skip


def _risky(tree: ast.AST) -> list[str]:
    found: list[str] = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        given = {f"{word.arg}={ast.unparse(word.value)}" for word in node.keywords}
        found += FORBIDDEN & ({called, called.rpartition(".")[2] if called.endswith("extractall") else called} | given)
        for name, wanted in (("torch.load", "weights_only=True"), ("jinja2.Environment", "autoescape=True")):
            if called == name and wanted not in given:
                found.append(f"{name} without {wanted}")
    return found
