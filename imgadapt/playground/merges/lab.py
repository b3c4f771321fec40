"""Lab: merging what a stack of adapters does into one file, after looking at it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from imgadapt import save
from imgadapt.combining import printing
from imgadapt.combining.combine import DTYPES, combine_inputs
from imgadapt.combining.files import cast, metadata_of, opened
from imgadapt.combining.recipe import DTYPES as DTYPE_NAMES
from imgadapt.combining.recipe import MergeRecipe
from imgadapt.combining.recipes import recipe_in
from imgadapt.combining.rules import RULES
from imgadapt.errors import ConfigError, FormatError, OutputError
from imgadapt.playground import filenames
from imgadapt.playground.desk import Ticket
from imgadapt.playground.library.library import Card
from imgadapt.playground.merges import stacking
from imgadapt.playground.merges.spectra import residuals
from imgadapt.playground.requests import Line, Number, Request, Use, Whole
from imgadapt.playground.session import Playground

_SUMS = ("weighted", "concat", "svd")
"""Rules that are what a stack does, where nothing is cut."""
_EXACT = 1e-5
"""Relative error that counts as none."""


class MergeRequest(Request):
    """adapters: as in a stack (start and stop must not be set). rule, options, space, rank, error, energy, size: see
    MergeRecipe. name: of the file, without folders or ending; "": made of the inputs' names. format: of the file.
    """

    adapters: Annotated[tuple[Use, ...], Field(min_length=1, max_length=16)]
    rule: Line = "weighted"
    options: Mapping[str, Any] = {}
    space: Literal["delta", "core"] = "delta"
    rank: Annotated[Whole, Field(ge=1, le=1024)] | None = None
    error: Annotated[Number, Field(gt=0, le=1)] | None = None
    energy: Annotated[Number, Field(gt=0, le=1)] | None = None
    size: Annotated[Number, Field(gt=0, le=4096)] | None = None
    seed: Annotated[Whole, Field(ge=0, lt=2**53)] = 0
    format: Line | None = None
    dtype: Literal["fp32", "fp16", "bf16"] | None = None
    name: Line = ""

    @model_validator(mode="after")
    def _mergeable(self) -> Self:
        names = [use.adapter for use in self.adapters]
        if len(set(names)) < len(names):
            raise ValueError("an adapter is in the stack twice; give it once, with both weights added")
        for use in self.adapters:
            if use.start or use.stop is not None:
                raise ValueError("start and stop are of steps, and a merged file acts in all of them; leave them out")
        for name, value in self.options.items():
            plain = isinstance(value, bool | float | str) or (isinstance(value, int) and abs(value) < 2**63)
            if len(name) > 40 or not plain or len(str(value)) > 40 or not f"{name}{value}".isprintable():
                raise ValueError("options map names to a number, a short text, true or false")
        return self


@dataclass(frozen=True)
class LabReport:
    """names: of the inputs. cosines: (inputs, inputs), of their changes over all layers. residuals: (rank, relative
    error of the merge cut to that rank). exact: whether a live stack at these weights draws what the merge will.
    lines: the report, for people.
    """

    names: Sequence[str]
    cosines: Sequence[Sequence[float]]
    residuals: Sequence[tuple[int, float]]
    exact: bool
    lines: Sequence[str]


class Lab:
    def __init__(self, playground: Playground) -> None:
        self.playground = playground

    def rules(self) -> Sequence[tuple[str, str, Mapping[str, Any]]]:
        """Name, one line, options with their defaults, of every rule."""
        return [
            (rule.name, rule.about, {name: option.default for name, option in rule.options.items()}) for rule in RULES
        ]

    def report(self, request: MergeRequest, *, owner: str = "") -> Ticket[LabReport]:
        """Merge, write nothing, and say what it did.

        Raises:
            ConfigError: it is no recipe (a rule, an option, two of rank, error, ...), or an adapter cannot be used.
            Busy: the queue is full.
        """
        self._recipe(request)
        return self.playground.desk.submit(partial(self._report, request=request), owner=owner)

    def save(self, request: MergeRequest, *, owner: str = "") -> Ticket[Card]:
        """Merge into a file of the home's adapters, with its recipe in it; never over another file.

        Raises:
            ConfigError, Busy: see `report`.
        """
        self._recipe(request)
        return self.playground.desk.submit(partial(self._save, request=request), owner=owner)

    def replay(self, id: str) -> MergeRequest:
        """The request that a merged file's recipe is, its inputs found in the library by their SHA-256.

        Raises:
            ConfigError: it has none, or inputs are not here (which); or it says what no request can.
        """
        card = self.playground.library.get(id)
        try:
            recipe, _ = recipe_in(self.playground.library.outline(id).metadata, card.name)
        except FormatError as error:
            raise ConfigError(f"{card.name} was not made by merging: {error}") from error
        found = stacking.found(recipe.inputs, self.playground.library)
        if recipe.whole:
            raise ConfigError(f"{card.name} has whole differences; imgadapt merge makes it again")
        if recipe.base is not None and recipe.base != (here := stacking.base_name(self._base())):
            raise ConfigError(
                f"{card.name} was merged on the base {recipe.base}, and {here} is loaded; load that first"
            )
        values: dict[str, Any] = {
            name: getattr(recipe, name)
            for name in ("rule", "space", "rank", "error", "energy", "size", "seed", "format", "dtype")
        }
        usual = recipe.row.options
        options = {name: value for name, value in recipe.options.items() if value != usual[name].default}
        return MergeRequest.of({**values, "options": options, "adapters": found, "name": card.path.stem})

    def _base(self) -> str:
        """The place of the base that is loaded, or will be."""
        return (self.playground.studio.base or self.playground.bases.first).place

    def _recipe(self, request: MergeRequest) -> MergeRecipe:
        """What a request asks for. Its base is added later, where an input turns out to need it."""
        settings = {
            name: getattr(request, name)
            for name in ("rule", "options", "space", "rank", "error", "energy", "size", "seed", "format", "dtype")
        }
        cards = [self.playground.library.get(use.adapter) for use in request.adapters]
        for card in cards:
            if card.fault:
                raise ConfigError(f"{card.name} cannot be used: {card.fault}")
        entries = [stacking.entry(use, card.path) for use, card in zip(request.adapters, cards, strict=True)]
        return MergeRecipe(tuple(entries), **settings)

    def _opened(self, ticket: Ticket[Any], request: MergeRequest) -> Any:
        """(settled recipe, inputs, base), which end the work when its ticket is cancelled, whatever they are in."""
        ticket.progress("reading", 0, 1)
        recipe = self._recipe(request)
        settled, inputs, base = opened(recipe)
        if stacking.needs_base(inputs, recipe.row):
            ticket.check()
            settled, inputs, base = opened(replace(recipe, base=stacking.base_place(self._base())))
        return settled, [replace(one, weight=_watched(one.weight, ticket.check)) for one in inputs], base

    def _report(self, ticket: Ticket[LabReport], request: MergeRequest) -> LabReport:
        recipe, inputs, base = self._opened(ticket, request)
        _, report = combine_inputs(recipe, inputs, base=base, progress=ticket.progress)
        curve = residuals(recipe, inputs, base, ticket.progress)
        names = [self.playground.library.get(use.adapter).name for use in request.adapters]
        report.inputs = names
        exact = recipe.rule in _SUMS and report.residual < _EXACT
        lines = [*printing.lines(report), *stacking.strengths(request.adapters, names)]
        if exact and recipe.dtype != DTYPE_NAMES[0]:
            lines.append(
                f"NOTE written as {recipe.dtype}, which rounds: pictures may differ from the stack's in a level"
            )
        if not exact:
            lines.append(f"NOTE a stack at these weights draws something else: {_why(recipe)}")
        return LabReport(names, report.total.cosines.tolist(), curve, exact, lines)

    def _save(self, ticket: Ticket[Card], request: MergeRequest) -> Card:
        recipe, inputs, base = self._opened(ticket, request)
        told = metadata_of(recipe, inputs)
        made, _ = combine_inputs(recipe, inputs, base=base, metadata=told, progress=ticket.progress)
        made = cast(made, DTYPES[recipe.dtype or DTYPE_NAMES[0]])
        ticket.progress("writing", 0, 1)
        folder = self.playground.settings.folder("adapters") / "merged"
        write = partial(save, made, format=recipe.format)
        path = filenames.placed(folder, self._name(request), ".safetensors", write)
        library = self.playground.library
        library.scan()
        found = next((card for card in library.cards() if card.path.resolve() == path), None)
        if found is None:
            raise OutputError(f"{path.name} was written, and is gone again; who removed it?")
        return found

    def _name(self, request: MergeRequest) -> str:
        inputs = [filenames.cleaned(self.playground.library.get(use.adapter).name, "") for use in request.adapters]
        joined = "+".join(filter(None, inputs)) if len(inputs) < 4 else f"{inputs[0]} and {len(inputs) - 1} more"
        usual = filenames.cleaned(f"{joined} merged" if len(inputs) == 1 else joined, "merged", 60)
        return filenames.cleaned(request.name, usual)


def _watched(weight: Callable[[str], float], check: Callable[[], None]) -> Callable[[str], float]:
    """A weight that is asked for in every layer, also by rules that look at all of them before they merge the first."""

    def factor(layer: str) -> float:
        check()
        return weight(layer)

    return factor


def _why(recipe: MergeRecipe) -> str:
    if recipe.rule not in _SUMS:
        return f"{recipe.rule} is no sum"
    return "what is left out by the rank that is kept"
