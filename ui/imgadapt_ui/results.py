"""Results: a picture with what made it, the strip of those just drawn, and what is next with one of them."""

from collections.abc import Mapping, Sequence
from typing import Any

import gradio as gr

from imgadapt.errors import ConfigError, ImgadaptError
from imgadapt.playground.desk import Done, Progress
from imgadapt.playground.house import House
from imgadapt.playground.pictures import record
from imgadapt.playground.pictures.album import Picture
from imgadapt.playground.requests import GenerateRequest
from imgadapt_ui.jobs import Job
from imgadapt_ui.parts import QUIET, Shared, bar, chosen, empty, error_box, link, preview, text, thumb, tiles
from imgadapt_ui.start_picture import StartPicture
from imgadapt_ui.telling import inform, warn
from imgadapt_ui.who import owner

NOTHING = empty("Nothing drawn yet", "Write a prompt and press Generate (Ctrl + Enter). Esc stops.")
_DEMO = empty(
    "Nothing drawn yet",
    "Write a prompt and press Generate (Ctrl + Enter). The embedded base draws emoji: "
    "a fox, a red apple, a house on a purple background.",
)
SHOWN = 8
"""Of the last pictures, in the strip."""


class Results:
    """The right-hand side of the Generate tab. progress: bar and preview; big: one picture; strip: all of the job."""

    def __init__(self, house: House) -> None:
        self.house = house
        self.progress = gr.HTML("", elem_id="progress", apply_default_css=False)
        self.big = gr.HTML(nothing(house), elem_id="big", apply_default_css=False)
        self.strip = tiles("", "strip")
        with gr.Row(visible=False, elem_classes="ia-buttons") as self.buttons:
            self.again = gr.Button("Use these settings", size="sm", min_width=100, elem_id="use-settings")
            self.further = gr.Button("Start from this picture", size="sm", min_width=100, elem_id="start-from")
            self.compare = gr.Button("Compare", size="sm", min_width=80, elem_id="send-compare")

    def wire(self, shared: Shared, start: StartPicture) -> None:
        """Choosing a picture, and what is done with it."""

        def choose(event: gr.EventData, request: gr.Request) -> tuple[str, str]:
            return big(self.house, chosen(event), owner(request)), chosen(event)

        def again(latest: str, request: gr.Request) -> list[Any]:
            return refill(shared, latest, owner(request), "generate")

        def compare(latest: str, request: gr.Request) -> list[Any]:
            return refill(shared, latest, owner(request), "compare")

        def further(latest: str, request: gr.Request) -> list[Any]:
            if picture_of(self.house, latest, owner(request)) is None:
                inform("No picture has been drawn yet")
            return start.begin(latest, owner(request))

        shared.latest.change(lambda id: gr.Row(visible=bool(id)), shared.latest, self.buttons, **QUIET)
        self.strip.select(choose, None, [self.big, shared.latest], **QUIET)
        self.again.click(again, shared.latest, shared.filled, **QUIET)
        self.compare.click(compare, shared.latest, shared.filled, **QUIET)
        self.further.click(further, shared.latest, start.shown, **QUIET)


class Restore:
    """A picture from anywhere, which says how it was made: all settings as they were."""

    def __init__(self, house: House) -> None:
        self.house = house
        with gr.Accordion("Settings from a picture", open=False, elem_id="restore-box", elem_classes="ia-after"):
            self.file = gr.File(
                label="A PNG that was drawn by imgadapt, A1111, Forge, ...",
                type="binary",
                file_types=["image"],
                elem_id="restore",
                height=150,
            )
            self.said = gr.HTML("", elem_id="restored", apply_default_css=False)

    def wire(self, shared: Shared) -> None:
        def restore(data: bytes | None, request: gr.Request) -> list[Any]:
            if data is None:
                return [gr.skip(), gr.skip(), *shared.unchanged()]
            try:
                found = self.house.playground.restore(data, owner=owner(request))
            except ImgadaptError as error:
                return [None, error_box(error), *shared.unchanged()]
            return [None, _restored(found), *shared.fill(found.request, None)]

        self.file.upload(restore, self.file, [self.file, self.said, *shared.filled], **QUIET)


def _restored(found: record.Restored) -> str:
    lines = "".join(f"<li>{text(line)}</li>" for line in found.lacks)
    lines += "".join(f"<li>{text(line)}</li>" for line in found.differs)
    exact = (
        "All settings restored; drawn again, it is the same to the bit."
        if found.exact
        else "Settings restored; drawn again, it may differ, for:"
    )
    return f'<div class="ia-note" role="status">{text(exact)}{f"<ul>{lines}</ul>" if lines else ""}</div>'


def now(job: Job) -> str:
    """Where a job is: its bar, or why it failed."""
    if job.ended is not None:
        return "" if isinstance(job.ended, Done) else bar(job.ended)
    return bar(job.now)


def nothing(house: House) -> str:
    """What stands where no picture is yet."""
    playground = house.playground
    return _DEMO if (playground.studio.base or playground.bases.first).kind == "demo" else NOTHING


def shown(house: House, job: Job, fresh: bool, before: str) -> str | None:
    """What stands in the picture's place while a job runs: the one that is being drawn, the newest, or, where the job
    ended without one, that of `before`. None: what is there stays. fresh: whether the newest came just now.
    """
    if job.items and fresh:
        return big(house, job.items[-1].id)
    if job.ended is not None:
        return big(house, before, job.owner) if before else nothing(house)
    return preview(job.now.preview) if isinstance(job.now, Progress) and job.now.preview else None


def recent(house: House, owner: str, count: int = SHOWN) -> list[Picture]:
    """The owner's last pictures, the newest first."""
    return house.playground.album.recent(count, owner)


def strip(pictures: Sequence[Picture]) -> str:
    """Small pictures to choose from; nothing where there is one only."""
    if len(pictures) < 2:
        return ""
    rows = (
        f'<button type="button" data-id="{text(one.id)}">{thumb(one.id, f"Picture {at + 1}")}</button>'
        for at, one in enumerate(pictures)
    )
    return f'<div class="ia-strip">{"".join(rows)}</div>'


def big(house: House, id: str, owner: str | None = None) -> str:
    """A picture with what made it. owner: who must have asked for it, in a shared playground; None: it is known."""
    picture = picture_of(house, id, owner)
    if picture is None:
        return empty("This picture is gone", "It was deleted, or belongs to someone else.")
    about = facts(picture.record) if picture.record else ""
    name = f"imgadapt-{picture.id}.png"
    return (
        f'<figure class="ia-big"><a href="/pictures/{text(id)}" target="_blank" rel="noopener" '
        f'title="Open in full size"><img src="/pictures/{text(id)}" width="{picture.width}" height="{picture.height}" '
        f'alt="{text(alt(picture))}"></a><figcaption>{about}'
        f"{link(f'/pictures/{id}', 'Download PNG', name)}</figcaption></figure>"
    )


def facts(made: Mapping[str, Any]) -> str:
    """A record as a few lines."""
    request, adapters = made["request"], made.get("adapters", {})
    sides = f"{request.get('width')} x {request.get('height')}"
    few = [f"seed {request.get('seed')}", sides, f"{request.get('steps')} steps"]
    if request.get("guidance") is not None:
        few.append(f"guidance {request['guidance']:g}")
    if request.get("sampler", "base") != "base":
        few.append(str(request["sampler"]))
    if request.get("init"):
        where = "a part" if request.get("mask") else "all"
        few.append(f"from a picture, {where} redrawn by {request.get('denoise', 1):.0%}")
    if made.get("base", {}).get("name"):
        few.append(str(made["base"]["name"]))
    if isinstance(made.get("seconds"), int | float):
        few.append(f"drawn in {_took(made['seconds'])}")
    stack = [
        f"{adapters.get(use['adapter'], {}).get('name', use['adapter'])} {use.get('weight', 1):g}"
        for use in request.get("adapters", ())
    ]
    rows = [f'<div class="ia-facts">{"".join(f"<span>{text(one)}</span>" for one in [*few, *stack])}</div>']
    if request.get("prompt"):
        rows.append(f'<p class="ia-prompt">{text(request["prompt"])}</p>')
    rows += [f'<p class="ia-note">{text(note)}</p>' for note in made.get("notes", ())]
    return "".join(rows)


def _took(seconds: float) -> str:
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def alt(picture: Picture) -> str:
    """What a picture is said to show: its prompt."""
    prompt = str(picture.record["request"].get("prompt", "")) if picture.record else ""
    return prompt[:200] or "A picture without a prompt"


def picture_of(house: House, id: str, owner: str | None) -> Picture | None:
    """A picture that this owner may see."""
    try:
        return house.playground.album.get(id, house.playground.whose(owner) if owner is not None else None)
    except ConfigError:
        return None


def record_of(house: House, id: str, owner: str) -> Mapping[str, Any] | None:
    """What made a picture."""
    picture = picture_of(house, id, owner) if id else None
    return picture.record if picture is not None else None


def refill(shared: Shared, id: str, owner: str, tab: str) -> list[Any]:
    """Updates of `shared.filled`: the settings of a picture."""
    made = record_of(shared.house, id, owner)
    if made is None:
        inform("No picture has been drawn yet")
        return shared.unchanged()
    try:
        return shared.fill(GenerateRequest.of(made["request"]), tab)
    except ConfigError as error:
        warn(f"The settings of this picture cannot be used: {error}")
        return shared.unchanged()
