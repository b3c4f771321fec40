"""The Compare tab: grids over axes, all from the same noise; and which blocks of an adapter matter."""

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import gradio as gr

from imgadapt.errors import ConfigError, ImgadaptError
from imgadapt.playground.desk import public
from imgadapt.playground.forms import number
from imgadapt.playground.grids.grids import Grid, GridRequest
from imgadapt.playground.house import House
from imgadapt.playground.prompts import parse
from imgadapt.playground.requests import GenerateRequest
from imgadapt_ui import analysing, axes, boxes, grid_html
from imgadapt_ui.axes import AxisForm
from imgadapt_ui.grid_view import GridView
from imgadapt_ui.parts import QUIET, Shared
from imgadapt_ui.telling import LATEST, LIVE, fault, open_number, told
from imgadapt_ui.who import owner


class Form:
    """What is asked: the Generate tab's settings, what is otherwise here, and the axes."""

    def __init__(self, shared: Shared) -> None:
        self.shared = shared
        self.summary = gr.HTML("", elem_id="grid-common", apply_default_css=False)
        self.axes = [
            AxisForm(shared.house, letter, kind, values)
            for letter, kind, values in (("x", "weight", "0:1:0.5"), ("y", "seed", "1..3"), ("z", "", ""))
        ]
        with gr.Accordion("Other than in Generate", open=False):
            self.prompt = gr.Textbox(label="Prompt", placeholder="as in Generate", elem_id="grid-prompt")
            with gr.Row():
                self.seed = open_number("Seed", "as in Generate", "grid-seed", 120)
                self.steps = open_number("Steps", "as in Generate", "grid-steps", 120)
            with gr.Row():
                self.name = gr.Textbox(label="Name of the grid", max_length=200, min_width=160)
                self.baseline = gr.Checkbox(True, label="A column without adapters", min_width=160)
        self.estimate = gr.HTML("", elem_id="grid-estimate", apply_default_css=False)

    @property
    def own(self) -> list[Any]:
        """Its components, after the Generate tab's in `inputs`."""
        return [
            self.prompt,
            self.seed,
            self.steps,
            self.name,
            self.baseline,
            *(c for axis in self.axes for c in axis.fields),
        ]

    @property
    def inputs(self) -> list[Any]:
        return [*self.shared.fields, *self.own]

    def asked(self, values: Sequence[Any]) -> GridRequest:
        """Raises ConfigError: what is wrong with the form."""
        count = len(self.shared.fields)
        prompt, seed, steps, name, baseline, *rest = values[count:]
        changed = {"prompt": prompt, "seed": number(seed), "steps": number(steps)}
        common = self.shared.asked(values[:count]).model_dump(mode="json", exclude_none=True)
        common |= {key: value for key, value in changed.items() if value not in (None, "")} | {"count": 1}
        common.pop("layout", None)
        along = {letter: axes.asked(rest[3 * k : 3 * k + 3]) for k, letter in enumerate("xyz")}
        asked = {"common": common, "name": name or "", "baseline": bool(baseline)}
        return GridRequest.of({**asked, **{letter: axis for letter, axis in along.items() if axis is not None}})

    def told(self, *values: Any) -> list[str]:
        """What is taken from Generate, and what the grid will take; or what is wrong with it."""
        return [self.summarised(values), self.estimated(*values)]

    def summarised(self, values: Sequence[Any]) -> str:
        """What is taken from the Generate tab, in a line."""
        try:
            common = self.shared.asked(values[: len(self.shared.fields)])
            prompt, stack = words_and_stack(self.shared.house, common)
        except ConfigError as error:
            return boxes.note(f"In the Generate tab: {public(str(error))}", "bad")
        shown = prompt if len(prompt) < 80 else prompt[:77] + "..."
        sampler = "the base's own sampler" if common.sampler == "base" else common.sampler
        steps = f"{common.steps} step{'s' * (common.steps != 1)}"
        said = [f"“{shown}”" if shown else "no prompt", stack or "no adapters", steps, sampler]
        return boxes.note("From Generate: " + " · ".join(said))

    def estimated(self, *values: Any) -> str:
        """How much a grid is, or why it cannot be drawn."""
        try:
            return boxes.note(grid_html.estimate(self.shared.house.grids.plan(self.asked(values))))
        except ImgadaptError as error:
            return boxes.note(public(str(error)), "bad")


def words_and_stack(house: House, request: GenerateRequest) -> tuple[str, str]:
    """A prompt without its tags, and all adapters with their weights, those of the tags too.

    Raises:
        ConfigError: a tag that cannot be read.
    """
    parsed = parse(request.prompt)
    used = [(_name(house, use.adapter), use.weight) for use in request.adapters]
    used += [(tag.name, tag.weight) for tag in parsed.tags]
    return parsed.prompt, ", ".join(f"{name} {weight:g}" for name, weight in used)


def _name(house: House, id: str) -> str:
    try:
        return house.playground.library.get(id).name
    except ConfigError:
        return "an adapter that is gone"


def build(shared: Shared) -> None:
    """Fill the tab; called inside of it, when the other tabs' shared components are there."""
    with gr.Row(elem_classes="ia-desk"):
        with gr.Column(scale=2, min_width=320):
            form = Form(shared)
            with gr.Row(elem_classes="ia-buttons"):
                start = gr.Button("Draw", variant="primary", min_width=90, elem_id="grid-start")
                stop = gr.Button("Stop", variant="stop", min_width=90, elem_id="grid-stop", interactive=False)
                resume = gr.Button("Resume", min_width=90, elem_id="grid-resume", interactive=False)
            earlier = gr.Dropdown([], value=None, label="Earlier grids", elem_id="grid-earlier")
        with gr.Column(scale=3, min_width=320):
            view = GridView(shared.house, stop, resume)
    with gr.Accordion("Which blocks of an adapter matter", open=False):
        analysing.build(shared)
    for axis in form.axes:
        axis.wire()
    view.wire(shared)
    _wire_form(shared, form, earlier)
    _wire_drawing(shared.house, form, view, (start, stop, resume), earlier)
    shared.further["compare"] = form.axes[0]


def _wire_form(shared: Shared, form: Form, earlier: gr.Dropdown) -> None:
    gr.on([one.change for one in form.own], form.estimated, form.inputs, form.estimate, **LATEST)

    def opened(*values: Any) -> list[Any]:
        *rest, request = values
        return [*form.told(*rest), gr.Dropdown(choices=_earlier(shared.house, owner(request)))]  # pyright: ignore[reportArgumentType]

    def entered(request: gr.Request, *values: Any) -> list[Any]:
        return opened(*values, request)

    shared.tabs.change(entered, form.inputs, [form.summary, form.estimate, earlier], **QUIET)


def _earlier(house: House, owner: str) -> list[tuple[str, str]]:
    return [(_said(grid), grid.id) for grid in house.grids.recent(owner)]


def _said(grid: Grid) -> str:
    made = time.strftime("%d %b %H:%M", time.localtime(grid.made))
    kinds = " x ".join(axis.kind for axis in (grid.request.x, grid.request.y, grid.request.z) if axis is not None)
    done = len(grid.cells) - grid_html.missing(grid)
    return f"{grid.request.name or kinds} · {made} · {done}/{len(grid.cells)}"


def _wire_drawing(
    house: House, form: Form, view: GridView, buttons: tuple[gr.Button, gr.Button, gr.Button], earlier: gr.Dropdown
) -> None:
    start, stop, resume = buttons

    async def draw(request: gr.Request, *values: Any) -> AsyncGenerator[list[Any], None]:
        who = owner(request)
        with told():
            ticket = await asyncio.to_thread(lambda: house.grids.start(form.asked(values), owner=who))
        async for update in view.follow(ticket, who):
            yield update

    async def go_on(id: str, request: gr.Request) -> AsyncGenerator[list[Any], None]:
        if not id:
            raise fault("Choose one of the earlier grids first")
        who = owner(request)
        with told():
            ticket = await asyncio.to_thread(lambda: house.grids.resume(id, owner=who))
        async for update in view.follow(ticket, who):
            yield update

    async def rejoin(id: str, request: gr.Request) -> AsyncGenerator[list[Any], None]:
        yield [gr.skip() for _ in view.shown]  # of nothing at all Gradio would make empty values
        if id:  # this page follows one, or shows one
            return
        async for update in view.follow(None, owner(request)):
            yield update

    def choose(id: str | None, request: gr.Request) -> list[Any]:
        with told():
            return view.show(house.grids.get(id, owner(request))) if id else view.nothing()

    def listed(request: gr.Request) -> Any:
        return gr.Dropdown(choices=_earlier(house, owner(request)))  # pyright: ignore[reportArgumentType]

    gone = [view.index, view.pair, view.buttons, view.verdict]

    def cleared() -> list[Any]:
        return [-1, "", gr.Row(visible=False), ""]

    for button, work, inputs in ((start, draw, form.inputs), (resume, go_on, [view.id])):
        event = button.click(work, inputs, view.shown, **LIVE)
        event.then(listed, None, earlier, **QUIET).then(form.estimated, form.inputs, form.estimate, **QUIET)
    start.click(cleared, None, gone, **QUIET)
    stop.click(view.stop, None, None, **QUIET)
    earlier.input(choose, earlier, view.shown, **QUIET).then(cleared, None, gone, **QUIET)
    form.shared.page_loaded.change(rejoin, view.id, view.shown, **LIVE)
