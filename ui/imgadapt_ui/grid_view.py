"""Grid view: a grid as it is drawn, and a cell of it that is looked at."""

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

import gradio as gr
from PIL import Image

from imgadapt.playground.desk import Done, Failed, Ticket
from imgadapt.playground.grids.grids import Cell, Grid
from imgadapt.playground.house import House
from imgadapt.playground.pictures.comparing import difference, heat
from imgadapt.playground.requests import GenerateRequest
from imgadapt_ui import boxes, grid_html
from imgadapt_ui.following import follow
from imgadapt_ui.jobs import Job, Jobs
from imgadapt_ui.parts import QUIET, Shared, bar, empty, link
from imgadapt_ui.telling import LIVE, fault, told, warn
from imgadapt_ui.who import owner

NOTHING = empty("No grid yet", "Choose what differs along X and Y, and press Draw. It stops within a step and resumes.")
_CHOOSE = """
element.addEventListener('click', (event) => {
  const cell = event.target.closest('[data-cell]');
  if (!cell) return;
  element.querySelectorAll('[data-cell]').forEach((one) => one.setAttribute('aria-pressed', one === cell));
  trigger('select', {cell: Number(cell.dataset.cell)});
});
"""
_SLIDE = """
element.addEventListener('input', (event) => {
  const box = event.target.closest('.lab-slide');
  if (box) box.style.setProperty('--cut', event.target.value + '%');
});
"""


class GridView:
    """Its components. id: of the grid that is shown; index: of the cell that is looked at. halt, resume: buttons of the
    form, which can be pressed while a grid is drawn, and where one lacks cells.
    """

    def __init__(self, house: House, halt: gr.Button, resume: gr.Button) -> None:
        self.house, self.jobs = house, Jobs()
        self.halt, self.resume = halt, resume
        self.id, self.index = gr.State(""), gr.State(-1)
        self.progress = gr.HTML("", elem_id="grid-progress", apply_default_css=False)
        self.view = gr.HTML(NOTHING, elem_id="grid", js_on_load=_CHOOSE, apply_default_css=False)
        self.export = gr.HTML("", elem_id="grid-export", apply_default_css=False)
        self.pair = gr.HTML("", elem_id="grid-pair", js_on_load=_SLIDE, apply_default_css=False)
        with gr.Row(visible=False, elem_classes="ia-buttons") as self.buttons:
            self.use = gr.Button("Use these settings", size="sm", min_width=110, elem_id="grid-use")
            self.again = gr.Button("Draw it again, exactly", size="sm", min_width=110, elem_id="grid-again")
        self.verdict = gr.HTML("", elem_id="grid-verdict", apply_default_css=False)

    def wire(self, shared: Shared) -> None:
        """Looking at a cell, and what is done with it."""
        looked = [self.index, self.pair, self.buttons, self.verdict]
        self.view.select(self.look, self.id, looked, **QUIET)

        def use(id: str, index: int, request: gr.Request) -> list[Any]:
            with told():
                return shared.fill(plain(self.cell(id, index, owner(request))[1].request))

        self.use.click(use, [self.id, self.index], shared.filled, **QUIET)
        self.again.click(self.redraw, [self.id, self.index], self.verdict, **LIVE)

    @property
    def shown(self) -> list[Any]:
        """For outputs of events that show a grid."""
        return [self.id, self.progress, self.view, self.export, self.halt, self.resume]

    def show(self, grid: Grid, *, drawing: bool = False, progress: str = "") -> list[Any]:
        """Updates for `shown`."""
        left = grid_html.missing(grid)
        done = len(grid.cells) - left
        said = link(f"/grids/{grid.id}/export", "Save as a zip", f"grid-{grid.id}.zip") if done and not drawing else ""
        if left and not drawing:
            progress = boxes.note(f"{done} of {len(grid.cells)} cells are drawn; Resume draws the others.", "warn")
        table = grid_html.table(grid, drawing=drawing)
        return [grid.id, progress, table, said, *_buttons(drawing, bool(left) and not drawing)]

    def nothing(self) -> list[Any]:
        """Updates for `shown`: no grid."""
        return ["", "", NOTHING, "", *_buttons(False, False)]

    async def follow(self, ticket: Ticket[Grid] | None, owner: str) -> AsyncGenerator[list[Any], None]:
        """Updates for `shown` while a grid is drawn; it goes on when the page is left. None: the owner's that runs."""
        job = self.jobs.add(ticket) if ticket is not None else self.jobs.running(owner)
        if job is None:
            return
        grid: Grid | None = None
        async for now in job.follow(0.35):
            grid = drawn(now)
            if grid is None:
                yield ["", bar(now.now), gr.skip(), "", *_buttons(now.ended is None, False)]
            elif now.ended is None:
                yield self.show(grid, drawing=True, progress=bar(now.now))
        ended = job.ended
        if isinstance(ended, Failed) and not ended.cancelled:
            warn(ended.message)
        if isinstance(ended, Done):
            grid = ended.result
        yield self.show(grid) if grid is not None else self.nothing()

    def stop(self, request: gr.Request) -> None:
        """Stop the one that runs."""
        self.jobs.cancel(owner(request))

    def cell(self, id: str, index: int, owner: str) -> tuple[Grid, Cell]:
        """Raises ConfigError: there is no such grid. gr.Error: no such cell, or it is not drawn."""
        grid = self.house.grids.get(id, owner)
        found = next((cell for cell in grid.cells if cell.index == index), None)
        if found is None or found.picture is None:
            raise fault("This cell is not drawn yet")
        return grid, found

    def look(self, id: str, event: gr.EventData, request: gr.Request) -> list[Any]:
        """Updates of index, pair, buttons and verdict for the cell that was chosen."""
        said: Any = event._data
        index = said.get("cell") if isinstance(said, dict) else None
        with told():
            grid, cell = self.cell(id, index if isinstance(index, int) else -1, owner(request))
            base = grid_html.base_of(grid, cell)
            drawn = None
            if cell.picture and base and base.picture:
                with Image.open(cell.picture.path) as one, Image.open(base.picture.path) as other:
                    drawn = heat(one.convert("RGB"), other.convert("RGB"))
            shown = grid_html.pair(cell, base, drawn, grid_html.named(grid, cell))
        return [cell.index, shown, gr.Row(visible=True), ""]

    async def redraw(self, id: str, index: int, request: gr.Request) -> AsyncGenerator[str, None]:
        """Draw a cell once more, as it was, and say whether it is the same to the bit."""
        who = owner(request)
        with told():
            _, cell = await asyncio.to_thread(self.cell, id, index, who)
            ticket = self.house.playground.generate(cell.again, owner=who)
        async for event in follow(ticket):
            if isinstance(event, Done) and cell.picture is not None:
                with Image.open(event.result[0].path) as one, Image.open(cell.picture.path) as other:
                    found = difference(one.convert("RGB"), other.convert("RGB"))
                if not found.changed:
                    yield boxes.note("Drawn again: equal to the bit. The new picture is in the History tab.", "good")
                else:
                    yield boxes.note(f"Drawn again: it differs by {found.mean:.3f} of 255 on average.", "warn")
            else:
                yield bar(event)


def _buttons(halt: bool, resume: bool) -> list[gr.Button]:
    return [gr.Button(interactive=halt), gr.Button(interactive=resume)]


def drawn(job: Job) -> Grid | None:
    """A grid with the cells that a job has made so far; None before it is laid out."""
    if not job.items or not isinstance(job.items[0], Grid):
        return None
    made = {cell.index: cell for cell in job.items[1:] if isinstance(cell, Cell)}
    return replace(job.items[0], cells=[made.get(cell.index, cell) for cell in job.items[0].cells])


def plain(request: GenerateRequest) -> GenerateRequest:
    """A cell's request as a user would ask it: by itself, on whatever base is loaded."""
    return request.model_copy(update={"layout": None})
