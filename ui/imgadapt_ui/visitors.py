"""Visitors: what Gradio keeps of each page and program that asks, made small and held to a number.

As it comes, each call of the API is a visitor of its own, for which it describes every component anew: hundreds of
milliseconds that the desk's thread would draw in, and a megabyte that stays.
"""

import os
from collections.abc import Container
from types import SimpleNamespace
from typing import Any

import gradio as gr
from gradio.queueing import Event
from gradio.state_holder import StateHolder

_VISITORS = 2000
"""Pages whose values are kept, some 40 KB each (and of as many Gradio keeps what nobody has fetched); the oldest go."""
_PAUSE = 0.01
"""Seconds between two looks of Gradio at its queue."""
_AT_WORK = 128
"""Events at work, most of which wait at the desk; Gradio would let 40 of them keep all others from being answered."""


def limit(blocks: gr.Blocks) -> None:
    """To be called before the queue is made."""
    blocks.max_threads = _AT_WORK
    os.environ["GRADIO_ANALYTICS_MAX_EVENTS"] = "1"  # statistics of all events, made anew at each with pandas; and
    os.environ["GRADIO_ANALYTICS_CACHE_FREQUENCY"] = str(10**9)  # nobody may ask for them here


def lighten(blocks: gr.Blocks) -> None:
    """To be called when it is mounted.

    Raises:
        AttributeError: another version of Gradio, which must be looked at first.
    """
    holder, queue = blocks.state_holder, blocks._queue
    if holder.blocks is not blocks or queue.event_ids_to_events or queue.pending_event_ids_session:
        raise AttributeError("Gradio keeps its visitors in another way")
    described = SimpleNamespace(default_config=blocks.default_config, blocks=())  # none; the rest as they are needed
    holder.blocks = described  # pyright: ignore[reportAttributeAccessIssue] # it reads these two
    holder.capacity = _VISITORS
    queue.sleep_when_free = _PAUSE
    queue.event_ids_to_events = _Running(holder)
    queue.pending_event_ids_session = _Untold(queue.pending_messages_per_session)


class _Running(dict[str, Event]):
    """Events by their ids, until they end; then the visitor goes that a call of the API was, under the event's id."""

    def __init__(self, holder: StateHolder) -> None:
        super().__init__()
        self._holder = holder

    def pop(self, key: str, default: Any = None) -> Any:
        self._holder.session_data.pop(key, None)
        self._holder.time_last_used.pop(key, None)
        return super().pop(key, default)


class _Untold(dict[str, set[str]]):
    """Events of which the end is not told yet, by visitors; those that are in `known` no more go now and then."""

    def __init__(self, known: Container[str]) -> None:
        super().__init__()
        self._known, self._most = known, 2 * _VISITORS

    def __setitem__(self, key: str, value: set[str]) -> None:
        super().__setitem__(key, value)
        if len(self) > self._most:
            for gone in [one for one in self if one not in self._known]:
                del self[gone]
