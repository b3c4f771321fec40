"""Memory: a page's settings in the browser, over reloads; and links that bring settings along."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import gradio as gr

from imgadapt.errors import ConfigError
from imgadapt.playground import forms
from imgadapt.playground.requests import GenerateRequest, Use
from imgadapt_ui.generate import Generate
from imgadapt_ui.parts import QUIET, TABS, Shared, counted
from imgadapt_ui.telling import warn

VERSION = 1
"""Of what is kept; another version's is not read."""
_LINKED = ("prompt", "negative", "seed", "steps", "guidance", "sampler", "width", "height")
"""Fields that a link may set, beside `adapter` (a name, or name:weight; more than once) and `tab`."""


def wire(page: gr.Blocks, shared: Shared, places: Mapping[str, gr.Tab], generate: Generate) -> None:
    """Keep the form and the tab whenever they change; bring them back when the page is loaded."""
    kept = gr.BrowserState({}, storage_key="imgadapt-form", secret="imgadapt")
    tab = gr.BrowserState("generate", storage_key="imgadapt-tab", secret="imgadapt")
    fields = [shared.form[name] for name in forms.FIELDS]
    names = json.dumps(forms.FIELDS)
    keep = f"(...values) => window.iaKept({VERSION}, {names}, values)"
    gr.on([field.change for field in fields], None, fields, kept, js=keep, **QUIET)
    for id, place in places.items():
        place.select(None, tab, tab, js=f"(before) => window.iaTab({id!r}, before)", **QUIET)

    def load(kept: Any, tab: Any, request: gr.Request) -> list[Any]:
        query = dict(request.query_params)
        several = _several(request, "adapter")
        found = remembered(kept) if isinstance(kept, Mapping) else None
        wanted, missing = linked(shared, query, several, found)
        if missing:
            warn("; ".join(missing), title="Not all of the link can be had", duration=30)
        where = query.get("tab", tab)
        where = "generate" if query.keys() & {"adapter", *_LINKED} and "tab" not in query else where
        loaded = shared.house.playground.studio.base
        updates = shared.fill(wanted, where if where in TABS else None) if wanted else shared.unchanged()
        if loaded is not None:
            updates[shared.filled.index(shared.base)] = loaded.id
        if not wanted and where in TABS:
            updates[-1] = gr.Tabs(selected=where)
        return [*updates, counted(), counted()]

    outputs = [*shared.filled, shared.library_changed, shared.page_loaded]
    loaded = page.load(load, [kept, tab], outputs, **QUIET)
    loaded.then(None, js="() => window.iaReady()", **QUIET)
    again, drawing, shown = generate.rejoin
    page.load(again, drawing, shown, js="() => window.iaDrawn()", **QUIET, concurrency_limit=None)


def remembered(kept: Mapping[str, Any]) -> GenerateRequest | None:
    """The form that a browser kept, which anyone may have changed; None: nothing usable."""
    values = kept.get("values")
    if kept.get("version") != VERSION or not isinstance(values, Mapping):
        return None
    try:
        return forms.request({name: values.get(name) for name in forms.FIELDS})
    except ConfigError:
        return None


def linked(
    shared: Shared, query: Mapping[str, str], adapters: Sequence[str], found: GenerateRequest | None
) -> tuple[GenerateRequest | None, list[str]]:
    """A form with what a link asks for in it, and what of that cannot be."""
    said = {name: query[name] for name in _LINKED if name in query}
    if not said and not adapters:
        return found, []
    missing = list[str]()
    values: dict[str, Any] = dict(found.model_dump(mode="json") if found else {})
    for name, value in said.items():
        try:
            values |= GenerateRequest.of({name: _number(name, value)}).model_dump(include={name}, mode="json")
        except ConfigError as error:
            missing.append(str(error))
    stack = list[Use]()
    for one in adapters[: forms.ROWS]:
        name, _, weight = one.rpartition(":") if ":" in one else (one, "", "")
        try:
            card = shared.house.playground.library.named(name)
            stack.append(Use.of({"adapter": card.id, "weight": _number("weight", weight) if weight else card.weight}))
        except ConfigError as error:
            missing.append(str(error))
    if stack:
        values["adapters"] = [use.model_dump(mode="json") for use in stack]
    try:
        return GenerateRequest.of(values), missing
    except ConfigError as error:
        return found, [*missing, str(error)]


def _number(name: str, value: str) -> Any:
    """A link's text as JSON would have it."""
    if name in ("prompt", "negative", "sampler"):
        return value
    try:
        return json.loads(value[:40])
    except ValueError:
        return value


def _several(request: gr.Request, name: str) -> list[str]:
    """All values of a name in the page's query."""
    params: Any = request.query_params
    return list(params.getlist(name)) if hasattr(params, "getlist") else [params[name]] if name in params else []
