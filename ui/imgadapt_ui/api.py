"""API: what the playground does, as endpoints with stable names, a table in and a table out (docs/playground.md).

Those that take time are generators: they say where they are, and the last table is the result; whoever goes away, stops
them.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

import gradio as gr
from pydantic import ValidationError

from imgadapt.errors import ImgadaptError
from imgadapt.playground.converting import ConvertRequest
from imgadapt.playground.desk import Done, Event, Failed, Made, Progress, Ticket, Waiting, public
from imgadapt.playground.grids.analyser import AnalyseRequest
from imgadapt.playground.grids.grids import GridRequest
from imgadapt.playground.house import House
from imgadapt.playground.merges.lab import MergeRequest
from imgadapt.playground.requests import GenerateRequest, Id, Line, Request
from imgadapt.playground.trainings.runs import TrainRequest
from imgadapt_ui.following import ask, follow
from imgadapt_ui.plain import plain
from imgadapt_ui.who import owner

Table = dict[str, Any]


class One(Request):
    """Something that has an id."""

    id: Id


class Search(Request):
    """See Library.cards."""

    search: Line = ""
    architecture: Line = ""
    folder: Line = ""


class Nothing(Request):
    """No settings."""


def endpoints(house: House) -> None:
    """Add them to the Blocks that are being built."""
    playground, runs, lab, grids = house.playground, house.runs, house.lab, house.grids

    def restored(request: One, who: str) -> Any:
        picture = playground.album.get(request.id, playground.whose(who))
        return playground.restore(picture.path.read_bytes(), owner=who)

    def listed(request: Search, who: str) -> Any:
        playground.library.scan()
        return {"adapters": playground.library.cards(request.search, request.architecture, request.folder)}

    def rules(request: Nothing, who: str) -> Any:
        return {"rules": [{"name": name, "says": says, "options": options} for name, says, options in lab.rules()]}

    _slow("generate", GenerateRequest, lambda r, who: playground.generate(r, owner=who), "Pictures of a prompt.")
    _slow(
        "grid", GridRequest, lambda r, who: grids.start(r, owner=who), "Pictures over axes; each cell as it is ready."
    )
    _slow("resume_grid", One, lambda r, who: grids.resume(r.id, owner=who), "Draw what a grid lacks.")
    _slow("merge", MergeRequest, lambda r, who: lab.save(r, owner=who), "Merge adapters into a file.")
    _slow("merge_report", MergeRequest, lambda r, who: lab.report(r, owner=who), "What a merge would be.")
    _slow("convert", ConvertRequest, lambda r, who: house.converter.convert(r, owner=who), "In another tool's format.")
    _slow(
        "analyse", AnalyseRequest, lambda r, who: house.analyser.start(r, owner=who), "Which blocks change a picture."
    )
    _slow("switch_base", One, lambda r, who: playground.switch(r.id, owner=who), "Load another base.")
    _slow("check_training", TrainRequest, lambda r, who: runs.check(r, owner=who), "What a training would do.")

    _quick("list_adapters", Search, listed, "The library.")
    _quick("inspect", One, lambda r, who: house.inspector.look(r.id), "All about an adapter.")
    _quick("bases", Nothing, lambda r, who: {"bases": playground.bases.all}, "Models that may be loaded.")
    _quick("restore", One, restored, "The request that made a picture which is here.")
    _quick("grid_plan", GridRequest, lambda r, who: grids.plan(r, who), "What a grid would take.")
    _quick("grid_cells", One, lambda r, who: grids.get(r.id, who), "A grid, as far as it is drawn.")
    _quick("merge_rules", Nothing, rules, "The rules of merging and their options.")
    _quick("convert_plan", ConvertRequest, lambda r, who: house.converter.plan(r), "What a conversion would lose.")
    _quick("formats", Nothing, lambda r, who: {"formats": house.converter.formats()}, "Formats and who reads them.")
    _quick("datasets", Nothing, lambda r, who: {"datasets": runs.datasets(who)}, "Folders of pictures to train on.")
    _quick("train", TrainRequest, lambda r, who: runs.start(r, owner=who), "Start a training.")
    _quick("training", One, lambda r, who: runs.get(r.id, who), "How a training is doing.")
    _quick("trainings", Nothing, lambda r, who: {"trainings": runs.all(who)}, "All trainings, the newest first.")
    _quick("stop_training", One, lambda r, who: runs.stop(r.id, who), "End one after its step, its state saved.")
    _quick("resume_training", One, lambda r, who: runs.resume(r.id, who), "Go on with one.")


def _slow(name: str, kind: type[Any], start: Callable[[Any, str], Ticket[Any]], says: str) -> None:
    async def endpoint(settings: Table, request: gr.Request) -> AsyncGenerator[Table, None]:
        with _Told():
            asked, who = kind.of(settings), owner(request)
            async for event in follow(await ask(lambda: start(asked, who))):
                yield _said(event)

    _add(name, endpoint, says)


def _quick(name: str, kind: type[Any], find: Callable[[Any, str], Any], says: str) -> None:
    async def endpoint(settings: Table, request: gr.Request) -> Table:
        with _Told():
            asked, who = kind.of(settings), owner(request)
            found = await asyncio.to_thread(lambda: plain(find(asked, who)))
            return found if isinstance(found, dict) else {"done": True}

    _add(name, endpoint, says)


def _add(name: str, endpoint: Callable[..., Awaitable[Table] | AsyncGenerator[Table, None]], says: str) -> None:
    endpoint.__annotations__["return"] = Table  # what it yields, too: Gradio makes its output of this
    gr.api(endpoint, api_name=name, api_description=says)


class _Told:
    """Errors of ours as Gradio's, in a line; all others stay errors, of which it says nothing."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, ImgadaptError | ValidationError):
            raise gr.Error(public(str(error)), print_exception=False) from None


def _said(event: Event) -> Table:
    """An event as a table; `state` says which it is.

    Raises:
        gr.Error: it is Failed.
    """
    match event:
        case Waiting(place, of):
            return {"state": "waiting", "place": place, "of": of}
        case Progress(what, done, total, eta, _):
            return {"state": "working", "what": what, "done": done, "total": total, "eta": plain(eta)}
        case Made(item):
            return {"state": "made", "kind": type(item).__name__.lower(), "item": plain(item)}
        case Done(result):
            return {"state": "done", "result": plain(result)}
        case Failed(message, _):
            raise gr.Error(message, print_exception=False)
