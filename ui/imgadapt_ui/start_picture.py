"""Start picture: what image to image and inpainting begin with."""

from pathlib import Path
from typing import Any

import gradio as gr

from imgadapt.errors import ImgadaptError
from imgadapt.playground.house import House
from imgadapt.playground.pictures.album import Picture
from imgadapt_ui.parts import QUIET, Shared, error_box, text, thumb
from imgadapt_ui.who import owner

_PAINT = (Path(__file__).parent / "paint.js").read_text(encoding="utf-8")
_LOOKED_AT = 120
"""Pictures in which a mask is looked for before it is thrown away."""


class StartPicture:
    """A picture, how much of it is redrawn, and where.

    The mask is painted in the page and sent by a route of ours (`POST /pictures`): Gradio's own editor would send all
    of its layers with every movement.
    """

    def __init__(self, house: House) -> None:
        self.house = house
        self.form: dict[str, Any] = {}
        with gr.Accordion("Start from a picture", open=False, elem_id="start-box", elem_classes="ia-after") as self.box:
            self.file = gr.File(
                label="A picture to start from",
                type="binary",
                file_types=["image"],
                elem_id="start-file",
                height=150,
            )
            self.said = gr.HTML("", apply_default_css=False, elem_id="start-said")
            with gr.Column(visible=False) as self.used:
                self.shown_picture = gr.HTML("", apply_default_css=False, elem_id="start-picture")
                self.form["denoise"] = gr.Slider(
                    0.05, 1, 0.75, step=0.05, label="Redrawn share (denoise)", elem_id="denoise", buttons=[]
                )
                with gr.Row(elem_classes="ia-buttons"):
                    self.paint = gr.Button("Paint what to redraw", size="sm", min_width=100, elem_id="paint")
                    self.clear = gr.Button("Without this picture", size="sm", min_width=100, elem_id="start-clear")
                self.mask = gr.HTML("", apply_default_css=False, elem_id="mask", js_on_load=_PAINT)
            self.form["init"] = gr.Textbox(visible=False)
            self.form["mask"] = gr.Textbox(visible=False)

    @property
    def shown(self) -> list[Any]:
        """What `begin` updates."""
        return [self.form["init"], self.form["mask"], self.used, self.shown_picture, self.mask, self.box, self.said]

    def begin(self, id: str, owner: str, mask: str = "") -> list[Any]:
        """Updates of `shown`: start from a picture of the album; "": from none. mask: what of it is redrawn."""
        picture, painted = self._picture(id, owner), self._picture(mask, owner)
        if picture is None:
            said = error_box("The picture to start from is gone; choose another one") if id else ""
            return ["", "", gr.Column(visible=False), "", "", gr.Accordion(open=True) if id else gr.skip(), said]
        about = f"{picture.width} x {picture.height}"
        html = f'<div class="ia-start">{thumb(picture.id, "The picture to start from")}<span>{text(about)}</span></div>'
        return [
            picture.id,
            painted.id if painted else "",
            gr.Column(visible=True),
            html,
            painter(picture, painted.id) if painted else "",
            gr.Accordion(open=True),
            error_box("The mask is gone; paint it again") if mask and not painted else "",
        ]

    def _picture(self, id: str, owner: str) -> Picture | None:
        playground = self.house.playground
        try:
            return playground.album.get(id, playground.whose(owner)) if id else None
        except ImgadaptError:
            return None

    def wire(self, shared: Shared) -> None:
        """Giving a picture, painting the mask, doing without."""

        def given(data: bytes | None, request: gr.Request) -> list[Any]:
            try:
                picture = self.house.playground.album.accept(data or b"", owner=owner(request))
            except ImgadaptError as error:
                return [None, *(gr.skip() for _ in self.shown[:-1]), error_box(error)]
            return [None, *self.begin(picture.id, owner(request))]

        def paint(id: str, mask: str, request: gr.Request) -> str:
            picture = self._picture(id, owner(request))
            return painter(picture, mask) if picture else ""

        def painted(init: str, before: str, event: gr.EventData, request: gr.Request) -> Any:
            sent: Any = event._data
            said: Any = sent if isinstance(sent, dict) else {}
            mask = self._picture(str(said.get("mask", "")), owner(request))
            if str(said.get("of", "")) != init:
                return gr.skip()
            self._throw_away(before, owner(request))
            return mask.id if mask else ""

        def filled(init: str, mask: str, request: gr.Request) -> list[Any]:
            return self.begin(init, owner(request), mask)

        form = self.form
        self.file.upload(given, self.file, [self.file, *self.shown], **QUIET)
        self.clear.click(lambda: self.begin("", ""), None, self.shown, **QUIET)
        self.paint.click(paint, [form["init"], form["mask"]], self.mask, **QUIET)
        self.mask.select(painted, [form["init"], form["mask"]], form["mask"], **QUIET, trigger_mode="multiple")
        shared.form_changed.change(filled, [form["init"], form["mask"]], self.shown, **QUIET)

    def _throw_away(self, mask: str, owner: str) -> None:
        """Delete a mask that was painted over, unless a picture was, or may be, made with it."""
        playground = self.house.playground
        if not mask or playground.desk.load:
            return
        made = playground.album.recent(_LOOKED_AT, playground.whose(owner))
        if not any((one.record or {}).get("request", {}).get("mask") == mask for one in made):
            try:
                playground.album.remove(mask, playground.whose(owner))
            except ImgadaptError:  # it has gone already
                return


def painter(picture: Picture, mask: str) -> str:
    """What paint.js works in. mask: what is painted already, an id or ""."""
    return (
        f'<div class="ia-paint" data-picture="{text(picture.id)}" data-mask="{text(mask)}">'
        f'<div class="ia-canvas" style="aspect-ratio: {picture.width} / {picture.height}">'
        f'<img src="/pictures/{text(picture.id)}" alt="" width="{picture.width}" height="{picture.height}">'
        f'<canvas width="{picture.width}" height="{picture.height}" role="img" '
        'aria-label="Paint over what shall be redrawn"></canvas></div>'
        '<div class="ia-tools"><label>Brush <input type="range" min="1" max="40" value="12" '
        'aria-label="Width of the brush"></label>'
        '<button type="button" data-do="erase" aria-pressed="false">Eraser</button>'
        '<button type="button" data-do="undo">Undo</button>'
        '<button type="button" data-do="clear">Clear</button>'
        '<button type="button" data-do="all">All</button></div>'
        '<p class="ia-dim" role="status"></p></div>'
    )
