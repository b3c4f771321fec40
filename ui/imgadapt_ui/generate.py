"""The Generate tab: prompt, adapters, settings; pictures as they are drawn."""

from collections.abc import AsyncGenerator
from typing import Any

import gradio as gr

from imgadapt.errors import ImgadaptError
from imgadapt.playground.house import House
from imgadapt.playground.requests import RANDOM
from imgadapt_ui import results, start_picture
from imgadapt_ui.jobs import Job, Jobs
from imgadapt_ui.parts import QUIET, Shared, error_box, samplers
from imgadapt_ui.stack import Stack
from imgadapt_ui.telling import inform
from imgadapt_ui.who import owner

_LOST = "The playground was started anew while it drew: that drawing is lost. Press Generate to draw it again."
SIZES = {"Base's own": "", "512 x 512": "512", "768 x 768": "768", "1024 x 1024": "1024"}


class Generate:
    """The tab's components; `form` is what `Shared` has."""

    def __init__(self, house: House) -> None:
        self.house, self.jobs = house, Jobs()
        self.form: dict[str, Any] = {}
        with gr.Row(elem_classes="ia-desk ia-drawing"):
            with gr.Column(scale=5, min_width=320):
                self._prompt()
                self.stack = Stack(house)
                self.form |= self.stack.form
                self._settings()
                self.start = start_picture.StartPicture(house)
                self.form |= self.start.form
                self.restore = results.Restore(house)
            with gr.Column(scale=4, min_width=320, elem_classes="ia-results"):
                self.results = results.Results(house)

    def _prompt(self) -> None:
        self.form["prompt"] = gr.Textbox(
            label="Prompt",
            lines=3,
            max_lines=10,
            elem_id="prompt",
            placeholder="What to draw. <lora:name:0.8> adds an adapter, <lora:name:unet:te> with two weights.",
        )
        self.form["negative"] = gr.Textbox(
            label="Negative prompt", lines=1, max_lines=6, elem_id="negative", placeholder="What to keep out"
        )
        with gr.Row(elem_classes="ia-go"):
            self.go = gr.Button("Generate", variant="primary", elem_id="generate", scale=3, min_width=140)
            self.stop = gr.Button("Stop", variant="stop", elem_id="stop", scale=1, min_width=90, interactive=False)

    def _settings(self) -> None:
        form = self.form
        with gr.Group(elem_classes="ia-settings ia-after"):
            with gr.Row():
                form["sampler"] = gr.Dropdown(
                    samplers(self.house),
                    value="base",
                    label="Sampler",
                    min_width=150,
                    elem_id="sampler",
                )
                form["steps"] = gr.Slider(
                    1,
                    self.house.playground.settings.limits.steps,
                    20,
                    step=1,
                    label="Steps",
                    min_width=150,
                    elem_id="steps",
                    buttons=[],
                )
            with gr.Row():
                form["seed"] = gr.Number(RANDOM, label="Seed (-1: any)", precision=0, min_width=150, elem_id="seed")
                form["count"] = gr.Number(
                    1,
                    label="Pictures",
                    precision=0,
                    min_width=90,
                    elem_id="count",
                )  # (what is out of range, requests.py says, with the field's name)
                form["guidance"] = gr.Textbox(
                    "", label="Guidance", placeholder="auto", min_width=90, max_length=20, elem_id="guidance"
                )
            with gr.Row(elem_classes="ia-buttons"):
                self.any_seed = gr.Button("Any seed", size="sm", min_width=80)
                self.same_seed = gr.Button(
                    "Seed of the picture shown", size="sm", min_width=80, elem_id="last-seed", interactive=False
                )
            with gr.Row():
                self.size = gr.Dropdown(list(SIZES), value="Base's own", label="Size", min_width=140, elem_id="size")
                form["width"] = gr.Textbox(
                    "", label="Width", placeholder="auto", min_width=80, max_length=20, elem_id="width"
                )
                form["height"] = gr.Textbox(
                    "", label="Height", placeholder="auto", min_width=80, max_length=20, elem_id="height"
                )
        form["layout"] = gr.JSON(None, visible=False)

    def wire(self, shared: Shared) -> None:
        """All events of the tab."""
        self.stack.wire(shared)
        self.start.wire(shared)
        self.results.wire(shared, self.start)
        self.restore.wire(shared)
        form = self.form
        self.any_seed.click(lambda: RANDOM, None, form["seed"], **QUIET)
        self.same_seed.click(self._last_seed, shared.latest, form["seed"], **QUIET)
        self.size.input(
            lambda name: (SIZES[name], SIZES[name]),
            self.size,
            [form["width"], form["height"]],
            **QUIET,
        )
        drawing = gr.Textbox(visible=False)
        shown = [
            self.results.progress,
            self.results.big,
            self.results.strip,
            self.go,
            self.stop,
            shared.latest,
            drawing,
        ]

        async def draw(request: gr.Request, before: str, *values: Any) -> AsyncGenerator[list[Any], None]:
            try:
                asked = shared.asked(values)
                job = self.jobs.add(self.house.playground.generate(asked, owner=owner(request)))
            except ImgadaptError as error:
                yield [error_box(error), *(gr.skip() for _ in shown[1:])]
                return
            async for update in self._followed(job, before):
                yield update

        async def rejoin(drawn: str, request: gr.Request) -> AsyncGenerator[list[Any], None]:
            last = results.recent(self.house, owner(request))
            before = last[0].id if last else ""
            job = self.jobs.running(owner(request))
            lost = drawn and job is None and not self.jobs.knows(drawn)
            yield [
                error_box(_LOST) if lost else gr.skip(),  # (of nothing at all Gradio would make empty values)
                results.big(self.house, before) if before else gr.skip(),
                results.strip(last) if before else gr.skip(),
                gr.skip(),
                gr.skip(),
                before or gr.skip(),
                "",
            ]
            if job is not None:
                async for update in self._followed(job, before):
                    yield update

        for trigger in (self.go.click, form["prompt"].submit):
            trigger(draw, [shared.latest, *shared.fields], shown, **QUIET, concurrency_limit=None)
        drawing.change(None, drawing, None, js="(id) => window.iaDrawing(id)", **QUIET)
        self.stop.click(self._stop, None, None, **QUIET, queue=False)
        shared.latest.change(lambda id: gr.Button(interactive=bool(id)), shared.latest, self.same_seed, **QUIET)
        gr.on(
            [shared.page_loaded.change, shared.base_changed.change, shared.latest.change],
            self._offered,
            form["sampler"],
            form["sampler"],
            **QUIET,
        )
        self.rejoin = (rejoin, drawing, shown)

    async def _followed(self, job: Job, before: str) -> AsyncGenerator[list[Any], None]:
        """Updates of what the tab shows, while a job runs and when it has ended. before: the picture it showed."""
        many = 0
        async for state in job.follow():
            ended = state.ended is not None
            fresh = len(state.items) > many or ended
            many = len(state.items)
            newest = state.items[-1].id if state.items else None
            yield [
                results.now(state),
                results.shown(self.house, state, fresh, before) or gr.skip(),
                self._strip(state) if fresh and many else gr.skip(),
                gr.Button(interactive=ended),
                gr.Button(interactive=not ended),
                newest if newest and fresh else gr.skip(),
                "" if ended else job.id,
            ]

    def _strip(self, job: Job) -> str:
        """The job's pictures, and what was drawn before where there is room."""
        ids = {one.id for one in job.items}
        older = [one for one in results.recent(self.house, job.owner) if one.id not in ids]
        return results.strip([*job.items, *older[: max(results.SHOWN - len(ids), 0)]])

    def _offered(self, chosen: str) -> Any:
        """The samplers of the loaded base; one of another base's gives way, and that is said."""
        offered = samplers(self.house)
        if chosen in {name for _, name in offered}:
            return gr.Dropdown(choices=offered)  # pyright: ignore[reportArgumentType]
        inform(f"This base cannot be drawn with {chosen}; its own sampler is chosen instead")
        return gr.Dropdown(choices=offered, value="base")  # pyright: ignore[reportArgumentType]

    def _stop(self, request: gr.Request) -> None:
        self.jobs.cancel(owner(request))

    def _last_seed(self, latest: str, request: gr.Request) -> Any:
        record = results.record_of(self.house, latest, owner(request))
        if record is None:
            inform("No picture has been drawn yet")
            return gr.skip()
        return record["request"]["seed"]
