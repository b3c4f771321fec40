"""Axes: the part of the Compare tab that says what differs from cell to cell."""

from collections.abc import Mapping, Sequence
from typing import Any

import gradio as gr

from imgadapt.combining.blocks import CONSTANT, PRESETS
from imgadapt.playground.house import House
from imgadapt_ui.parts import QUIET, adapters, samplers
from imgadapt_ui.who import owner

HINTS: Mapping[str, tuple[str, str]] = {
    "adapter": ("adapter", "names, one a line; a+b is a stack of two"),
    "weight": ("weight", "0, 0.5, 1, or a range: 0:1:0.25"),
    "seed": ("seed", "1, 2, 3, or 1..4, or random 4"),
    "prompt": ("prompt", "one a line; old -> new replaces words of it"),
    "blocks": ("blocks of an adapter", "presets or lists of numbers, one a line"),
    "rule": ("merge rule", "one a line; ties density=0.3; live is the stack itself"),
    "checkpoint": ("checkpoint of a training", "all, or names, one a line"),
    "steps": ("steps", "10, 20, 30, or 10:30:10"),
    "guidance": ("guidance", "1, 3, 5, or 1:7:2"),
    "sampler": ("sampler", "names, one a line"),
}
"""Kind -> what it is called, and how its values are written."""
ABOUT = ("weight", "blocks", "checkpoint")
"""Kinds that are about one adapter, or a run."""
BLOCKS = sorted({*CONSTANT, *(name for table in PRESETS.values() for name in table)})


class AxisForm:
    """An axis's components. letter: x, y or z; kind: what it is at first, "" for none."""

    def __init__(self, house: House, letter: str, kind: str, values: str) -> None:
        self.house = house
        kinds = [(called, name) for name, (called, _) in HINTS.items()]
        if letter != "x":
            kinds = [("nothing", ""), *kinds]
        of = self.abouts(kind, "")
        with gr.Group(elem_classes="lab-axis"):
            with gr.Row():
                self.kind = gr.Dropdown(
                    kinds, value=kind, label=f"{letter.upper()} axis", min_width=160, elem_id=f"axis-{letter}-kind"
                )
                self.about = gr.Dropdown(
                    of,
                    value=of[0][1] if of else None,
                    label="Of which",
                    visible=kind in ABOUT,
                    min_width=160,
                    elem_id=f"axis-{letter}-about",
                )
            self.pick = gr.Dropdown(
                [], value=[], multiselect=True, label="Pick", visible=False, elem_id=f"axis-{letter}-pick"
            )
            self.values = gr.Textbox(
                values,
                label="Values",
                info=HINTS[kind][1] if kind else "",
                max_lines=6,
                visible=bool(kind),
                elem_id=f"axis-{letter}-values",
            )

    @property
    def fields(self) -> list[Any]:
        """For an event's inputs; see `asked`."""
        return [self.kind, self.values, self.about]

    @property
    def shown(self) -> list[Any]:
        """For an event's outputs; see `show`."""
        return [self.kind, self.values, self.about, self.pick]

    def wire(self) -> None:
        """Show what goes with a kind; picking writes values."""

        def choose(kind: str, request: gr.Request) -> list[Any]:
            return self.show(kind, "all" if kind == "checkpoint" else "", None, owner(request))[1:]

        self.kind.input(choose, self.kind, self.shown[1:], **QUIET)
        self.pick.input(lambda names: "\n".join(names or []), self.pick, self.values, **QUIET)

    def show(self, kind: str, values: str, about: str | None, owner: str) -> list[Any]:
        """Updates for `shown`: the axis with this in it."""
        kind = kind if kind in HINTS else ""
        names, of = self.names(kind), self.abouts(kind, owner)
        chosen = about if about in {id for _, id in of} else (of[0][1] if of else None)
        return [
            kind,
            gr.Textbox(value=values, visible=bool(kind), info=HINTS[kind][1] if kind else ""),
            gr.Dropdown(
                choices=of,  # pyright: ignore[reportArgumentType] # a list is invariant
                value=chosen,
                visible=kind in ABOUT,
                label="Of which run" if kind == "checkpoint" else "Of which",
            ),
            gr.Dropdown(choices=names, value=[], visible=bool(names)),  # pyright: ignore[reportArgumentType]
        ]

    def names(self, kind: str) -> list[str]:
        """What may be picked as values."""
        if kind == "adapter":
            return [name for name, _ in adapters(self.house)]
        if kind == "rule":
            return ["live", *(name for name, _, _ in self.house.lab.rules())]
        if kind == "sampler":
            return [name for _, name in samplers(self.house)]
        return BLOCKS if kind == "blocks" else []

    def abouts(self, kind: str, owner: str) -> list[tuple[str, str]]:
        """The adapters that the axis may be about; one of a run's stands for all of them."""
        if kind == "checkpoint":
            return [(run.name, run.cards[0].id) for run in self.house.runs.all(owner) if run.cards]
        every = [("the whole stack", "")] if kind == "weight" else []
        return [*every, *adapters(self.house)] if kind in ABOUT else []


def asked(values: Sequence[Any]) -> dict[str, Any] | None:
    """An axis as JSON, of the values of its `fields`; None where nothing differs."""
    kind, said, about = values
    if not kind:
        return None
    axis: dict[str, Any] = {"kind": kind, "values": said or ""}
    return {**axis, "adapter": about} if kind in ABOUT and about else axis
