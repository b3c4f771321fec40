"""Bringing: an adapter from outside, into the library's folder of such."""

from contextlib import suppress

from imgadapt.atomic import write_bytes
from imgadapt.errors import ConfigError, FormatError
from imgadapt.playground.filenames import cleaned, placed
from imgadapt.playground.library.library import Card, Library
from imgadapt.playground.settings import Settings

FOLDER = "brought"
"""In the home's `adapters/`."""


def bring(settings: Settings, library: Library, name: str, data: bytes) -> Card:
    """Keep a file as an adapter of the library; what is none is not kept. name: as its owner calls it.

    Raises:
        ConfigError: the playground is shared. FormatError: it is no adapter, or too large. OutputError: it cannot be
            written.
    """
    if settings.shared:
        raise ConfigError("a shared playground takes no adapters; whoever runs it puts them into its folder")
    if not data or len(data) > settings.limits.upload:
        raise FormatError(f"the file has {len(data):,} bytes; 1 to {settings.limits.upload:,} are taken here")
    if not name.lower().endswith(".safetensors"):
        raise FormatError("only .safetensors files are taken; a .ckpt, .pt or .bin may run anything that is in it")
    folder = settings.folder("adapters") / FOLDER
    stem = cleaned(name[: -len(".safetensors")], "adapter")
    path = placed(folder, stem, ".safetensors", lambda place: write_bytes(place, data))
    try:
        library.scan()
        card = next((card for card in library.cards() if card.path.resolve() == path), None)
        if card is None or card.fault:
            raise FormatError(card.fault if card is not None else "the library does not take it")
    except BaseException:
        with suppress(OSError):  # what went wrong first is what is said
            path.unlink()
        library.scan()
        raise
    return card
