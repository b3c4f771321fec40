"""Start picture: what image to image and inpainting begin with."""

import io
from typing import Any

import gradio as gr
from PIL import Image

from imgadapt.errors import ImgadaptError
from imgadapt.playground.house import House
from imgadapt_ui.parts import QUIET, Shared, text, thumb
from imgadapt_ui.who import owner


class StartPicture:
    """A picture, how much of it is redrawn, and where."""

    def __init__(self, house: House) -> None:
        self.house = house
        self.form: dict[str, Any] = {}
        with gr.Accordion("Start from a picture", open=False, elem_id="start-box") as self.box:
            self.file = gr.File(
                label="Drop a picture here",
                type="binary",
                file_types=["image"],
                elem_id="start-file",
                height=110,
            )
            with gr.Column(visible=False) as self.used:
                self.shown_picture = gr.HTML("", apply_default_css=False, elem_id="start-picture")
                self.form["denoise"] = gr.Slider(
                    0.05, 1, 0.75, step=0.05, label="Redrawn share (denoise)", elem_id="denoise", buttons=[]
                )
                with gr.Row(elem_classes="ia-buttons"):
                    self.paint = gr.Button("Paint what to redraw", size="sm", min_width=100, elem_id="paint")
                    self.clear = gr.Button("Without this picture", size="sm", min_width=100, elem_id="start-clear")
                self.mask = gr.ImageEditor(
                    label="Paint over what shall be redrawn (inpainting)",
                    type="pil",
                    visible=False,
                    sources=(),
                    transforms=(),
                    layers=False,
                    brush=gr.Brush(colors=["#22897b"], color_mode="fixed", default_size=24),
                    format="png",
                    buttons=[],
                    elem_id="mask",
                )
            self.form["init"] = gr.Textbox(visible=False)
            self.form["mask"] = gr.Textbox(visible=False)

    @property
    def shown(self) -> list[Any]:
        """What `begin` updates."""
        return [self.form["init"], self.form["mask"], self.used, self.shown_picture, self.mask, self.box]

    def begin(self, id: str, owner: str) -> list[Any]:
        """Updates of `shown`: start from a picture of the album; "": from none."""
        playground = self.house.playground
        try:
            picture = playground.album.get(id, playground.whose(owner)) if id else None
        except ImgadaptError:
            picture = None
        if picture is None:
            return ["", "", gr.Column(visible=False), "", gr.ImageEditor(value=None, visible=False), gr.skip()]
        about = f"{picture.width} x {picture.height}"
        html = f'<div class="ia-start">{thumb(picture.id, "The picture to start from")}<span>{text(about)}</span></div>'
        return [
            picture.id,
            "",
            gr.Column(visible=True),
            html,
            gr.ImageEditor(value=None, visible=False),
            gr.Accordion(open=True),
        ]

    def wire(self, shared: Shared) -> None:
        """Giving a picture, painting the mask, doing without."""

        def given(data: bytes | None, request: gr.Request) -> list[Any]:
            try:
                picture = self.house.playground.album.accept(data or b"", owner=owner(request))
            except ImgadaptError as error:
                raise gr.Error(str(error), print_exception=False, title="Not a usable picture") from None
            return [None, *self.begin(picture.id, owner(request))]

        def paint(id: str, request: gr.Request) -> Any:
            playground = self.house.playground
            with Image.open(playground.album.get(id, playground.whose(owner(request))).path) as image:
                picture = image.convert("RGB")
            return gr.ImageEditor(value=picture, visible=True, canvas_size=picture.size)

        def painted(value: dict[str, Any] | None, before: str, request: gr.Request) -> str:
            return self._painted(value, before, owner(request))

        def filled(init: str, mask: str, request: gr.Request) -> list[Any]:
            shown = self.begin(init, owner(request))
            return [init, mask, *shown[2:]] if shown[0] else shown

        form = self.form
        self.file.upload(given, self.file, [self.file, *self.shown], **QUIET)
        self.clear.click(lambda: self.begin("", ""), None, self.shown, **QUIET)
        self.paint.click(paint, form["init"], self.mask, **QUIET)
        self.mask.input(painted, [self.mask, form["mask"]], form["mask"], **QUIET, trigger_mode="always_last")
        shared.form_changed.change(filled, [form["init"], form["mask"]], self.shown, **QUIET)

    def _painted(self, value: dict[str, Any] | None, before: str, owner: str) -> str:
        """Keeps what is painted as the mask, in place of the one before; "": nothing is."""
        album = self.house.playground.album
        layers: list[Image.Image] = [one for one in (value or {}).get("layers", ()) if one is not None]
        strokes = [layer.convert("RGBA").getchannel("A").point([0] + [255] * 255) for layer in layers]
        if not strokes or not any(stroke.getbbox() for stroke in strokes):
            return ""
        mask = Image.new("L", strokes[0].size)
        for stroke in strokes:
            mask.paste(255, mask=stroke)
        made = album.accept(_png(mask.convert("RGB")), owner=owner)
        if before:
            try:
                album.remove(before, owner)
            except ImgadaptError:
                return made.id
        return made.id


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
