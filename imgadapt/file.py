"""AdapterFile, and reading and writing it as safetensors."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from imgadapt.arch import Architecture, architectures
from imgadapt.atomic import write_bytes
from imgadapt.collector import uncollected
from imgadapt.embeddings import Embedding, read_embeddings, write_embeddings
from imgadapt.errors import ConfigError, FormatError, first_few, shortened
from imgadapt.formats import DIFFUSERS, FORMATS, Format, Parts, Step, Writer, architecture_of, exact_alpha, read, write
from imgadapt.formats.kohya import HASHES
from imgadapt.formats.layer_config import LONGEST_JSON, PEFT_KEY
from imgadapt.header import opened
from imgadapt.kinds import START, is_torch_zip
from imgadapt.pickles import is_picture, read_pickle, read_picture
from imgadapt.prompting.files import KEY as PROMPTS_KEY
from imgadapt.prompting.files import read_prompts, write_prompts
from imgadapt.prompting.kind import Prompts
from imgadapt.tensors import DTYPES, bytes_of, header_bytes, read_outline, read_tensors, write_tensors
from imgadapt.together import together

_CONFIG = "adapter_config.json"  # of peft's folder

_Contents = tuple[dict[str, Tensor], dict[str, str]]
_LONGEST = 2000  # characters of what is wrong with a file


@dataclass(frozen=True)
class AdapterFile:
    """An adapter: its layers under canonical names, its embeddings by their tokens, its learned prompt, its metadata.

    format, architecture: the tables that knew the file it came from; None for one that was never in a file, or whose
        architecture has no table.
    unknown: keys that a `load(..., strict=False)` left out, and why ("": no table knows them).
    """

    parts: Parts = field(repr=False)
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])
    format: str | None = None
    architecture: str | None = None
    unknown: Mapping[str, str] = field(default_factory=dict[str, str])
    embeddings: Mapping[str, Embedding] = field(default_factory=dict[str, Embedding])
    prompts: Prompts | None = None


def load(path: str | PathLike[str], *, strict: bool = True, pickle: bool = False) -> AdapterFile:
    """Read an adapter that any known tool wrote: a .safetensors file, a folder of peft's, or a picture with an
    embedding in it. A file is known by its content, whatever it is called.

    strict: what no table knows is an error; else it is listed in `unknown`. pickle: whether torch's pickles (.bin, .pt)
        are read, too, as data only; the format can hold code, and readers of it have been fooled.

    Raises:
        FormatError: there is no such file, it is not whole, or it is not an adapter that imgadapt knows.
    """
    with uncollected():
        return _load(Path(path), lambda place: _file(place, pickle), strict=strict)


def outline(path: str | PathLike[str], *, strict: bool = True) -> AdapterFile:
    """An adapter as its header tells it: as `load`, but of tensors only lone numbers (alphas) are read; zeros stand for
    all others, and take no memory.

    Raises:
        FormatError: as `load`.
    """
    with uncollected():
        return _load(Path(path), read_outline, strict=strict)


def _load(path: Path, contents: Callable[[Path], _Contents], *, strict: bool) -> AdapterFile:
    tensors, metadata = _folder_or_file(path, contents)
    try:
        prompts, taken = read_prompts(tensors, metadata)
        rest = {key: tensor for key, tensor in tensors.items() if key not in set(taken)}
        embeddings, keys = read_embeddings(rest, metadata, path.stem)
        words = set(keys)
        rest = {key: tensor for key, tensor in rest.items() if key not in words}
        if prompts and not rest:
            form = "imgadapt" if PROMPTS_KEY in metadata else "peft"
            return AdapterFile({}, metadata, form, None, {}, embeddings, prompts)
        if embeddings and not rest:
            return AdapterFile({}, metadata, "embedding", None, {}, embeddings)
        reading = read(rest, metadata, architectures(), strict=strict)
    except FormatError as error:
        raise FormatError(f"{path}: {shortened(str(error), _LONGEST)}") from error
    known = reading.format, reading.architecture, reading.unknown
    return AdapterFile(reading.parts, metadata, *known, embeddings, prompts)


def _folder_or_file(path: Path, contents: Callable[[Path], _Contents]) -> _Contents:
    """Tensors and metadata of a file, or of a folder that peft wrote."""
    if path.is_dir():
        files = [one for end in ("safetensors", "bin") if (one := path / f"adapter_model.{end}").is_file()]
        if not (path / _CONFIG).is_file() or not files:
            raise FormatError(f"{path}: a folder without {_CONFIG} and adapter_model.safetensors, as peft writes")
        return _with_config(files[0], contents)
    if path.stem == "adapter_model" and (path.parent / _CONFIG).is_file():
        return _with_config(path, contents)  # peft's file says nothing of alpha, the config beside it does
    return contents(path)


def _with_config(path: Path, contents: Callable[[Path], _Contents]) -> _Contents:
    tensors, metadata = contents(path)
    with opened(path.parent / _CONFIG) as file:
        config = file.read(LONGEST_JSON + 1)
        if len(config) > LONGEST_JSON:
            raise FormatError("it is larger than any config of peft's")
        try:
            return tensors, {**metadata, PEFT_KEY: config.decode()}
        except UnicodeDecodeError as error:
            raise FormatError(f"no UTF-8 text: {error}") from error


def _file(path: Path, pickle: bool) -> _Contents:
    with opened(path) as file:
        start = file.read(START)
    if start[8:9] == b"{":  # safetensors begins with the length of its JSON
        return read_tensors(path)
    if is_picture(start):
        return read_picture(path)
    if pickle and start[:2] == b"PK":
        return read_pickle(path)
    if is_torch_zip(start):
        raise FormatError(
            f"{path}: a pickle, as torch.save writes; such files can hold code. If you trust whoever made it, "
            "`imgadapt show --pickle FILE` tells what is in it, `imgadapt convert --pickle FILE --to FORMAT` makes a "
            ".safetensors of it, and in Python load(path, pickle=True) reads its tensors"
        )
    return read_tensors(path)  # which says what is wrong


def plan(file: AdapterFile, format: str) -> list[Step]:
    """What writing a file in a format costs, layer by layer, before anything is written.

    Raises:
        ConfigError: no such format. FormatError: it has no word for the file's learned prompt.
    """
    _learned(file, _format(format))
    return Writer(_format(format), _architecture(file), architectures()).steps(file.parts)


def save(
    file: AdapterFile,
    path: str | PathLike[str],
    *,
    format: str | None = None,
    dtype: torch.dtype | None = None,
    dense: bool = False,
) -> Path:
    """Write an adapter in a tool's format; the file is whole or, on any failure, as before. Returns its path.

    format: a name of `imgadapt.formats.FORMATS`; None: the one it came in, or "diffusers" where that has a word for all
        of it (LoRA), else "imgadapt". "peft" writes a folder where the path has no suffix. dtype: cast the tensors
        (None: keep theirs). dense: write whole differences of what the format has no word for (see `plan`).
    The same adapter gives the same bytes. What has not changed since it was read in this format is written as it was.

    Raises:
        ConfigError: no such format, a name that ends as pickles' do, or a dtype that is not of floating-point numbers.
        FormatError: the format cannot say what the adapter holds, or that is not finite (in `dtype`).
        OutputError: the file cannot be written.
    """
    if not isinstance(file, AdapterFile):
        raise ConfigError(
            f"{type(file).__name__} is no adapter; wanted what `load` or `collect` gave, and then the path"
        )
    if Path(path).suffix.lower() in (".pt", ".pth", ".bin", ".ckpt"):
        raise ConfigError(f"{path}: only safetensors is written; other tools would take this name for a pickle")
    architecture = _architecture(file)
    form = _default(file, architecture) if format is None else _format(format)
    if format is None and file.prompts and not (form.name == file.format == "peft"):
        form = _format("imgadapt")
    if dtype is not None and not (dtype in DTYPES and dtype.is_floating_point):
        raise ConfigError(f"an adapter cannot be written as {dtype}; wanted a floating-point dtype of safetensors")
    mine = {*form.own_metadata} if form.name == file.format else set[str]()
    others = {PROMPTS_KEY, *(key for f in FORMATS for key in f.own_metadata)} - mine
    kept = {key: value for key, value in file.metadata.items() if key not in others}
    if file.parts or not (file.embeddings or file.prompts):
        tensors, metadata = write(Writer(form, architecture, architectures(), dense), file.parts, kept)
    else:
        tensors, metadata = {}, kept
    if file.embeddings:
        own = {"diffusers": "diffusers", "kohya": "kohya", "onetrainer": "pair"}
        in_form = write_embeddings(file.embeddings, "bundled" if file.parts else own.get(format or ""))  # pyright: ignore[reportArgumentType] # they are forms
        tensors = {**tensors, **in_form}
    learned, told = _learned(file, form)
    tensors, metadata = {**tensors, **learned}, {**metadata, **told}
    if dtype is not None:
        tensors = exact_alpha(tensors, dtype)
    if broken := [key for key, tensor in tensors.items() if not is_finite(tensor)]:
        raise FormatError(f"NaN or infinity in {first_few(broken)}; {path} is not written")
    of = {part.source.of if part.source and part.source.format == form.name else 0 for part in file.parts.values()}
    untouched = dtype is None and of == {len(tensors)} and HASHES[0] in metadata and _as_read(form, file, architecture)
    if HASHES[0] in form.own_metadata and file.parts and not untouched:  # LyCORIS hashes in an order of its own
        metadata |= _kohya_hashes(tensors, metadata)
    path = Path(path)
    if form.name == "peft" and not path.suffix:
        config = metadata.pop(PEFT_KEY, None) or form.metadata(file.parts, {})[PEFT_KEY]
        text = json.dumps(json.loads(config), indent=2)  # alpha is in it: it goes with these weights and no others
        with together(path, _CONFIG) as folder:
            write_tensors(folder / "adapter_model.safetensors", tensors, metadata)
            write_bytes(folder / _CONFIG, text.encode())
        return path
    write_tensors(path, tensors, metadata)
    return path


def _learned(file: AdapterFile, form: Format) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors by key, metadata) of a learned prompt."""
    if file.prompts is None:
        return {}, {}
    if (file.parts or file.embeddings) and form.name == "peft":
        raise FormatError("peft has learned prompts and layers in files of their own; wanted format='imgadapt'")
    return write_prompts(file.prompts, form.name)


def _as_read(form: Format, file: AdapterFile, architecture: Architecture | None) -> bool:
    return all(step.verbatim for step in Writer(form, architecture, ()).steps(file.parts))


def _format(name: str) -> Format:
    form = next((f for f in FORMATS if f.name == name), None)
    if form is None:
        raise ConfigError(f"no format '{name}'; there are: {', '.join(f.name for f in FORMATS)}")
    return form


def _default(file: AdapterFile, architecture: Architecture | None) -> Format:
    came_in = [f for f in FORMATS if f.name == file.format]
    for form in (*came_in, DIFFUSERS):
        if all(
            step.loss in ("exact", "aligned") for step in Writer(form, architecture, architectures()).steps(file.parts)
        ):
            return form
    return _format("imgadapt")


def _architecture(file: AdapterFile) -> Architecture | None:
    named = next((a for a in architectures() if a.name == file.architecture), None)
    return named if named is not None else architecture_of(file.parts, architectures())


def is_finite(tensor: Tensor) -> bool:
    """Whether there is no NaN and no infinity in it."""
    if not tensor.is_floating_point():
        return True
    # one pass, for NaN and infinity go through a sum; what is only too large for it is looked at closely
    return bool(torch.isfinite(tensor.sum(dtype=torch.float32))) or bool(torch.isfinite(tensor.float()).all())


def _kohya_hashes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """What sd-scripts writes of a file: SHA-256 of all its tensors, and A1111's older one, of 64 KiB at 1 MiB, where
    the file has the `ss_` entries alone (library/train_util.py: precalculate_safetensors_hashes). LyCORIS writes 0x
    before the first.
    """
    text, order = header_bytes(tensors, {key: value for key, value in metadata.items() if key.startswith("ss_")})
    model, legacy, place = hashlib.sha256(), hashlib.sha256(), 0
    for chunk in (text, *(bytes_of(tensors[name]) for name in order)):
        model.update(chunk if place else b"")
        first, last = max(0, 0x100000 - place), max(0, 0x110000 - place)
        legacy.update(chunk[first:last])
        place += len(chunk)
    start = "0x" if metadata.get(HASHES[0], "").startswith("0x") else ""
    return {HASHES[0]: start + model.hexdigest(), HASHES[1]: legacy.hexdigest()[:8]}
