"""File formats of the tools, as tables that both read and write."""

from imgadapt.formats.format import Format
from imgadapt.formats.part import Part, Parts, Source
from imgadapt.formats.reading import LOOSELY, Reading, architecture_of, read
from imgadapt.formats.tools import DIFFUSERS, KOHYA, TOOLS
from imgadapt.formats.writing import Step, Writer, exact_alpha, write

FORMATS: tuple[Format, ...] = TOOLS

__all__ = [
    "DIFFUSERS", "FORMATS", "KOHYA", "LOOSELY", "Format", "Part", "Parts", "Reading", "Source", "Step", "Writer",
    "architecture_of", "exact_alpha", "read", "write",
]  # fmt: skip
