"""verify: whether a merged file is what the recipe in it makes of the inputs it names."""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

import torch

from imgadapt import __version__
from imgadapt.combining.checkpoints.base import base_path, open_base
from imgadapt.combining.combine import Progress, in_memory
from imgadapt.combining.engine import Engine
from imgadapt.combining.files import base_digest, digest_of, merge_files
from imgadapt.combining.recipe import Entry, MergeRecipe
from imgadapt.combining.recipes import KEY, recipe_in
from imgadapt.errors import ConfigError, FormatError, ImgadaptError, first_few
from imgadapt.file import AdapterFile, load, save

_ENDS = (".safetensors", ".pt", ".bin", ".pth", ".ckpt", ".png", ".webp")
_ROUNDING = 1e-3  # of merged changes, from one machine to another; fp16 and bf16 files are within it


@dataclass(frozen=True)
class Verdict:
    """identical: to the byte. found: where each input was. difference: relative Frobenius norm of the difference of all
    changes (0 where they are the same; infinity where layers are other ones). reasons: what is not the same.
    """

    identical: bool
    found: tuple[Path, ...]
    difference: float = 0.0
    reasons: tuple[str, ...] = ()


def verify(
    path: Path, look_in: Path | None = None, *, base: str | None = None, progress: Progress | None = None
) -> Verdict:
    """Make a merged file again by its recipe, and compare. Where the recipe has no format, `path`'s own will do.

    Inputs are looked for where the recipe says (from here, and from the file's folder), beside the file, and by their
    SHA-256 in the folder `look_in` (which may be the base itself) and those below it. base: where the base is.

    Raises:
        FormatError: the file has no recipe; an input or the base is not found, or is another than it was.
        ConfigError: a base is given, and the recipe has none.
        ConfigError, StateError: see `combine`.
    """
    file = load(path)
    recipe, version = recipe_in(file.metadata, path)
    places = {_key(entry): _found(entry, path, look_in) for entry in recipe.inputs}
    if recipe.base is not None:
        of = Entry(recipe.base, sha256=recipe.base_sha256)
        embedded = recipe.base == "demo" and _digest(base_path("demo")) == recipe.base_sha256  # or /home/me/demo
        there = Entry(str(base_path("demo")), sha256=recipe.base_sha256) if embedded else of
        places[_key(of)] = _found(there, path, look_in) if base is None else base_path(base)
    elif base is not None:
        raise ConfigError(f"{path} was made without a base; leave out {base} (--base)")

    def find(entry: Entry) -> Path:
        return places[_key(entry)]

    made, _ = merge_files(recipe, find=find, version=version or __version__, progress=progress)
    found = tuple(find(entry) for entry in recipe.inputs)
    with tempfile.TemporaryDirectory() as folder:
        again = save(made, Path(folder) / (path.name if path.is_dir() else "again.safetensors"), format=recipe.format)
        if _same_files(path, again):
            return Verdict(True, found)
        loaded = load(again)
        if recipe.format is None and loaded.format != file.format:  # `combine`, and `save` in a format of one's own
            own = _in_format(made, file.format, Path(folder) / f"own_{again.name}")
            if own is not None and _same_files(path, own):
                return Verdict(True, found)
            loaded = loaded if own is None else load(own)
        difference, reasons = _compared(file, loaded)
        if version != __version__:
            reasons = [*reasons, f"imgadapt {version} wrote it, and this is {__version__}"]
        return Verdict(False, found, difference, tuple(reasons))


def _key(entry: Entry) -> tuple[str, str]:
    return str(entry.path), entry.sha256


def _in_format(made: AdapterFile, format: str | None, path: Path) -> Path | None:
    """Where it is written in a format; None: that cannot say it."""
    try:
        return save(made, path, format=format)
    except FormatError:
        return None


def _found(entry: Entry, path: Path, look_in: Path | None) -> Path:
    """Where an entry's file is.

    Raises:
        FormatError: nowhere, or what is there is another.
    """
    said, name = Path(entry.path), PureWindowsPath(entry.path).name
    folders = [path.parent, *([look_in] if look_in is not None else [])]
    places = dict.fromkeys([said, path.parent / said, *(folder / name for folder in folders)])
    others: dict[Path, str] = {}
    for place in (place for place in places if _may_be(place)):
        if (digest := _digest(place)) == entry.sha256:
            return place
        others |= {} if digest is None else {place: digest}
    for place in _files(look_in):
        if place not in others and _digest(place) == entry.sha256:
            return place
    wanted = f"SHA-256 {entry.sha256[:12]}..."
    if others:
        place, digest = next(iter(others.items()))
        raise FormatError(
            f"{place} has changed since {path} was made of it: {wanted} then, {digest[:12]}... now; "
            f"look for the old one with --look-in FOLDER"
        )
    seen = f"nor by its hash in {look_in}" if look_in else "look in a folder by its hash with --look-in FOLDER"
    raise FormatError(f"{entry.path} ({wanted}) is neither there nor beside {path}; {seen}")


def _may_be(place: Path) -> bool:
    """Whether an input can be there: the recipe is in the file, from anyone, and no other file is read for it."""
    try:
        return place.is_dir() or (place.is_file() and place.suffix.lower() in _ENDS)
    except (OSError, ValueError):  # no path at all
        return False


def _digest(place: Path) -> str | None:
    """None: it is a folder, neither peft's nor a base's."""
    if not place.is_dir() or (place / "adapter_config.json").is_file():
        return digest_of(place)
    try:
        return base_digest(open_base(place))
    except ImgadaptError:
        return None


def _files(folder: Path | None) -> Iterator[Path]:
    """The folder itself, and files and folders of peft's and of diffusers' in it, in order."""
    if folder is None:
        return
    yield folder
    for place in sorted(folder.rglob("*")):
        if place.is_file() and place.suffix.lower() in _ENDS:
            yield place.parent if place.stem == "adapter_model" else place
        elif place.name == "model_index.json":
            yield place.parent


def _same_files(path: Path, again: Path) -> bool:
    if not path.is_dir():
        return digest_of(path) == digest_of(again)
    names = ("adapter_model.safetensors", "adapter_config.json")
    return all((path / name).read_bytes() == (again / name).read_bytes() for name in names)


def _compared(file: AdapterFile, again: AdapterFile) -> tuple[float, list[str]]:
    """Relative difference of all changes, and what is not the same."""
    reasons: list[str] = []
    if file.format != again.format:
        reasons.append(f"it is in {file.format} format, and the recipe makes {again.format}")
    data = [{k: v for k, v in one.metadata.items() if k != KEY and not k.startswith("sshs_")} for one in (file, again)]
    if keys := sorted(key for key in data[0].keys() | data[1].keys() if data[0].get(key) != data[1].get(key)):
        reasons.append(f"its metadata says otherwise: {first_few(keys)}")
    if words := sorted(t for t in file.embeddings.keys() | again.embeddings.keys() if not _same_word(file, again, t)):
        reasons.append(f"its words are others: {first_few(words)}")
    if layers := sorted(file.parts.keys() ^ again.parts.keys()):
        reasons.append(f"{len(layers)} layers are in one of them only: {first_few(layers)}")
        return float("inf"), reasons
    other = sorted(name for name in file.parts if not _same_part(file, again, name))
    if not other:
        return 0.0, reasons
    reasons.append(f"{len(other)} of {len(file.parts)} layers have other tensors: {first_few(other)}")
    return _distance(file, again, other), reasons


def _same_word(file: AdapterFile, again: AdapterFile, token: str) -> bool:
    own = [one.embeddings[token].vectors for one in (file, again) if token in one.embeddings]
    return len(own) == 2 and own[0].keys() == own[1].keys() and all(torch.equal(own[0][k], own[1][k]) for k in own[0])


def _same_part(file: AdapterFile, again: AdapterFile, name: str) -> bool:
    a, b = file.parts[name], again.parts[name]
    same = a.method == b.method and a.tensors.keys() == b.tensors.keys()
    return same and all(torch.equal(a.tensors[key], b.tensors[key]) for key in a.tensors)


def _distance(file: AdapterFile, again: AdapterFile, layers: Sequence[str]) -> float:
    """Relative Frobenius norm of the difference: of the changes where factors make them, else of the tensors."""
    signs = {"file": 1.0, "again": -1.0}
    inputs = [
        in_memory(one, name, lambda _, s=s: s) for one, (name, s) in zip((file, again), signs.items(), strict=True)
    ]
    try:
        engine = Engine(MergeRecipe((Entry("file"), Entry("again", -1.0))), inputs, None)
        apart = total = 0.0
        for made in engine.merged():
            apart += made.norm**2 + (0.0 if made.bias is None else float(made.bias.double().norm()) ** 2)
            total += float(made.gram.diagonal()[[engine.inputs[k].name for k in made.who].index("again")])
        return (apart / total) ** 0.5 if total else float("inf")
    except ImgadaptError:  # rotations, which have no change without the base
        return max(_tensors_apart(file, again, name) for name in layers)


def _tensors_apart(file: AdapterFile, again: AdapterFile, name: str) -> float:
    a, b = file.parts[name].tensors, again.parts[name].tensors
    if a.keys() != b.keys() or any(a[key].shape != b[key].shape for key in a):
        return float("inf")
    apart = sum(float((a[key].double() - b[key].double()).norm()) ** 2 for key in a)
    return (apart / max(1e-300, sum(float(b[key].double().norm()) ** 2 for key in b))) ** 0.5


def said(path: Path, verdict: Verdict) -> Iterator[str]:
    """A verdict as text."""
    names = ", ".join(dict.fromkeys(map(str, verdict.found)))
    if verdict.identical:
        yield f"identical: {path} is what its recipe makes of {names}"
        return
    if verdict.difference <= _ROUNDING:
        how = (
            "the changes are the same" if verdict.difference == 0 else f"the changes differ by {verdict.difference:.1e}"
        )
        yield f"NOT the same bytes: of {names} its recipe makes another file than {path}; {how}"
        if verdict.difference > 0:
            yield "  so little may come of another CPU or another version of torch, or the file was changed"
    else:
        yield f"NOT the same: of {names} its recipe makes other changes than {path} has (by {verdict.difference:.2g})"
    for reason in verdict.reasons:
        yield f"  {reason}"
