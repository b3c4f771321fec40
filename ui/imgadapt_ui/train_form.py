"""Train form: pictures, what they shall teach, and settings; what is left empty is planned."""

from collections.abc import Sequence
from typing import Any

import gradio as gr

from imgadapt.methods import METHODS
from imgadapt.playground.forms import number
from imgadapt.playground.house import House
from imgadapt.playground.trainings.runs import TrainRequest
from imgadapt_ui.parts import QUIET
from imgadapt_ui.telling import open_number

FIELDS = (
    "data",
    "kind",
    "name",
    "trigger",
    "class_prompt",
    "word",
    "method",
    "rank",
    "steps",
    "batch_size",
    "learning_rate",
    "resolution",
    "sample_every",
    "seed",
)
"""Of TrainRequest, in the order of `TrainForm.inputs`; the base is the page's."""

_OPEN = ("rank", "steps", "batch_size", "learning_rate", "resolution", "sample_every")
"""Numbers that are planned where they are left open."""


class TrainForm:
    """Its components, a field each."""

    def __init__(self, house: House) -> None:
        self.house = house
        self.data = gr.Dropdown(sets(house), value=None, label="Pictures", elem_id="train-data")
        with gr.Accordion("Upload pictures and captions", open=False):
            self.files = gr.File(
                file_count="multiple",
                file_types=["image", ".txt", ".zip"],
                label="Pictures, and captions of the same names (fox.png, fox.txt)",
                height=140,
                elem_id="train-files",
            )
            with gr.Row():
                self.called = gr.Textbox("", label="Name", max_length=200, min_width=140, elem_id="train-called")
                self.upload = gr.Button("Keep them as a data set", size="sm", min_width=140, elem_id="train-upload")
            self.said = gr.HTML("", elem_id="train-kept", apply_default_css=False)
        with gr.Row():
            kinds = [("let it decide", ""), ("style", "style"), ("character or thing", "character")]
            kinds.append(("word of its own (textual inversion)", "concept"))
            self.kind = gr.Dropdown(kinds, value="", label="What it learns", min_width=150, elem_id="train-kind")
            self.name = gr.Textbox(
                "", label="Name", placeholder="made of the pictures'", min_width=150, elem_id="train-name"
            )
        with gr.Row():
            self.trigger = gr.Textbox("", label="Trigger word", placeholder="ohwx", min_width=120)
            self.class_prompt = gr.Textbox("", label="Class", placeholder="a man", min_width=120)
            self.word = gr.Textbox("", label="Word", placeholder="of textual inversion", min_width=120, visible=False)
        with gr.Row():
            methods = [method.name for method in METHODS]
            self.method = gr.Dropdown(methods, value="lora", label="Method", min_width=110)
            self.rank = open_number("Rank", "planned", "train-rank")
            self.steps = open_number("Steps", "planned", "train-steps")
        with gr.Accordion("More", open=False):
            with gr.Row():
                self.batch_size = open_number("Batch size", "planned")
                self.learning_rate = open_number("Learning rate", "planned")
                self.resolution = open_number("Resolution", "planned")
            with gr.Row():
                self.sample_every = open_number("Sample every", "planned", "train-sample-every")
                self.seed = gr.Number(0, label="Seed", precision=0, min_width=100)

    @property
    def inputs(self) -> list[Any]:
        return [getattr(self, name) for name in FIELDS]

    def wire(self) -> None:
        """Fields appear with what is learnt."""

        def learnt(kind: str) -> list[Any]:
            concept = kind == "concept"
            return [
                gr.Textbox(visible=concept),
                gr.Textbox(visible=not concept),
                gr.Textbox(visible=kind in ("", "character")),
            ]

        self.kind.change(learnt, self.kind, [self.word, self.trigger, self.class_prompt], **QUIET)


def sets(house: House, owner: str = "") -> list[tuple[str, str]]:
    """Data sets that someone may use, as choices: (name and size, id)."""
    return [(f"{one.name} ({one.pictures} pictures)", one.id) for one in house.runs.datasets(owner)]


def asked(values: Sequence[Any], base: str | None) -> TrainRequest:
    """The request of the values of `TrainForm.inputs`.

    Raises:
        ConfigError: what is wrong with it, in one line.
    """
    read = {name: number(value) if name in _OPEN else value for name, value in zip(FIELDS, values, strict=True)}
    said = {name: value for name, value in read.items() if value is not None and value != ""}
    return TrainRequest.of({**said, **({"base": base} if base else {})})
