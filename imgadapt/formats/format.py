"""Format: how one tool writes an adapter file."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from imgadapt.formats.part import Parts
from imgadapt.formats.spelling import Spell, plain_key


def nothing_beside(parts: Parts) -> Mapping[str, Mapping[str, str]]:
    return {}


def no_sizes(parts: Parts) -> Mapping[str, tuple[int, ...]]:
    return {}


@dataclass(frozen=True, eq=False)  # a row is itself; hashed by identity
class Format:
    """A row of the table of tools.

    about: who writes and reads it.
    prefixes: component -> what its keys begin with; prefixes_of: the same for architectures where that differs.
    separator: what stands for the dots of a layer's path.
    native: whether layers have the names of the model's own code, where an architecture has such; except_for:
        architectures of which the tool trains diffusers' model all the same.
    spell: the ends and shapes of a method's tensors.
    ends: all that it writes, or has written; also_prefixes: what else its keys have begun with.
    metadata: (layers, metadata they came with) -> what the tool writes there itself, verbatim as it came where that is
        still true; own_metadata: the names of those entries.
    key: (a layer as it is spelled, an end) -> the tensor's name.
    single: whether a file is of one component and one method.
    beside: layers -> which of their ends stand for several layers once, and under which key. sizes: layers -> sizes of
        these, by key, where they are not what the layers need alone.
    claims: (entry, what it contains): metadata by which a file is this tool's, where its keys could be another's.
    """

    name: str
    about: str
    prefixes: Mapping[str, str]
    spell: Spell
    ends: Collection[str]
    metadata: Callable[[Parts, Mapping[str, str]], dict[str, str]]
    separator: str = "."
    native: bool = False
    except_for: tuple[str, ...] = ()
    prefixes_of: Mapping[str, Mapping[str, str]] = field(default_factory=dict[str, Mapping[str, str]])
    also_prefixes: tuple[str, ...] = ()
    own_metadata: tuple[str, ...] = ()
    claims: tuple[tuple[str, str], ...] = ()
    key: Callable[[str, str], str] = plain_key
    single: bool = False
    beside: Callable[[Parts], Mapping[str, Mapping[str, str]]] = nothing_beside
    sizes: Callable[[Parts], Mapping[str, tuple[int, ...]]] = no_sizes

    def prefix(self, component: str, architecture: str | None) -> str | None:
        """What keys of a component begin with; None if the tool has no word for it."""
        return self.prefixes_of.get(architecture or "", self.prefixes).get(component)

    def spell_name(self, name: str, architecture: str | None) -> str | None:
        """A layer's full name as this tool writes it; None if it has no word for the component."""
        component, _, path = name.partition(".")
        prefix = self.prefix(component, architecture)
        return None if prefix is None else prefix + path.replace(".", self.separator)

    @property
    def every_prefix(self) -> set[str]:
        texts = {text for row in (self.prefixes, *self.prefixes_of.values()) for text in row.values()}
        return {*texts, *self.also_prefixes}

    def claimed_by(self, metadata: Mapping[str, str]) -> bool:
        return any(text in metadata.get(key, "") for key, text in self.claims if key in metadata)
