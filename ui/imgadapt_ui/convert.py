"""The Inspect / Convert tab: any adapter, all about it, and in another tool's format."""

from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import gradio as gr

from imgadapt.errors import ImgadaptError
from imgadapt.playground.converting import Converted, ConvertPlan, ConvertRequest
from imgadapt.playground.desk import Done, Failed
from imgadapt.playground.library.bringing import bring
from imgadapt_ui import library
from imgadapt_ui.following import follow
from imgadapt_ui.parts import QUIET, Shared, adapters, bar, counted, empty, error_box, link, text
from imgadapt_ui.who import owner

NOTHING = empty("No adapter chosen", "Choose one on the left, or bring a .safetensors file.")


def build(shared: Shared) -> None:
    """Fill the tab."""
    house = shared.house
    formats = [(f"{name}: {tools}" if tools else name, name) for name, tools in house.converter.formats()]
    with gr.Row(elem_classes="ia-desk"):
        with gr.Column(scale=4, min_width=320):
            adapter = gr.Dropdown(adapters(house), value=None, label="Adapter", elem_id="convert-adapter")
            file = gr.File(
                label="Bring a .safetensors file into the library",
                file_types=[".safetensors"],
                height=150,
                elem_id="bring",
                visible=not house.playground.settings.shared,
            )
            said = gr.HTML("", elem_id="brought", apply_default_css=False)
            with gr.Group():
                format = gr.Dropdown(formats, value=formats[0][1], label="As format", elem_id="convert-format")
                dtype = gr.Dropdown(
                    [("As it is", ""), "fp32", "fp16", "bf16"], value="", label="Numbers", elem_id="convert-dtype"
                )
            plan = gr.HTML("", elem_id="convert-plan", apply_default_css=False)
            go = gr.Button("Convert", variant="primary", elem_id="convert")
            made = gr.HTML("", elem_id="converted", apply_default_css=False)
        with gr.Column(scale=5, min_width=320, elem_classes="ia-results"):
            about = gr.HTML(NOTHING, elem_id="inspected", apply_default_css=False)

    def asked(id: str, format: str, dtype: str) -> ConvertRequest:
        return ConvertRequest.of({"adapter": id, "format": format, **({"dtype": dtype} if dtype else {})})

    def planned(id: str | None, format: str, dtype: str) -> str:
        if not id:
            return ""
        try:
            return _plan(house.converter.plan(asked(id, format, dtype)))
        except ImgadaptError as error:
            return error_box(error)

    def chosen(id: str | None, before: str) -> Any:
        """The format that was chosen, or the first other one that can hold the adapter."""
        try:
            return house.converter.fitting(id, before) if id else gr.skip()
        except ImgadaptError:  # `planned` says so
            return gr.skip()

    def looked(id: str | None) -> str:
        return library.details(house, id) if id else NOTHING

    async def convert(request: gr.Request, id: str | None, format: str, dtype: str) -> AsyncGenerator[str, None]:
        if not id:
            yield error_box("Choose an adapter first")
            return
        try:
            ticket = house.converter.convert(asked(id, format, dtype), owner=owner(request))
        except ImgadaptError as error:
            yield error_box(error)
            return
        async for event in follow(ticket):
            if isinstance(event, Done):
                yield _made(event.result)
            elif isinstance(event, Failed):
                yield error_box(event.message)
            else:
                yield bar(event)

    def brought(given: str) -> list[Any]:
        playground, path = house.playground, Path(given)  # Gradio's copy, in its own folder
        try:
            card = bring(playground.settings, playground.library, path.name, path.read_bytes())
        except ImgadaptError as error:
            return [None, gr.skip(), gr.skip(), error_box(f"{path.name}: {error}")]
        return [None, gr.Dropdown(choices=adapters(house), value=card.id), counted(), ""]

    options = [adapter, format, dtype]
    gr.on([adapter.change, format.change, dtype.change], planned, options, plan, **QUIET, trigger_mode="always_last")
    adapter.change(chosen, [adapter, format], format, **QUIET)
    adapter.change(looked, adapter, about, **QUIET)
    shared.base_changed.change(looked, adapter, about, **QUIET)
    go.click(convert, options, made, **QUIET, concurrency_limit=None)
    file.upload(brought, file, [file, adapter, shared.library_changed, said], **QUIET)
    shared.library_changed.change(
        lambda: gr.Dropdown(choices=adapters(house)),
        None,
        adapter,
        **QUIET,
    )


def _plan(plan: ConvertPlan) -> str:
    if plan.possible:
        return error_box(plan.possible)
    rows = "".join(f"<li>{text(count)} layers: {text(how)}</li>" for how, count in plan.losses.items())
    rows += "".join(f"<li>{text(note)}</li>" for note in plan.notes)
    return f'<div class="ia-note"><strong>What it takes</strong><ul>{rows}</ul></div>' if rows else ""


def _made(made: Converted) -> str:
    return f'<div class="ia-good" role="status">{text(made.name)} is ready {_link(made)}</div>'


def _link(made: Converted) -> str:
    return link(f"/converted/{made.id}", "Download", made.name)
