"""What a file's peft config says of its layers, one by one, in time that the sizes of both bound."""

import json
import re
from collections.abc import Mapping
from typing import Any, cast

from imgadapt.errors import ConfigError, FormatError, shortened
from imgadapt.patterns import Budget, Pattern

DIFFUSERS_KEY = "lora_adapter_metadata"
PEFT_KEY = "peft_config"
PATTERNS = {
    "rank_pattern": "r",
    "alpha_pattern": "alpha",
    "block_size_pattern": "block_size",
    "n_frequency_pattern": "n_frequency",
    "lambda_pattern": "delora_lambda",
}
"""Fields that say for some layers what another says for all."""
LONGEST_JSON = 2**22
"""Characters of a config; one with patterns for 5,000 layers has a tenth."""
_MOST_FIELDS = 1000  # of one component's; peft has some 60
_MOST_PATTERNS = 100  # that are no layer's name
_LOOK = 2.5e-7  # seconds, for a look at one name
_NAME = re.compile(r"(?:[\w.\-]|\\\W)+")


def config_key(metadata: Mapping[str, str]) -> str:
    """Which of the configs a file is read by."""
    return DIFFUSERS_KEY if DIFFUSERS_KEY in metadata else PEFT_KEY


class LayerConfig:
    """The config in a file's metadata, to be asked for layers; without one it says nothing.

    What is wrong with it is said at every question, as of that layer.
    """

    def __init__(self, metadata: Mapping[str, str]) -> None:
        self.key, self._budget = config_key(metadata), Budget()
        self._wrong: FormatError | None = None
        self._fields: dict[str, dict[str, Any]] = {}  # of components; of a file of one, under ""
        self._patterns: dict[tuple[str, str], _Patterns] = {}
        try:
            self._fields = self._parsed(metadata[self.key]) if self.key in metadata else {}
        except FormatError as error:
            self._wrong = error

    @property
    def components(self) -> set[str]:
        """Those that it says anything of."""
        return set(self._fields)

    def of(self, name: str) -> dict[str, Any]:
        """Its fields, with `r`, `alpha` and others as patterns have them, and `feedforward`: whether it is one of those
        modules.

        name: canonical, or a fused layer's own. CLIP's `text_model.` may be there or not.

        Raises:
            FormatError: it is no config, or says what cannot be.
        """
        if self._wrong is not None:
            raise self._wrong
        component, _, path = name.partition(".")
        fields = self._fields.get(component if self.key == DIFFUSERS_KEY else "", {})
        if not fields:
            return {}
        try:
            whole = {**fields, "r": fields.get("r"), "alpha": fields.get("lora_alpha", fields.get("alpha"))}
            patterned = [(field, name) for field, name in PATTERNS.items() if field in fields]
            own = {name: self._at(path, component, fields, field, whole.get(name)) for field, name in patterned}
            return {**whole, **own, "feedforward": self._feeds(path, component, fields)}
        except (ConfigError, FormatError) as error:
            self._wrong = FormatError(f"the metadata '{self.key}': {error}")
            raise self._wrong from error

    def _parsed(self, text: str) -> dict[str, dict[str, Any]]:
        if len(text) > LONGEST_JSON:
            raise FormatError(f"the metadata '{self.key}' is larger than any config of peft's")
        try:
            config: Any = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise FormatError(f"the metadata '{self.key}' is not JSON: {error}") from error
        if not isinstance(config, dict):
            raise FormatError(f"the metadata '{self.key}' is {type(config).__name__}, wanted an object")
        found: dict[str, dict[str, Any]] = {}
        for field, value in cast("dict[str, Any]", config).items():
            component, _, own = field.partition(".") if self.key == DIFFUSERS_KEY else ("", "", field)
            found.setdefault(component, {})[own] = value
        if any(len(fields) > _MOST_FIELDS for fields in found.values()):
            raise FormatError(f"the metadata '{self.key}' has more fields than any config of peft's")
        return found

    def _at(self, path: str, component: str, fields: Mapping[str, Any], field: str, default: Any) -> Any:
        """The value of the first row of an `alpha_pattern` or `rank_pattern` that matches, as in peft's
        `get_pattern_key`.
        """
        rows: Any = fields.get(field) or {}
        if not isinstance(rows, dict):
            raise FormatError(f"'{field}' is {type(rows).__name__}, wanted an object")
        if (component, field) not in self._patterns:
            made = _Patterns(field, list(cast("dict[str, Any]", rows)), self._budget, ends=True)
            self._patterns[component, field] = made
        key = self._patterns[component, field].first(path)
        return default if key is None else cast("dict[str, Any]", rows)[key]

    def _feeds(self, path: str, component: str, fields: Mapping[str, Any]) -> bool:
        """Whether `feedforward_modules`, a list of ends or a regular expression of whole names, has this one."""
        field = "feedforward_modules"
        modules: Any = fields.get(field) or []
        if isinstance(modules, list):
            ends = cast("list[Any]", modules)
            self._budget.take(_LOOK * len(ends))
            if not all(isinstance(end, str) for end in ends):
                raise FormatError(f"'{field}' is a list of other things than texts")
            return path.endswith(tuple(ends))
        if not isinstance(modules, str):
            raise FormatError(f"'{field}' is {type(modules).__name__}, wanted a list or a text")
        if (component, field) not in self._patterns:
            self._patterns[component, field] = _Patterns(field, [modules], self._budget, ends=False)
        return self._patterns[component, field].first(path) is not None


class _Patterns:
    """Regular expressions of names, most of which are a name each and are looked up. ends: whether one may be of the
    last parts of a name, from a dot on; else of whole names.
    """

    def __init__(self, field: str, rows: list[str], budget: Budget, *, ends: bool) -> None:
        self._rows, self._budget = rows, budget
        self._whole: dict[str, int] = {}
        self._last: dict[str, int] = {}
        self._others: list[tuple[int, Pattern]] = []
        for place, text in enumerate(rows):
            names, anchored = _names(text), text.startswith("^") or not ends
            for name in names:
                (self._whole if anchored else self._last).setdefault(name, place)
            if not names:
                if len(self._others) == _MOST_PATTERNS:
                    raise FormatError(f"'{field}' has more than {_MOST_PATTERNS} regular expressions")
                try:
                    start = r"^(.*\.)?" if ends else "^"
                    self._others.append((place, Pattern(f"{start}({text})$", budget)))
                except ConfigError as error:
                    raise FormatError(
                        f"'{field}' has {shortened(text)!r}, no regular expression that is read: {error}"
                    ) from error

    def first(self, path: str) -> str | None:
        """The first that matches a layer's path, with CLIP's `text_model.` or without."""
        if not self._rows:
            return None
        found = len(self._rows)
        for one in {path, path.removeprefix("text_model.")}:
            found = min(found, self._whole.get(one, found))
            if self._last:
                self._budget.take(_LOOK * (1 + one.count(".")) * (1 + len(one) // 100))
                start = 0
                while True:
                    found = min(found, self._last.get(one[start:], found))
                    if (start := one.find(".", start) + 1) == 0:
                        break
            found = min([found, *(place for place, pattern in self._others if place < found and pattern.search(one))])
        return self._rows[found] if found < len(self._rows) else None


def _names(text: str) -> list[str]:
    """The names that a regular expression is, or is one of; none where it is more than that."""
    body = text.removeprefix("^").removesuffix("$")
    inside = body[1:-1] if body[:1] == "(" and body[-1:] == ")" else None
    several = inside if inside is not None else body if not text.startswith("^") else body.replace("|", "(")
    names = several.split("|")
    return [re.sub(r"\\(\W)", r"\1", name) for name in names] if all(map(_NAME.fullmatch, names)) else []
