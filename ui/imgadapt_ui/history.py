"""The History tab: the newest pictures, what made them, and their settings again."""

from typing import Any

import gradio as gr

from imgadapt.errors import ImgadaptError
from imgadapt.playground.house import House
from imgadapt_ui import results
from imgadapt_ui.parts import QUIET, Shared, chosen, empty, text, thumb, tiles
from imgadapt_ui.telling import warn
from imgadapt_ui.who import owner

COUNT = 120
"""Pictures that are shown."""
NOBODY = empty("No picture chosen", "Choose one to see what made it.")


def build(shared: Shared) -> None:
    """Fill the tab."""
    house = shared.house
    current = gr.Textbox(visible=False)
    with gr.Row(elem_classes="ia-desk ia-browse"):
        with gr.Column(scale=5, min_width=320):
            with gr.Row(elem_classes="ia-buttons"):
                refresh = gr.Button("Refresh", size="sm", min_width=90, scale=0, elem_id="history-refresh")
            grid = tiles("", "history")
        with gr.Column(scale=4, min_width=320, elem_classes="ia-results"):
            big = gr.HTML(NOBODY, elem_id="history-big", apply_default_css=False)
            with gr.Row(visible=False, elem_classes="ia-buttons") as buttons:
                again = gr.Button("Use these settings", size="sm", variant="primary", elem_id="history-use")
                compare = gr.Button("Compare", size="sm", elem_id="history-compare")
                remove = gr.Button("Delete", size="sm", variant="stop", elem_id="history-delete")

    def show(request: gr.Request) -> str:
        return _shown(house, owner(request))

    def choose(event: gr.EventData, request: gr.Request) -> list[Any]:
        id = chosen(event)
        return [id, results.big(house, id, owner(request)), gr.Row(visible=True)]

    def use(id: str, request: gr.Request) -> list[Any]:
        return results.refill(shared, id, owner(request), "generate")

    def compared(id: str, request: gr.Request) -> list[Any]:
        return results.refill(shared, id, owner(request), "compare")

    def delete(id: str, request: gr.Request) -> list[Any]:
        try:
            house.playground.album.remove(id, house.playground.whose(owner(request)))
        except ImgadaptError as error:
            warn(str(error))
        return ["", NOBODY, gr.Row(visible=False), _shown(house, owner(request))]

    refresh.click(show, None, grid, **QUIET)
    gr.on([shared.tabs.change, shared.page_loaded.change], show, None, grid, **QUIET)
    grid.select(choose, None, [current, big, buttons], **QUIET)
    again.click(use, current, shared.filled, **QUIET)
    compare.click(compared, current, shared.filled, **QUIET)
    remove.click(delete, current, [current, big, buttons, grid], **QUIET)


def _shown(house: House, owner: str) -> str:
    found = house.playground.album.recent(COUNT, house.playground.whose(owner))
    if not found:
        return empty("No pictures yet", "What you draw in Generate and Compare is kept here.")
    rows = "".join(
        f'<button type="button" data-id="{text(one.id)}">{thumb(one.id, results.alt(one))}</button>' for one in found
    )
    return f'<div class="ia-strip ia-history">{rows}</div>'
