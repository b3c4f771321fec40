"""Parts: what the page's tabs share: the Generate tab's form, the tabs themselves, and how things are said."""

import base64
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

import gradio as gr

from imgadapt.playground import forms
from imgadapt.playground.desk import Event, Failed, Progress, Waiting, public
from imgadapt.playground.house import House
from imgadapt.playground.requests import GenerateRequest, Use
from imgadapt.playground.samplers import SAMPLERS, for_base

TABS = ("library", "generate", "compare", "merge", "train", "convert", "history")
"""Ids of the tabs, in their order."""
QUIET: Mapping[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
"""Of all events of the page: no overlay over what they change, and no endpoint of the API."""


@dataclass(frozen=True)
class Shared:
    """What a tab may use of the others.

    tabs: `gr.Tabs(selected=...)` of it switches. base: the header's Dropdown (its value is a base's id). form: the
    Generate tab's components by the names of `forms.FIELDS`. latest: hidden, the id of the newest (or chosen) picture
    of this page, or "". The others are States that count up, for their `change`: form_changed when code (no user)
    filled the form; library_changed when adapters came or went; base_changed when a base was loaded or could not be;
    page_loaded once when a page is there. further: components of tabs built so far that later ones fill, by names.
    """

    house: House
    tabs: gr.Tabs
    base: gr.Dropdown
    form: Mapping[str, Any]
    form_changed: gr.State
    library_changed: gr.State
    base_changed: gr.State
    page_loaded: gr.State
    latest: gr.Textbox
    further: dict[str, Any] = field(default_factory=dict[str, Any])

    @property
    def fields(self) -> list[Any]:
        """The form's components, for an event's inputs, before the base; see `asked`."""
        return [*(self.form[name] for name in forms.FIELDS), self.base]

    def asked(self, values: Sequence[Any]) -> GenerateRequest:
        """The request that the form stands for, of the values of `fields`.

        Raises:
            ConfigError: what is wrong with it, in one line.
        """
        return forms.request(dict(zip(forms.FIELDS, values[:-1], strict=True)), values[-1] or None)

    @property
    def filled(self) -> list[Any]:
        """For an event's outputs, to fill the form and go to the Generate tab; see `fill` and `fill_stack`."""
        return [*(self.form[name] for name in forms.FIELDS), self.base, self.form_changed, self.tabs]

    def fill(self, request: GenerateRequest, tab: str | None = "generate") -> list[Any]:
        """Updates for `filled`: the whole form. tab: where to go then; None: stay."""
        there = any(base.id == request.base for base in self.house.playground.bases.all)
        return self._updates(forms.fields(request), tab, request.base if there else None)

    def fill_stack(self, stack: Iterable[Use], tab: str | None = "generate") -> list[Any]:
        """Updates for `filled`: the stack only."""
        return self._updates(forms.rows(list(stack)), tab)

    def unchanged(self) -> list[Any]:
        """Updates for `filled` that change nothing."""
        return [gr.skip() for _ in self.filled]

    def _updates(self, values: Mapping[str, Any], tab: str | None, base: str | None = None) -> list[Any]:
        known = [self._update(name, values[name]) if name in values else gr.skip() for name in forms.FIELDS]
        return [*known, base or gr.skip(), counted(), gr.Tabs(selected=tab) if tab else gr.skip()]

    def _update(self, name: str, value: Any) -> Any:
        """A weight's slider goes as far as its value does, and a sampler is offered that is asked for."""
        if name.startswith("weight_"):
            return gr.Slider(minimum=min(-2.0, value), maximum=max(2.0, value), value=value)
        if name == "sampler":
            return gr.Dropdown(choices=samplers(self.house, value), value=value)  # pyright: ignore[reportArgumentType]
        return value


_count = iter(range(1, 2**62))


def counted() -> int:
    """A value that `form_changed` or `library_changed` did not have yet."""
    return next(_count)


def adapters(house: House) -> list[tuple[str, str]]:
    """Choices of a dropdown: the names and ids of all adapters that can be used."""
    return [(card.name, card.id) for card in house.playground.library.cards() if not card.fault]


def bases(house: House) -> list[tuple[str, str]]:
    """Choices of a dropdown: the names and ids of all bases."""
    rows = house.playground.bases.all
    return [(f"{base.name} ({base.kind})" if base.kind != base.name else "embedded demo", base.id) for base in rows]


def samplers(house: House, also: str = "") -> list[tuple[str, str]]:
    """Choices of a dropdown: what the loaded base can be drawn with, all where none is loaded yet. also: one more."""
    family = house.playground.studio.family
    names = list(SAMPLERS) if family is None else for_base(family)
    names += [also] if also in SAMPLERS and also not in names else []
    return [("The base's own" if name == "base" else name, name) for name in names]


def text(value: Any) -> str:
    """Anything as HTML that shows it as text."""
    return escape(str(value), quote=True)


def duration(seconds: float) -> str:
    """4 s, 3:05, 1:02:03."""
    whole = max(round(seconds), 0)
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02}:{rest:02}"
    return f"{minutes}:{rest:02}" if minutes else f"{rest} s"


def thumb(id: str, alt: str, side: int = 256) -> str:
    """An <img> of a picture of the album."""
    return f'<img src="/pictures/{text(id)}?side={side}" alt="{text(alt)}" loading="lazy" decoding="async">'


def preview(webp: bytes) -> str:
    """An <img> of a picture that is still being drawn."""
    data = base64.b64encode(webp).decode()
    return (
        f'<figure class="ia-big ia-preview"><img src="data:image/webp;base64,{data}" alt="The picture so far"></figure>'
    )


def error_box(message: object) -> str:
    """What went wrong, where it did."""
    return f'<div class="ia-error" role="alert">{text(public(str(message)))}</div>'


def empty(title: str, todo: str) -> str:
    """What stands where nothing is yet, and what to do about it."""
    return f'<div class="ia-empty"><strong>{text(title)}</strong><span>{text(todo)}</span></div>'


def bar(event: Event | None) -> str:
    """A progress bar, for gr.HTML, of an event of a ticket; "" for the ends that need none."""
    if isinstance(event, Waiting):
        return _bar(f"In the queue: place {event.place} of {event.of}", None)
    if isinstance(event, Progress):
        left = f" · {duration(event.eta)} left" if event.eta is not None else ""
        return _bar(f"{event.what} {event.done}/{event.total}{left}", event.done / max(event.total, 1))
    if isinstance(event, Failed):
        return "" if event.cancelled else error_box(event.message)
    return ""


def _bar(label: str, share: float | None) -> str:
    now = "" if share is None else f' aria-valuenow="{share * 100:.0f}" aria-valuemin="0" aria-valuemax="100"'
    width = "" if share is None else f' style="width:{share * 100:.1f}%"'
    kind = " ia-waits" if share is None else ""
    return (
        f'<div class="ia-progress{kind}"><span aria-live="polite">{text(label)}</span>'
        f'<div role="progressbar" aria-label="Progress"{now}><i{width}></i></div></div>'
    )


_TRIGGER = """
element.addEventListener('click', (event) => {
  const chosen = event.target.closest('[data-id]');
  if (chosen && element.contains(chosen)) trigger('select', {id: chosen.dataset.id});
});
"""


def tiles(value: str, elem_id: str) -> gr.HTML:
    """HTML whose elements with `data-id` (buttons: they take the keyboard) can be chosen: `.select`, and `chosen`."""
    return gr.HTML(value, elem_id=elem_id, js_on_load=_TRIGGER, apply_default_css=False)


def chosen(event: gr.EventData) -> str:
    """The `data-id` of what was chosen among `tiles`; it comes from the client."""
    return str(event._data.get("id", "") if isinstance(event._data, dict) else "")


def link(href: str, label: str, name: str | None = None) -> str:
    """A link of the site that looks like a button; name: of the file to save."""
    save = f' download="{text(name)}"' if name else ' target="_blank" rel="noopener"'
    return f'<a class="ia-link" href="{text(href)}"{save}>{text(label)}</a>'
