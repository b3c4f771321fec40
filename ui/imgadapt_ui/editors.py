"""Editors: Gradio's picture editors, held to a bounded amount of what pages send them before an event takes it.

Gradio keeps whatever anyone sends under any id, as many layers as they say, for good.
"""

from collections import OrderedDict
from typing import Any

import gradio as gr
from gradio.components.image_editor import AcceptBlobs

_EDITORS, _LAYERS = 32, 16
"""How many pages' pictures are kept, the oldest go first; layers of one."""


def tame(blocks: gr.Blocks, most_bytes: int) -> None:
    """Bound all editors of a page. most_bytes: of one picture or layer.

    Raises:
        TypeError: a component lets pages call something else that nobody has looked at.
    """
    for block in blocks.blocks.values():
        names = [name for name in dir(type(block)) if getattr(getattr(type(block), name, None), "_is_server_fn", False)]
        if not names:
            continue
        if not isinstance(block, gr.ImageEditor) or names != ["accept_blobs"]:
            raise TypeError(f"{type(block).__name__} offers {', '.join(names)} to pages; look at what it does first")
        _bound(block, most_bytes)


def _bound(editor: gr.ImageEditor, most_bytes: int) -> None:
    editor.blob_storage = _Newest()
    accept = editor.accept_blobs

    def accept_blobs(data: AcceptBlobs) -> None:
        sent = data.data if isinstance(data, AcceptBlobs) else data["data"]
        files = data.files if isinstance(data, AcceptBlobs) else data["files"]
        index = str(_field(sent, "index") or "0")
        if len(files) != 1 or len(files[0][1]) > most_bytes:
            raise gr.Error(f"a picture may have {most_bytes:,} bytes", print_exception=False)
        if index != "null" and not (index.isascii() and index.isdigit() and len(index) < 5 and int(index) < _LAYERS):
            raise gr.Error(f"a picture may have {_LAYERS} layers", print_exception=False)
        accept(data)

    accept_blobs._is_server_fn = True  # pyright: ignore[reportFunctionMemberAccess] # Gradio's mark
    setattr(editor, "accept_blobs", accept_blobs)  # noqa: B010 # a method of this one only


def _field(sent: Any, name: str) -> Any:
    return sent.get(name) if isinstance(sent, dict) else getattr(sent, name, None)


class _Newest(OrderedDict[str, Any]):
    """What the newest pages have sent."""

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        self.move_to_end(key)
        while len(self) > _EDITORS:
            self.popitem(last=False)
