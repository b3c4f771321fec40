"""Records: what made a picture, in its PNG: A1111's `parameters` for everyone, and JSON that restores all of it."""

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from imgadapt.errors import ConfigError, DataError, ImgadaptError, first_few
from imgadapt.playground.decoding import opened
from imgadapt.playground.library.bases import Base, Bases
from imgadapt.playground.library.library import Card, Library
from imgadapt.playground.pictures import foreign, infotext, provenance
from imgadapt.playground.pictures.album import Album
from imgadapt.playground.requests import GenerateRequest
from imgadapt.playground.settings import Limits, Settings

_HASHED = 2**30
"""Bytes of adapters that are read at most to find one by its hash."""


@dataclass(frozen=True)
class Restored:
    """request: what the picture's settings are here. lacks: what is not here or was left out, a line each. exact:
    whether drawing it gives the same picture to the bit, as far as that can be known (versions, device, files).
    differs: what of versions and machine is another here than there, a line each.
    """

    request: GenerateRequest
    lacks: Sequence[str]
    exact: bool
    differs: Sequence[str] = ()


def about(base: Base, settings: Settings) -> dict[str, str]:
    """A base as records have it: name, kind, a fingerprint ("" where it is none of this machine's files), device and
    dtype that it works in.
    """
    device, dtype = provenance.machine(settings.device), settings.dtype
    return {
        "name": base.name,
        "kind": base.kind,
        "print": provenance.fingerprint(base.place),
        "device": device,
        "dtype": dtype,
    }


def of(
    request: GenerateRequest,
    library: Library,
    base: Mapping[str, str],
    seconds: float,
    notes: Sequence[str],
    album: Album | None = None,
) -> dict[str, Any]:
    """The record of a picture: its settled request; its adapters' names and SHA-256; its base (see `about`); SHA-256 of
    the pictures it began from; versions of imgadapt, torch, diffusers, transformers; device; dtype.
    """
    given = {
        id: provenance.digest(album.get(id).path) for id in (request.init, request.mask) if id and album is not None
    }
    return {
        "version": infotext.VERSION,
        "request": request.model_dump(mode="json", exclude_none=True),
        "adapters": {use.adapter: _adapter(use.adapter, library) for use in request.adapters},
        "base": {key: base[key] for key in ("name", "kind", "print") if key in base},
        "given": given,
        "versions": provenance.versions(),
        "device": base.get("device", ""),
        "dtype": base.get("dtype", ""),
        "threads": provenance.threads(),
        "made": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "seconds": round(seconds, 3),
        "notes": list(notes),
    }


def restore(
    data: bytes,
    library: Library,
    bases: Bases,
    *,
    settings: Settings,
    album: Album | None = None,
    owner: str | None = None,
) -> Restored:
    """What a PNG (or JPEG, WebP) says of how it was made: by us, or in A1111's way by any tool.

    album, owner: where the pictures that it began from are looked for.

    Raises:
        DataError: it says nothing, or nothing that can be read. Never more memory than `uploads` allow.
    """
    limits = settings.limits
    if len(data) > limits.upload:
        raise DataError(f"the picture has {len(data):,} bytes; {limits.upload:,} are allowed")
    image = opened(data, limits.upload_pixels)
    record = infotext.ours(image.info)
    lacks = list[str]()
    if record is not None and isinstance(several := record.get("pictures"), list) and several:
        lacks.append(f"it is a sheet of {len(several)} pictures; these are the settings of the first")  # pyright: ignore[reportUnknownArgumentType]
        record = _table(several[0])
    if record is None or not isinstance(record.get("request"), dict):
        return _foreign(foreign.read(image), library, bases)
    back = _Back(library, bases, lacks)
    values = dict(record["request"])
    values["adapters"] = back.adapters(values.get("adapters"), _table(record.get("adapters")))
    base = _table(record.get("base"))
    values["base"], same_base = back.base(base, settings)
    for name in ("init", "mask"):
        if (id := values.get(name)) is not None and not _is_here(id, _table(record.get("given")), album, owner):
            back.lacks.append({"init": "the picture that it began from is not here; give it again",
                               "mask": "its mask is not here; give it again"}[name])  # fmt: skip
            values.pop("mask", None)
            values.pop(name, None)
    if record.get("version") != infotext.VERSION:
        back.lacks.append("it was written by another version of the playground; what is not known here is left out")
    request = gently(values, back.lacks)
    differs = provenance.differences(record, settings.device, settings.dtype)
    return Restored(request, tuple(back.lacks), not back.lacks and same_base and not differs, differs)


def gently(values: Mapping[str, Any], lacks: list[str]) -> GenerateRequest:
    """A request of what is right in `values`; the rest is left at its default and said in `lacks`."""
    good = dict[str, Any]()
    unknown = [str(name)[:40] for name in values if name not in GenerateRequest.model_fields]
    if unknown:
        lacks.append(f"{first_few(unknown)}: no settings here: left out")
    for name, value in values.items():
        if value is None or name not in GenerateRequest.model_fields:
            continue
        companion = {"init": values.get("init")} if name == "mask" else {}
        try:
            GenerateRequest.of({**companion, name: value})
            good[name] = value
        except ConfigError as error:
            lacks.append(f"{str(error)[:200]}: left out")
    try:
        return GenerateRequest.of(good)
    except ConfigError as error:
        lacks.append(f"{str(error)[:200]}: left out")
        return GenerateRequest.of({key: good[key] for key in good if key not in ("mask", "layout", "count")})


def _foreign(said: foreign.Said, library: Library, bases: Bases) -> Restored:
    """Another tool's words as a request here."""
    back = _Back(library, bases, lacks=list(said.lacks))
    uses = list[Mapping[str, Any]]()
    for tag in said.tags:
        card = back.card(tag.name, hash=said.hashes.get(tag.name, ""))
        if card is not None and card.id not in [use["adapter"] for use in uses]:
            try:
                uses.append(tag.use(card.id).model_dump(mode="json"))
            except ConfigError as error:
                back.lacks.append(f"{error}: left out")
    base = next((one for one in bases.all if one.name.casefold() == said.model.casefold()), None)
    if said.model and base is None:
        back.lacks.append(f"the base {said.model[:80]!r} is not here")
    found = {**said.values, "adapters": uses, "base": base.id if base else None}
    return Restored(gently(found, back.lacks), tuple(back.lacks), False, ("another tool drew it",))


@dataclass(frozen=True)
class _Back:
    """What a record names, found again here. lacks: what was not, filled on the way."""

    library: Library
    bases: Bases
    lacks: list[str]

    def adapters(self, uses: object, known: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        """A stack with the ids of this library."""
        found = list[Mapping[str, Any]]()
        listed: list[object] = list(uses) if isinstance(uses, list | tuple) else []  # pyright: ignore[reportUnknownArgumentType]
        if len(listed) > Limits.adapters:  # each may have to be looked for in the whole library
            self.lacks.append(f"it has {len(listed):,} adapters; those beyond {Limits.adapters} are left out")
        for use in listed[: Limits.adapters]:
            use = _table(use)
            told = _table(known.get(str(use.get("adapter"))))
            name, sha256, size = str(told.get("name", ""))[:200], str(told.get("sha256", "")), told.get("size")
            card = self.card(name or "(no name)", sha256=sha256, size=size if isinstance(size, int) else None)
            if card is not None and card.id not in [one["adapter"] for one in found]:
                found.append({**use, "adapter": card.id})
        return found

    def card(self, name: str, *, sha256: str = "", size: int | None = None, hash: str = "") -> Card | None:
        """The adapter of a name, and of a digest where one is given; one of that digest with another name, too.

        sha256: of the file; hash: A1111's, of its tensors.
        """
        try:
            named = self.library.named(name)
        except ConfigError:
            named = None
        if named is not None and not named.fault and self._matches(named, sha256, hash):
            return named
        budget = _HASHED
        for card in self.library.cards():
            if card.fault or (size is not None and card.size != size) or not (sha256 or hash) or card.size > budget:
                continue
            budget -= card.size
            if self._matches(card, sha256, hash):
                return card
        if named is None or named.fault:
            self.lacks.append(f"the adapter {name[:80]!r} is not here")
            return None
        self.lacks.append(f"the adapter {name[:80]!r} is another file here than the picture's")
        return named

    def _matches(self, card: Card, sha256: str, hash: str) -> bool:
        try:
            if sha256:
                return self.library.digest(card.id) == sha256
            return not hash or any(
                one.startswith(hash) for one in (provenance.autov3(card.path), self.library.digest(card.id))
            )
        except (ImgadaptError, OSError):  # deleted since it was listed
            return False

    def base(self, told: Mapping[str, Any], settings: Settings) -> tuple[str | None, bool]:
        """The id of the base of a record, and whether it is the very same."""
        name, mark = str(told.get("name", ""))[:200], told.get("print")
        found = next((one for one in self.bases.all if one.name.casefold() == name.casefold()), None)
        if found is None:
            self.lacks.append(f"the base {name[:80]!r} is not here" if name else "its base is not said")
            return None, False
        same = bool(mark) and about(found, settings)["print"] == mark
        if not same:
            self.lacks.append(f"the base {name[:80]!r} may be another here than the picture's")
        return found.id, same


def _adapter(id: str, library: Library) -> dict[str, Any]:
    """Of an adapter; nothing is known of one whose file was deleted while it drew, and the picture is kept."""
    try:
        card = library.get(id)
        return {
            "name": card.name,
            "sha256": library.digest(id),
            "autov3": provenance.autov3(card.path),
            "size": card.size,
        }
    except (ImgadaptError, OSError):
        return {"name": id}


def _is_here(id: object, given: Mapping[str, Any], album: Album | None, owner: str | None) -> bool:
    try:
        return album is not None and provenance.digest(album.get(str(id), owner).path) == given.get(str(id))
    except (ConfigError, OSError):
        return False


def _table(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}  # pyright: ignore[reportUnknownVariableType]
