"""Stack: the adapters of the Generate tab, a row each."""

from collections.abc import Collection, Mapping
from typing import Any

import gradio as gr

from imgadapt.combining.blocks import CONSTANT, PRESETS
from imgadapt.errors import ConfigError
from imgadapt.methods import METHODS
from imgadapt.playground import forms
from imgadapt.playground.house import House
from imgadapt.playground.library.library import Card
from imgadapt.playground.requests import Use
from imgadapt_ui.parts import QUIET, Shared, adapters, text
from imgadapt_ui.telling import fault, inform, warn

_CALLED = {method.name: method.__name__ for method in METHODS}
_PRESETS = ["", *dict.fromkeys([*(name for table in PRESETS.values() for name in table), *CONSTANT])]


class Stack:
    """Its components; `wire` gives them their events when the rest of the page is there."""

    def __init__(self, house: House) -> None:
        self.house = house
        self.form: dict[str, Any] = {}
        self.groups: list[gr.Group] = []
        self.heads: list[gr.HTML] = []
        self.buttons: list[tuple[gr.Button, gr.Button]] = []
        self.add = gr.Dropdown(
            adapters(house),
            value=None,
            label="Add an adapter",
            info="or write <lora:name:0.8> in the prompt",
            elem_id="add-adapter",
            elem_classes="ia-after",
        )
        for row in range(forms.ROWS):
            self._row(row)

    def _row(self, row: int) -> None:
        form = self.form
        name = "{}_{}".format
        with gr.Group(visible=False, elem_classes="ia-use ia-after", elem_id=f"use-{row}") as group:
            with gr.Row(elem_classes="ia-use-head"):
                self.heads.append(gr.HTML("", apply_default_css=False))
                words = gr.Button("Insert words", size="sm", visible=False, min_width=90, scale=0)
                remove = gr.Button("Remove", size="sm", min_width=70, scale=0, elem_id=f"remove-{row}")
            form[name("adapter", row)] = gr.Textbox(visible=False)
            form[name("weight", row)] = gr.Slider(
                -2, 2, 1.0, step=0.05, label="Weight", elem_id=f"weight-{row}", buttons=[]
            )
            with gr.Accordion("Text encoder, blocks, steps", open=False):
                with gr.Row():
                    form[name("text", row)] = gr.Textbox(
                        "", label="Text encoder weight", placeholder="as weight", min_width=130, max_length=20
                    )
                    form[name("blocks", row)] = gr.Dropdown(
                        _PRESETS, value="", label="Blocks: preset or list", min_width=130, allow_custom_value=True
                    )
                with gr.Row():
                    form[name("start", row)] = gr.Number(0, label="From step", precision=0, min_width=130, step=1)
                    form[name("stop", row)] = gr.Textbox(
                        "", label="Up to step", placeholder="the end", min_width=130, max_length=20
                    )
        self.groups.append(group)
        self.buttons.append((words, remove))

    def wire(self, shared: Shared) -> None:
        """Adding, removing, inserting, and showing what is in the rows."""
        fields = [shared.form[name] for name in forms.FIELDS]
        ids = [self.form[f"adapter_{row}"] for row in range(forms.ROWS)]

        def add(id: str | None, *values: Any) -> list[Any]:
            return [None, *added(shared, id or "", values)]

        self.add.input(add, [self.add, *fields], [self.add, *shared.filled], **QUIET)
        for row, (words, remove) in enumerate(self.buttons):

            def removed(*values: Any, row: int = row) -> list[Any]:
                return without(shared, row, values)

            remove.click(removed, fields, shared.filled, **QUIET)
            words.click(
                self.inserted,
                [ids[row], self.form_prompt(shared)],
                self.form_prompt(shared),
                **QUIET,
            )
        shown: list[Any] = [*self.groups, *self.heads, *(words for words, _ in self.buttons)]
        shared.form_changed.change(self.show, ids, shown, **QUIET)
        shared.library_changed.change(
            lambda: gr.Dropdown(choices=adapters(self.house)),
            None,
            self.add,
            **QUIET,
        )

    @staticmethod
    def form_prompt(shared: Shared) -> Any:
        return shared.form["prompt"]

    def inserted(self, id: str, prompt: str) -> str:
        """The prompt with an adapter's trigger words, which come once."""
        card = known(self.house, id)
        new = [word for word in (card.trigger if card else ()) if word not in (prompt or "")]
        return ", ".join([*([prompt] if prompt else []), *new])

    def show(self, *ids: str) -> list[Any]:
        """Updates of the rows' groups, heads and buttons."""
        cards = [known(self.house, id) for id in ids]
        groups = [gr.Group(visible=bool(id)) for id in ids]
        heads = [head(card) if id else "" for id, card in zip(ids, cards, strict=True)]
        words = [gr.Button(visible=bool(card and card.trigger)) for card in cards]
        return [*groups, *heads, *words]


def known(house: House, id: str) -> Card | None:
    """The card of an id that a client sent, where there is one."""
    try:
        return house.playground.library.get(id) if id else None
    except ConfigError:
        return None


def head(card: Card | None) -> str:
    """A row's name, and what kind of adapter it is."""
    if card is None:
        return '<span class="ia-use-name ia-bad">This adapter is no longer here</span>'
    return f'<span class="ia-use-name">{text(card.name)}</span> <span class="ia-dim">{text(kinds(card))}</span>'


def called(method: str) -> str:
    """A method as people write it."""
    return _CALLED.get(method, method)


def kinds(card: Card) -> str:
    """Method and rank, in a few words."""
    ranks: dict[str, set[int]] = {}
    for kind in card.kinds:
        ranks.setdefault(kind.method, set()).update([kind.rank] if kind.rank else [])
    names = [_ranked(called(name), ranks[name]) for name in ranks]
    return " + ".join(names[:2]) + (f" + {len(names) - 2} more" if len(names) > 2 else "")


def _ranked(method: str, ranks: Collection[int]) -> str:
    if not ranks:
        return method
    least, most = min(ranks), max(ranks)
    return f"{method}, rank {least}" + (f" to {most}" if most > least else "")


def added(shared: Shared, id: str, values: Any, tab: str | None = None) -> list[Any]:
    """Updates of `shared.filled`: with one more adapter, at the weight that its maker recommends."""
    stack = _uses(values)
    if not id:
        return shared.unchanged()
    card = known(shared.house, id)
    if card is None or card.fault:
        warn("This adapter cannot be used" + (f": {card.fault}" if card else "; it is no longer here"))
        return shared.unchanged()
    if any(use.adapter == id for use in stack):
        inform(f"{card.name} is in the stack already")
        return [*shared.unchanged()[:-1], gr.Tabs(selected=tab) if tab else gr.skip()]
    if len(stack) >= forms.ROWS:
        warn(f"The stack has room for {forms.ROWS} adapters; take one out first")
        return shared.unchanged()
    return shared.fill_stack([*stack, Use(adapter=id, weight=card.weight)], tab)


def without(shared: Shared, row: int, values: Any) -> list[Any]:
    """Updates of `shared.filled`: without the adapter in a row."""
    form = dict(zip(forms.FIELDS, values, strict=True))
    gone = form[f"adapter_{row}"]
    return shared.fill_stack([use for use in _uses(values) if use.adapter != gone], None)


def _uses(values: Any) -> list[Use]:
    form: Mapping[str, Any] = dict(zip(forms.FIELDS, values, strict=True))
    try:
        return [Use.of(row) for row in forms.uses(form)]
    except ConfigError as error:
        raise fault(str(error)) from None
