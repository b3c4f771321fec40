"""Page: the playground in a browser; its tabs, what they share, and how it looks."""

from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import gradio as gr

from imgadapt.errors import ImgadaptError
from imgadapt.playground.desk import Done, Failed, Progress, Waiting
from imgadapt.playground.house import House
from imgadapt_ui import compare, convert, history, library, memory, merge, theme, train
from imgadapt_ui.following import follow
from imgadapt_ui.generate import Generate
from imgadapt_ui.parts import QUIET, Shared, bases, counted, text
from imgadapt_ui.telling import fault, warn
from imgadapt_ui.who import owner

_HERE = Path(__file__).parent
_TITLE = '<h1 class="ia-brand">imgadapt <span>playground</span></h1>'


def look() -> dict[str, Any]:
    """The arguments of `gr.mount_gradio_app` that make the page look and work as it shall."""
    return {
        "theme": theme.theme(),
        "css_paths": sorted(_HERE.glob("*.css")),
        "js": (_HERE / "page.js").read_text(encoding="utf-8"),
        "footer_links": [],
    }


def build(house: House) -> gr.Blocks:
    """The whole page. A session's files of Gradio are gone a day after they were made."""
    with gr.Blocks(title="imgadapt playground", fill_width=True, delete_cache=(3600, 86400)) as page:
        with gr.Row(elem_classes="ia-header"):
            gr.HTML(_TITLE, apply_default_css=False)
            base = gr.Dropdown(
                bases(house),
                value=house.playground.bases.first.id,
                label="Base",
                elem_id="base",
                min_width=180,
                scale=0,
                filterable=False,
            )
            status = gr.HTML(_load(house, ""), elem_id="load", apply_default_css=False)
            dark = gr.Button("Dark / light", size="sm", min_width=60, scale=0, elem_id="dark")
        with gr.Tabs(selected="generate", elem_id="tabs") as tabs:
            places = {
                id: gr.Tab(name, id=id, render_children=True)
                for id, name in (
                    ("library", "Library"),
                    ("generate", "Generate"),
                    ("compare", "Compare"),
                    ("merge", "Merge"),
                    ("train", "Train"),
                    ("convert", "Inspect / Convert"),
                    ("history", "History"),
                )
            }
        with places["generate"]:
            generate = Generate(house)
        shared = Shared(
            house=house,
            tabs=tabs,
            base=base,
            form=generate.form,
            form_changed=gr.State(0),
            library_changed=gr.State(0),
            base_changed=gr.State(0),
            page_loaded=gr.State(0),
            latest=gr.Textbox(visible=False),
        )
        for id, tab in {
            "library": library,
            "compare": compare,
            "merge": merge,
            "train": train,
            "convert": convert,
            "history": history,
        }.items():
            with places[id]:
                tab.build(shared)
        generate.wire(shared)
        _header(shared, status, dark)
        memory.wire(page, shared, places, generate)
    return page


def _header(shared: Shared, status: gr.HTML, dark: gr.Button) -> None:
    """Switching the base, the queue's load, the colours."""
    house = shared.house

    async def switch(request: gr.Request, id: str) -> AsyncGenerator[list[Any], None]:
        try:
            ticket = house.playground.switch(id, owner=owner(request))
        except ImgadaptError as error:
            raise fault(str(error), title="Base not loaded") from None
        async for event in follow(ticket):
            if isinstance(event, Failed):
                warn(event.message, title="Base not loaded")
                yield [_load(house, owner(request)), counted()]
            elif isinstance(event, Done):
                yield [_said(f"{event.result.name} is loaded"), counted()]
            elif isinstance(event, Progress | Waiting):
                yield [_said(event.what if isinstance(event, Progress) else "waiting to load"), gr.skip()]

    shared.base.input(switch, shared.base, [status, shared.base_changed], **QUIET, concurrency_limit=None)

    def load(request: gr.Request) -> str:
        return _load(house, owner(request))

    gr.Timer(4).tick(load, None, status, **QUIET, queue=False)
    dark.click(None, js="() => window.iaColours()")


def _load(house: House, owner: str) -> str:
    count, run = house.playground.desk.load, house.runs.running()
    said = [f"{count} in the queue"] if count else []
    if run is not None:
        own = house.playground.whose(owner) in (None, run.owner)
        said.append(f"training {run.name} {run.step}/{run.steps}" if own else "a training of someone else's")
    return _said(", ".join(said) or "idle")


def _said(what: str) -> str:
    return f'<span class="ia-load" role="status">{text(what)}</span>'
