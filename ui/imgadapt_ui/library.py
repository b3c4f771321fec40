"""The Library tab: adapters as cards, and all about the chosen one."""

from typing import Any

import gradio as gr

from imgadapt.errors import ImgadaptError
from imgadapt.playground import forms
from imgadapt.playground.house import House
from imgadapt_ui import cards_html
from imgadapt_ui.parts import QUIET, Shared, chosen, counted, empty, text, tiles
from imgadapt_ui.results import picture_of
from imgadapt_ui.stack import added, known
from imgadapt_ui.telling import fault, inform
from imgadapt_ui.who import owner

NOBODY = empty("No adapter chosen", "Choose a card to see what it is, and whether it goes on the loaded base.")


def build(shared: Shared) -> None:
    """Fill the tab."""
    library = shared.house.playground.library
    with gr.Row(elem_classes="ia-bar"):
        search = gr.Textbox(
            label="Search", placeholder="name, folder, trigger word, method", elem_id="search", min_width=220, scale=3
        )
        family = gr.Dropdown([("All", "")], value="", label="For base", min_width=120, elem_id="family")
        folder = gr.Dropdown([("All", "")], value="", label="Folder", min_width=120, elem_id="folder")
        rescan = gr.Button("Rescan", min_width=90, scale=0, elem_id="rescan")
    current = gr.Textbox(visible=False)
    with gr.Row(elem_classes="ia-desk ia-browse"):
        with gr.Column(scale=5, min_width=320):
            grid = tiles("", "cards")
        with gr.Column(scale=4, min_width=320, elem_classes="ia-results"):
            about = gr.HTML(NOBODY, elem_id="details", apply_default_css=False)
            with gr.Row(visible=False, elem_classes="ia-buttons") as buttons:
                add = gr.Button("Add to stack", size="sm", variant="primary", elem_id="add-to-stack")
                picture = gr.Button("Last picture as preview", size="sm", elem_id="set-preview")

    def show(words: str, kind: str, where: str, id: str) -> str:
        found = library.cards(words or "", kind or "", where or "")
        return cards_html.cards(found, bool(words or kind or where), id)

    def filters() -> list[Any]:
        found = library.cards()
        kinds = sorted({card.architecture for card in found if card.architecture})
        folders = sorted({card.folder for card in found if card.folder})
        return [gr.Dropdown(choices=[("All", ""), *((one, one) for one in names)]) for names in (kinds, folders)]

    def choose(words: str, kind: str, where: str, event: gr.EventData) -> list[Any]:
        id = chosen(event)
        card = known(shared.house, id)
        there = gr.Row(visible=card is not None and not card.fault)
        return [id, *again(id), there, show(words, kind, where, id)]

    def scan() -> int:
        library.scan()
        return counted()

    def stacked(id: str, *values: Any) -> list[Any]:
        return added(shared, id, values, "generate")

    def again(id: str) -> list[Any]:
        """All about it, and whether it can be added: nothing of some goes on the loaded base."""
        if not id:
            return [gr.skip(), gr.skip()]
        said, goes = looked(shared.house, id)
        return [said, gr.Button(visible=goes)]

    wanted = [search, family, folder, current]
    for field in (search, family, folder):
        field.change(show, wanted, grid, **QUIET, trigger_mode="always_last")
    grid.select(choose, [search, family, folder], [current, about, add, buttons, grid], **QUIET)
    rescan.click(scan, None, shared.library_changed, **QUIET)
    shared.library_changed.change(filters, None, [family, folder], **QUIET).then(show, wanted, grid, **QUIET)
    shared.base_changed.change(again, current, [about, add], **QUIET)
    add.click(stacked, [current, *(shared.form[name] for name in forms.FIELDS)], shared.filled, **QUIET)
    picture.click(_preview(shared), [current, shared.latest], shared.library_changed, **QUIET)


def _preview(shared: Shared) -> Any:
    def use(id: str, latest: str, request: gr.Request) -> Any:
        picture = picture_of(shared.house, latest, owner(request)) if latest else None
        if picture is None:
            inform("No picture has been drawn yet")
            return gr.skip()
        try:
            shared.house.playground.library.set_preview(id, picture.path.read_bytes())
        except ImgadaptError as error:
            raise fault(str(error), title="No preview set") from None
        return counted()

    return use


def looked(house: House, id: str) -> tuple[str, bool]:
    """All about an adapter, as HTML, and whether something of it goes on the loaded base, where one is."""
    try:
        card = house.playground.library.get(id)
        if card.fault:
            return cards_html.fault(card), False
        found = house.inspector.look(id)
    except ImgadaptError as error:
        return f'<div class="ia-error" role="alert">{text(error)}</div>', False
    return cards_html.details(found), found.match is None or found.match.verdict != "none"


def details(house: House, id: str) -> str:
    """All about an adapter, as HTML."""
    return looked(house, id)[0]
