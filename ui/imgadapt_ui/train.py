"""The Train tab: pictures become an adapter, which is watched while it learns."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import gradio as gr

from imgadapt.errors import DataError, ImgadaptError
from imgadapt.playground.desk import Done
from imgadapt.playground.trainings.runs import Run
from imgadapt_ui import boxes, train_html
from imgadapt_ui.following import follow
from imgadapt_ui.parts import QUIET, Shared, bar, counted, empty, error_box
from imgadapt_ui.stack import added
from imgadapt_ui.telling import LIVE, told
from imgadapt_ui.train_form import TrainForm, asked, sets
from imgadapt_ui.train_html import ACTIVE
from imgadapt_ui.who import owner

NOTHING = empty(
    "No training yet",
    "Choose pictures, press Check to see the plan, then Start. The embedded style learns in a minute or two.",
)
EVERY = 2.0
"""Seconds between two looks at a run."""


class Watch:
    """The right-hand side: a run, live. runs: which one; cards: the adapters that it wrote."""

    def __init__(self, shared: Shared) -> None:
        self.shared, self.runs_of = shared, shared.house.runs
        self.runs = gr.Dropdown([], value=None, label="Trainings", elem_id="train-runs")
        self.view = gr.HTML(NOTHING, elem_id="train-run", apply_default_css=False)
        with gr.Row(elem_classes="ia-buttons"):
            self.stop = gr.Button("Stop (it saves)", variant="stop", min_width=100, visible=False, elem_id="train-stop")
            self.resume = gr.Button("Resume", min_width=90, visible=False, elem_id="train-resume")
        with gr.Row(visible=False) as self.results:
            self.cards = gr.Dropdown(
                [], value=None, label="Adapters it wrote", min_width=260, scale=2, elem_id="train-cards"
            )
            self.use = gr.Button("Use the result", size="sm", min_width=110, elem_id="train-use")
            self.compare = gr.Button("Compare checkpoints", size="sm", min_width=130, elem_id="train-compare")
        self.timer = gr.Timer(EVERY, active=False)

    @property
    def shown(self) -> list[Any]:
        """For outputs of events; see `show`."""
        return [self.view, self.stop, self.resume, self.results, self.cards, self.timer]

    def show(self, one: Run | None) -> list[Any]:
        """Updates for `shown`; the timer runs while the training does."""
        if one is None:
            shut = [gr.Button(visible=False), gr.Button(visible=False), gr.Row(visible=False)]
            return [NOTHING, *shut, gr.Dropdown(choices=[], value=None), gr.Timer(active=False)]
        active = one.state in ACTIVE
        cards: list[Any] = [(card.name, card.id) for card in one.cards]
        newest: dict[str, Any] = {"value": one.cards[-1].id} if cards and not active else {}
        return [
            train_html.run(one),
            gr.Button(visible=active),
            gr.Button(visible=one.state in ("stopped", "failed")),
            gr.Row(visible=bool(cards)),
            gr.Dropdown(choices=cards, **newest),
            gr.Timer(active=active),
        ]

    def get(self, id: str | None, request: gr.Request) -> list[Any]:
        """Updates for `shown` of the run that is chosen."""
        with told():
            return self.show(self.runs_of.get(id, owner(request)) if id else None)

    def choices(self, request: gr.Request, chosen: str | None) -> tuple[str | None, Any]:
        """The run that is chosen, the newest where none is, and an update of `runs` with it."""
        rows = self.runs_of.all(owner(request))
        value = chosen if chosen in {one.id for one in rows} else (rows[0].id if rows else None)
        return value, gr.Dropdown(choices=train_html.listed(rows), value=value)  # pyright: ignore[reportArgumentType]

    def wire(self) -> None:
        """Watching, stopping, going on, and what is done with the result."""
        shared = self.shared

        def tick(id: str | None, request: gr.Request) -> list[Any]:
            updates = self.get(id, request)
            with told():
                over = id is not None and self.runs_of.get(id, owner(request)).state not in ACTIVE
            return [*updates, self.choices(request, id)[1] if over else gr.skip(), counted() if over else gr.skip()]

        def enter(id: str | None, request: gr.Request) -> list[Any]:
            value, update = self.choices(request, id)
            return [update, *self.get(value, request)]

        def halt(id: str | None, request: gr.Request) -> None:
            with told():
                self.runs_of.stop(id or "", owner(request))

        def go_on(id: str | None, request: gr.Request) -> list[Any]:
            with told():
                return self.show(self.runs_of.resume(id or "", owner(request)))

        def use(card: str | None, *values: Any) -> list[Any]:
            return added(shared, card or "", values, "generate")

        self.timer.tick(tick, self.runs, [*self.shown, self.runs, shared.library_changed], **QUIET)
        self.runs.input(self.get, self.runs, self.shown, **QUIET)
        gr.on([shared.tabs.change, shared.page_loaded.change], enter, self.runs, [self.runs, *self.shown], **QUIET)
        self.stop.click(halt, self.runs, None, **QUIET)
        self.resume.click(go_on, self.runs, self.shown, **QUIET)
        self.use.click(use, [self.cards, *shared.fields[:-1]], shared.filled, **QUIET)
        axis = shared.further["compare"]

        def compare(card: str | None, request: gr.Request) -> list[Any]:
            return [*axis.show("checkpoint", "all", card, owner(request)), gr.Tabs(selected="compare")]

        self.compare.click(compare, self.cards, [*axis.shown, shared.tabs], **QUIET)


def build(shared: Shared) -> None:
    """Fill the tab; called inside of it, when the other tabs' shared components are there."""
    with gr.Row(elem_classes="ia-desk"):
        with gr.Column(scale=2, min_width=320):
            form = TrainForm(shared.house)
            with gr.Row(elem_classes="ia-buttons"):
                check = gr.Button("Check", min_width=90, elem_id="train-check")
                start = gr.Button("Start", variant="primary", min_width=90, elem_id="train-start")
            progress = gr.HTML("", elem_id="train-progress", apply_default_css=False)
            found = gr.HTML("", elem_id="train-found", apply_default_css=False)
        with gr.Column(scale=3, min_width=320):
            watch = Watch(shared)
    form.wire()
    watch.wire()
    _wire_data(shared, form)
    _wire_start(shared, form, watch, (check, start), (progress, found))


def _wire_data(shared: Shared, form: TrainForm) -> None:
    def keep(files: list[str] | None, name: str, request: gr.Request) -> list[Any]:
        who = owner(request)
        try:
            if not files:
                raise DataError("choose pictures first")
            given = [(Path(file).name, Path(file).read_bytes()) for file in files]
            made = shared.house.runs.add_dataset(name or "pictures", given, owner=who)
        except ImgadaptError as error:
            return [gr.skip(), gr.skip(), gr.skip(), error_box(error)]
        said = boxes.note(f"Kept as {made.name}: {made.pictures} pictures", "good")
        left = "".join(boxes.note(f"Not in it: {note}", "warn") for note in made.notes)
        return [gr.Dropdown(choices=sets(shared.house, who), value=made.id), None, "", said + left]  # pyright: ignore[reportArgumentType]

    def refreshed(chosen: str | None, request: gr.Request) -> Any:
        rows = sets(shared.house, owner(request))
        known = {id for _, id in rows}
        return gr.Dropdown(choices=rows, value=chosen if chosen in known else (rows[0][1] if rows else None))  # pyright: ignore[reportArgumentType]

    form.upload.click(keep, [form.files, form.called], [form.data, form.files, form.called, form.said], **QUIET)
    gr.on([shared.tabs.change, shared.page_loaded.change], refreshed, form.data, form.data, **QUIET)


def _wire_start(
    shared: Shared,
    form: TrainForm,
    watch: Watch,
    buttons: tuple[gr.Button, gr.Button],
    shown: tuple[gr.HTML, gr.HTML],
) -> None:
    inputs = [shared.base, *form.inputs]

    async def checked(request: gr.Request, base: str | None, *values: Any) -> AsyncGenerator[list[Any], None]:
        with told():
            ticket = await asyncio.to_thread(lambda: shared.house.runs.check(asked(values, base), owner=owner(request)))
        async with aclosing(follow(ticket)) as events:
            async for event in events:
                done = isinstance(event, Done)
                yield [bar(event), train_html.check(event.result) if done else gr.skip()]

    def started(request: gr.Request, base: str | None, *values: Any) -> list[Any]:
        with told():
            one = shared.house.runs.start(asked(values, base), owner=owner(request))
        return [watch.choices(request, one.id)[1], *watch.show(one)]

    buttons[0].click(checked, inputs, list(shown), **LIVE)
    buttons[1].click(started, inputs, [watch.runs, *watch.shown], **QUIET)
