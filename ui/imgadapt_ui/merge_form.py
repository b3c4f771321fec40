"""Merge form: a stack of its own, a rule with its options, and what file shall come of it."""

from collections.abc import Mapping, Sequence
from typing import Any

import gradio as gr

from imgadapt.combining.rules import RULES
from imgadapt.combining.rules.rule import Option
from imgadapt.errors import ConfigError
from imgadapt.playground.forms import number
from imgadapt.playground.house import House
from imgadapt.playground.merges.lab import MergeRequest
from imgadapt.playground.requests import Use
from imgadapt_ui.parts import QUIET, adapters
from imgadapt_ui.telling import open_number

ROWS = 8
"""Adapters that the form has room for."""
SIZES = {"": "the rule's own", "rank": "a rank", "error": "an error", "energy": "an energy", "size": "megabytes"}
_OPTIONS: Mapping[str, Option] = {name: option for rule in RULES for name, option in rule.options.items()}
"""Every option that a rule has, once."""
_RULES = {rule.name: rule for rule in RULES}


class MergeForm:
    """Its components; `inputs` are all of them, `asked` the request, `filled` the updates for a request."""

    def __init__(self, house: House) -> None:
        self.house = house
        self.rows: list[list[Any]] = []
        self.boxes: list[gr.Row] = []
        choices: list[tuple[str, str]] = [("nothing", ""), *adapters(house)]
        for row in range(ROWS):
            with gr.Row(visible=row < 2, elem_classes="lab-row") as box:
                self.rows.append(
                    [
                        gr.Dropdown(
                            choices,
                            value="",
                            label=f"Adapter {row + 1}",
                            min_width=150,
                            scale=3,
                            elem_id=f"merge-adapter-{row}",
                        ),
                        gr.Number(1.0, label="Weight", step=0.05, min_width=80, elem_id=f"merge-weight-{row}"),
                        open_number("Text enc.", "same", width=80),
                        gr.Textbox("", label="Blocks", placeholder="all", max_length=1000, min_width=80),
                    ]
                )
            self.boxes.append(box)
        rules = [(f"{name}: {about}", name) for name, about, _ in house.lab.rules()]
        self.rule = gr.Dropdown(rules, value="weighted", label="Rule", elem_id="merge-rule")
        with gr.Row(elem_classes="lab-options"):
            self.options = [_component(name, option) for name, option in _OPTIONS.items()]
        with gr.Row():
            sizes = [(said, name) for name, said in SIZES.items()]
            self.kind = gr.Dropdown(
                sizes, value="", label="Size of the result", min_width=180, scale=3, elem_id="merge-kind"
            )
            self.much = open_number("How much", "", "merge-much", visible=False)
            self.space = gr.Dropdown(["delta", "core"], value="delta", label="Space", min_width=100, scale=2)
            self.seed = gr.Number(0, label="Seed of chance", precision=0, min_width=100, scale=2)
        with gr.Row():
            formats: list[tuple[str, str]] = [("as the inputs", "")]
            formats += [(f"{name} ({tools})" if tools else name, name) for name, tools in house.converter.formats()]
            self.format = gr.Dropdown(formats, value="", label="Format", min_width=180)
            dtypes = [("as the inputs", ""), *((name, name) for name in ("fp32", "fp16", "bf16"))]
            self.dtype = gr.Dropdown(dtypes, value="", label="Precision", min_width=180)
        self.name = gr.Textbox(
            "", label="Name", placeholder="made of the inputs'", max_length=200, elem_id="merge-name"
        )

    @property
    def inputs(self) -> list[Any]:
        """All components, for an event's inputs; see `asked`."""
        rest = [
            self.rule,
            *self.options,
            self.kind,
            self.much,
            self.space,
            self.seed,
            self.format,
            self.dtype,
            self.name,
        ]
        return [*(component for row in self.rows for component in row), *rest]

    @property
    def shown(self) -> list[Any]:
        """For an event's outputs; see `filled` and `with_stack`."""
        return [*self.inputs, *self.boxes]

    def wire(self) -> None:
        """Rows appear as they are needed, options with their rules."""
        names = [row[0] for row in self.rows]
        gr.on([name.change for name in names], self.needed, names, self.boxes, **QUIET)
        self.rule.change(self.of_rule, self.rule, self.options, **QUIET)
        self.kind.change(self.of_kind, self.kind, self.much, **QUIET)

    @staticmethod
    def needed(*names: str) -> list[Any]:
        """As many rows as are filled, and one more; two at least."""
        last = max((row for row, name in enumerate(names) if name), default=-1)
        return [gr.Row(visible=row < max(2, last + 2)) for row in range(ROWS)]

    @staticmethod
    def of_rule(rule: str, values: Mapping[str, Any] | None = None) -> list[Any]:
        """The options of a rule, with these values or its defaults; the others hidden."""
        own = _RULES[rule].options if rule in _RULES else {}
        made: list[Any] = []
        for name, option in _OPTIONS.items():
            if name not in own:
                made.append(gr.update(visible=False))
                continue
            value = (values or {}).get(name, own[name].default)
            about = own[name].about
            made.append(
                gr.Dropdown(visible=True, value=value, info=about, choices=list(own[name].choices))
                if option.choices
                else gr.Number(visible=True, value=value, info=about)
            )
        return made

    @staticmethod
    def of_kind(kind: str) -> Any:
        hints = {"rank": "of each layer", "error": "relative, 0 to 1", "energy": "the share kept, 0 to 1", "size": "MB"}
        return gr.Textbox(visible=bool(kind), info=hints.get(kind))

    def asked(self, values: Sequence[Any]) -> MergeRequest:
        """The request that the form stands for, of the values of `inputs`.

        Raises:
            ConfigError: what is wrong with it, in one line.
        """
        uses: list[dict[str, Any]] = []
        for row in range(ROWS):
            adapter, weight, text, blocks = values[4 * row : 4 * row + 4]
            if adapter:
                use = {"adapter": adapter, "weight": weight, "text": number(text), "blocks": blocks}
                uses.append({name: value for name, value in use.items() if value not in (None, "")})
        rule, *rest = values[4 * ROWS :]
        if not uses:
            many = "two adapters" if rule in _RULES and _RULES[rule].most == 2 else "two adapters or more"
            raise ConfigError(f"choose {many}, or take those of the Generate tab")
        options = dict(zip(_OPTIONS, rest, strict=False))
        kind, much, space, seed, format, dtype, name = rest[len(_OPTIONS) :]
        own = _RULES[rule].options if rule in _RULES else {}
        asked = {
            "adapters": uses,
            "rule": rule,
            "options": {key: value for key, value in options.items() if key in own and value is not None},
            "space": space,
            "seed": seed,
            "format": format or None,
            "dtype": dtype or None,
            "name": name,
        }
        known = {key: value for key, value in asked.items() if value is not None}
        return MergeRequest.of({**known, **({kind: number(much)} if kind else {})})

    def filled(self, request: MergeRequest) -> list[Any]:
        """Updates for `shown`: the form asks for this."""
        kind = next((name for name in ("rank", "error", "energy", "size") if getattr(request, name) is not None), "")
        much = gr.Textbox(value=str(getattr(request, kind)) if kind else "", visible=bool(kind))
        rest = [request.rule, *self.of_rule(request.rule, request.options), kind, much, request.space, request.seed]
        stack, boxes = self._stack(request.adapters)
        return [*stack, *rest, request.format or "", request.dtype or "", request.name, *boxes]

    def with_stack(self, stack: Sequence[Use]) -> list[Any]:
        """Updates for `shown`: another stack, all else as it is."""
        rows, boxes = self._stack(stack)
        return [*rows, *(gr.skip() for _ in range(len(self.inputs) - 4 * ROWS)), *boxes]

    def _stack(self, stack: Sequence[Use]) -> tuple[list[Any], list[Any]]:
        """The rows' values and their boxes' updates."""
        uses = list(stack[:ROWS])
        free = ROWS - len(uses)
        values = [value for use in uses for value in _row(use)]
        return values + ["", 1.0, "", ""] * free, self.needed(*(use.adapter for use in uses), *[""] * free)

    def refreshed(self) -> list[Any]:
        """Updates of the rows' adapters when the library has changed."""
        choices: list[Any] = [("nothing", ""), *adapters(self.house)]
        return [gr.Dropdown(choices=choices) for _ in self.rows]


def _row(use: Use) -> tuple[str, float, str, str]:
    return use.adapter, use.weight, "" if use.text is None else str(use.text), use.blocks


def _component(name: str, option: Option) -> Any:
    known: dict[str, Any] = {
        "label": name.replace("_", " ").capitalize(),
        "value": option.default,
        "visible": False,
        "min_width": 140,
        "elem_id": f"merge-option-{name}",
    }
    return gr.Dropdown(list(option.choices), **known) if option.choices else gr.Number(step=0.05, **known)
