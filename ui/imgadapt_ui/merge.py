"""The Merge tab: a stack as one file, after looking at what that would be."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import gradio as gr

from imgadapt.playground.desk import Done, Failed, Ticket
from imgadapt.playground.library.library import Card
from imgadapt.playground.requests import Use
from imgadapt_ui import boxes, lab_html
from imgadapt_ui.following import follow
from imgadapt_ui.merge_form import MergeForm
from imgadapt_ui.parts import QUIET, Shared, adapters, bar, counted, empty, link
from imgadapt_ui.stack import added
from imgadapt_ui.telling import LIVE, fault, inform, told
from imgadapt_ui.who import owner

NOTHING = empty(
    "No report yet", "Choose two adapters or more and press Look: how alike they are, and what a rank costs."
)
_SIZE = 1_000_000


def build(shared: Shared) -> None:
    """Fill the tab; called inside of it, when the other tabs' shared components are there."""
    with gr.Row(elem_classes="ia-desk"):
        with gr.Column(scale=2, min_width=320):
            take = gr.Button("Take the Generate tab's stack", size="sm", elem_id="merge-take")
            form = MergeForm(shared.house)
            with gr.Row(elem_classes="ia-buttons"):
                look = gr.Button("Look", min_width=80, elem_id="merge-look")
                live = gr.Button("Try as a live stack", min_width=120, elem_id="merge-live")
                save = gr.Button("Save", variant="primary", min_width=80, elem_id="merge-save")
                stop = gr.Button("Stop", variant="stop", min_width=80, elem_id="merge-stop", interactive=False)
        with gr.Column(scale=3, min_width=320):
            progress = gr.HTML("", elem_id="merge-progress", apply_default_css=False)
            saved = gr.HTML("", elem_id="merge-saved", apply_default_css=False)
            with gr.Row(visible=False, elem_classes="ia-buttons") as further:
                only = gr.Button("Use it instead of the stack", size="sm", min_width=150, elem_id="merge-use")
                also = gr.Button("Add it to the stack", size="sm", min_width=130, elem_id="merge-add")
            report = gr.HTML(NOTHING, elem_id="merge-report", apply_default_css=False)
            with gr.Accordion("Replay a merged file's recipe", open=False):
                made = gr.Dropdown(adapters(shared.house), value=None, label="Adapter", elem_id="merge-replay-of")
                replay = gr.Button("Fill the form with its recipe", size="sm", elem_id="merge-replay")
    form.wire()
    _wire_stack(shared, form, take, live, (made, replay))
    _wire_work(shared, form, (look, save, stop), (progress, report, saved, further), (only, also))


def _wire_stack(
    shared: Shared, form: MergeForm, take: gr.Button, live: gr.Button, again: tuple[gr.Dropdown, gr.Button]
) -> None:
    def taken(*values: Any) -> list[Any]:
        with told():
            stack = shared.asked(values).adapters
        if not stack:
            inform("There are no adapters in the Generate tab yet")
        return form.with_stack(stack)

    def tried(*values: Any) -> list[Any]:
        with told():
            return shared.fill_stack(form.asked(values).adapters)

    def replayed(id: str | None) -> list[Any]:
        if not id:
            raise fault("Choose a merged adapter first")
        with told():
            return form.filled(shared.house.lab.replay(id))

    def refreshed() -> list[Any]:
        return [*form.refreshed(), gr.Dropdown(choices=adapters(shared.house))]  # pyright: ignore[reportArgumentType]

    take.click(taken, shared.fields, form.shown, **QUIET)
    live.click(tried, form.inputs, shared.filled, **QUIET)
    again[1].click(replayed, again[0], form.shown, **QUIET)
    shared.library_changed.change(refreshed, None, [*(row[0] for row in form.rows), again[0]], **QUIET)


def _wire_work(
    shared: Shared,
    form: MergeForm,
    buttons: tuple[gr.Button, gr.Button, gr.Button],
    shown: tuple[gr.HTML, gr.HTML, gr.HTML, gr.Row],
    uses: tuple[gr.Button, gr.Button],
) -> None:
    look, save, stop = buttons
    progress, report, saved, further = shown
    merged = gr.State("")
    tickets: dict[str, Ticket[Any]] = {}

    async def followed(ticket: Ticket[Any], who: str) -> AsyncGenerator[Any, None]:
        tickets[who] = ticket
        try:
            async with aclosing(follow(ticket)) as events:
                async for event in events:
                    yield event
        finally:
            tickets.pop(who, None)

    async def looked(request: gr.Request, *values: Any) -> AsyncGenerator[list[Any], None]:
        who = owner(request)
        with told():
            ticket = await asyncio.to_thread(lambda: shared.house.lab.report(form.asked(values), owner=who))
        async for event in followed(ticket, who):
            done = isinstance(event, Done)
            ended = isinstance(event, Done | Failed)
            yield [bar(event), lab_html.report(event.result) if done else gr.skip(), gr.Button(interactive=not ended)]

    async def kept(request: gr.Request, *values: Any) -> AsyncGenerator[list[Any], None]:
        who = owner(request)
        with told():
            ticket = await asyncio.to_thread(lambda: shared.house.lab.save(form.asked(values), owner=who))
        over = gr.Button(interactive=False)
        async for event in followed(ticket, who):
            if isinstance(event, Done):
                yield ["", card(event.result), gr.Row(visible=True), event.result.id, counted(), over]
            elif isinstance(event, Failed):
                yield [bar(event), "", gr.Row(visible=False), "", gr.skip(), over]
            else:
                yield [bar(event), *(gr.skip() for _ in range(4)), gr.Button(interactive=True)]

    def halt(request: gr.Request) -> None:
        if ticket := tickets.get(owner(request)):
            ticket.cancel()

    def instead(id: str) -> list[Any]:
        with told():
            return shared.fill_stack([Use(adapter=shared.house.playground.library.get(id).id)])

    def beside(id: str, *values: Any) -> list[Any]:
        return added(shared, id, values, "generate")

    look.click(looked, form.inputs, [progress, report, stop], **LIVE)
    save.click(kept, form.inputs, [progress, saved, further, merged, shared.library_changed, stop], **LIVE)
    stop.click(halt, None, None, **QUIET)
    uses[0].click(instead, merged, shared.filled, **QUIET)
    uses[1].click(beside, [merged, *shared.fields[:-1]], shared.filled, **QUIET)


def card(made: Card) -> str:
    """A file that was just saved."""
    kinds = ", ".join(f"{kind.method} {kind.rank or ''}".strip() for kind in made.kinds[:3])
    said = f"Saved as {made.name}: {kinds}, {made.format}, {made.size / _SIZE:.2f} MB; its recipe is in it."
    return boxes.note(said, "good") + link(f"/cards/{made.id}/file", "Download", f"{made.name}.safetensors")
