"""Telling: how long events of the page are declared, and how what goes wrong in one is told."""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

import gradio as gr

from imgadapt.errors import ImgadaptError
from imgadapt.playground.desk import public
from imgadapt_ui.parts import QUIET, text

LIVE: Mapping[str, Any] = {**QUIET, "concurrency_limit": None}
"""Of events that follow a ticket: they wait, as many at once as there are viewers."""
LATEST: Mapping[str, Any] = {**QUIET, "trigger_mode": "always_last"}
"""Of events that a user sets off again before they are over, by typing."""


@contextmanager
def told() -> Generator[None]:
    """Errors of ours become a line for the user."""
    try:
        yield
    except ImgadaptError as error:
        raise fault(public(str(error)), title="Not possible") from None


def fault(message: object, **more: Any) -> gr.Error:
    """An error to raise, of a line for the user. (Gradio shows messages as HTML, and parts of ours come from files and
    links; for programs, which want the text, see api.py.)
    """
    return gr.Error(text(message), print_exception=False, **more)


def warn(message: object, **more: Any) -> None:
    """Tell the user what did not go as it was wanted."""
    gr.Warning(text(message), **more)


def inform(message: object) -> None:
    """Tell the user something."""
    gr.Info(text(message))


def open_number(label: str, left: str, elem_id: str | None = None, width: int = 100, **more: Any) -> gr.Textbox:
    """A number that may be left open: as text, for Gradio makes 0 of no number; see `forms.number`. left: what is said
    where it is open.
    """
    return gr.Textbox(
        "", label=label, placeholder=left, max_length=20, max_lines=1, min_width=width, elem_id=elem_id, **more
    )
