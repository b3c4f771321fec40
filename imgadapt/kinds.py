"""What a file is that is no safetensors, by its first bytes: a failed download, an archive, a pickle."""

START = 512
"""Bytes that tell."""
_PICTURE = "a picture"
_OLD = (
    "a pickle of torch's form from before 1.6, which may run code and is never read; only where you trust whoever "
    "made it: load it with torch, and save its tensors as safetensors"
)
_PICKLE = "a pickle that may run code, and not of the form that can be read (torch.save's since 1.6)"
_KINDS = {
    b"version https://git-lfs": "a git-lfs pointer: the file itself was not downloaded (`git lfs pull` does that)",
    b"<": "a web page or XML: the download failed",
    b"{": "JSON: the download failed, or it is another of the model's files",
    b"PK": "a zip archive: unpack it",
    b"\x1f\x8b": "gzip: unpack it",
    b"7z\xbc\xaf": "a 7z archive: unpack it",
    b"Rar!": "a RAR archive: unpack it",
    b"\x89PNG": _PICTURE,
    b"RIFF": _PICTURE,
    b"\xff\xd8\xff": _PICTURE,
    b"GIF8": _PICTURE,
    b"\x80\2\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.": _OLD,
    **{b"\x80" + bytes([protocol]): _PICKLE for protocol in range(2, 6)},
}


def kind_of(start: bytes) -> str:
    """What a file of these first bytes is, and what to do; "" where that is not known."""
    if is_torch_zip(start):
        return "a pickle, as torch.save writes, which may run code"
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    return next((kind for begin, kind in _KINDS.items() if text.startswith(begin)), "")


def is_torch_zip(start: bytes) -> bool:
    """Whether it is a zip whose first entry is the pickle of `torch.save`."""
    name = start[30 : 30 + int.from_bytes(start[26:28], "little")]
    return start[:4] == b"PK\3\4" and name.endswith(b"data.pkl")
