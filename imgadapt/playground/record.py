"""Records: what made a picture, in its PNG: A1111's `parameters` for everyone, and JSON that restores all of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from imgadapt.playground.library import Library
from imgadapt.playground.requests import GenerateRequest

KEY = "imgadapt"
"""Of our JSON in a PNG's text; A1111's is `parameters`."""


@dataclass(frozen=True)
class Restored:
    """request: what the picture's settings are here. lacks: what is not here or was left out, a line each. exact:
    whether drawing it gives the same picture to the bit, as far as that can be known (versions, device, files).
    """

    request: GenerateRequest
    lacks: Sequence[str]
    exact: bool


def of(
    request: GenerateRequest, library: Library, base: Mapping[str, str], seconds: float, notes: Sequence[str]
) -> dict[str, Any]:
    """The record of a picture: its settled request; its adapters' names and SHA-256; base's name, kind and SHA-256;
    versions of imgadapt, torch, diffusers, transformers; device; dtype.
    """
    raise NotImplementedError


def parameters(record: Mapping[str, Any]) -> str:
    """A1111's text of a record."""
    raise NotImplementedError


def restore(data: bytes, library: Library, bases: Any) -> Restored:
    """What a PNG (or JPEG, WebP) says of how it was made: by us, or in A1111's way by any tool.

    Raises:
        DataError: it says nothing, or nothing that can be read. Never more memory than `uploads` allow.
    """
    raise NotImplementedError
