"""Analysing: which blocks of an adapter change the picture, as bars."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import gradio as gr

from imgadapt.errors import ConfigError
from imgadapt.playground.desk import Done, Failed, Made, Ticket
from imgadapt.playground.grids.analyser import AnalyseRequest, BlockEffect
from imgadapt.playground.requests import GenerateRequest, Use
from imgadapt_ui import boxes, grid_html
from imgadapt_ui.following import follow
from imgadapt_ui.parts import QUIET, Shared, adapters, bar
from imgadapt_ui.telling import LIVE, told
from imgadapt_ui.who import owner


def build(shared: Shared) -> None:
    """The analyser's components and events."""
    gr.Markdown("Draws the Generate tab's picture with each block of the adapter alone, and with each block left out.")
    with gr.Row():
        adapter = gr.Dropdown(adapters(shared.house), label="Adapter", min_width=200, elem_id="analyse-adapter")
        seeds = gr.Slider(1, 8, 2, step=1, label="Pictures", min_width=160, elem_id="analyse-seeds")
    with gr.Row(elem_classes="ia-buttons"):
        start = gr.Button("Analyse", min_width=100, elem_id="analyse-start")
        stop = gr.Button("Stop", variant="stop", min_width=80, interactive=False)
        use = gr.Button("Use the suggestion in the stack", visible=False, min_width=160, elem_id="analyse-use")
    progress = gr.HTML("", apply_default_css=False)
    shown = gr.HTML("", elem_id="analysis", apply_default_css=False)
    suggested = gr.State("")
    tickets: dict[str, Ticket[Any]] = {}

    async def analyse(
        request: gr.Request, id: str | None, count: int, *values: Any
    ) -> AsyncGenerator[tuple[Any, ...], None]:
        who = owner(request)
        with told():
            common = with_adapter(shared.asked(values), id or "")
            asked = AnalyseRequest.of({"common": common.model_dump(mode="json"), "adapter": id or "", "seeds": count})
            ticket = await asyncio.to_thread(lambda: shared.house.analyser.start(asked, owner=who))
        tickets[who] = ticket
        found: list[BlockEffect] = []
        goes, over = gr.Button(interactive=True), gr.Button(interactive=False)
        try:
            async with aclosing(follow(ticket)) as events:
                async for event in events:
                    if isinstance(event, Made) and isinstance(event.item, BlockEffect):
                        found.append(event.item)
                        yield gr.skip(), grid_html.effects(found), "", gr.Button(visible=False), goes
                    elif isinstance(event, Done):
                        said = boxes.note(event.result.said) + grid_html.effects(event.result.effects)
                        yield "", said, event.result.suggestion, gr.Button(visible=bool(event.result.suggestion)), over
                    elif isinstance(event, Failed):
                        yield bar(event), gr.skip(), "", gr.Button(visible=False), over
                    else:
                        yield bar(event), gr.skip(), gr.skip(), gr.skip(), goes
        finally:
            tickets.pop(who, None)

    def halt(request: gr.Request) -> None:
        if ticket := tickets.get(owner(request)):
            ticket.cancel()

    def suggestion(blocks: str, id: str | None, *values: Any) -> list[Any]:
        with told():
            stack = with_adapter(shared.asked(values), id or "").adapters
            return shared.fill_stack(
                [use.model_copy(update={"blocks": blocks}) if use.adapter == id else use for use in stack]
            )

    start.click(analyse, [adapter, seeds, *shared.fields], [progress, shown, suggested, use, stop], **LIVE)
    stop.click(halt, None, None, **QUIET)
    use.click(suggestion, [suggested, adapter, *shared.fields], shared.filled, **QUIET)
    shared.library_changed.change(
        lambda: gr.Dropdown(choices=adapters(shared.house)),  # pyright: ignore[reportArgumentType]
        None,
        adapter,
        **QUIET,
    )


def with_adapter(common: GenerateRequest, id: str) -> GenerateRequest:
    """One picture, with an adapter in its stack.

    Raises:
        ConfigError: none is chosen.
    """
    if not id:
        raise ConfigError("choose an adapter to analyse")
    there = any(use.adapter == id for use in common.adapters)
    stack = common.adapters if there else (*common.adapters, Use(adapter=id))
    return common.model_copy(update={"count": 1, "layout": None, "adapters": stack})
