"""File formats of the tools, as tables that both read and write."""

from imgadapt.formats.diffusers import DIFFUSERS
from imgadapt.formats.kohya import KOHYA
from imgadapt.formats.own import OWN
from imgadapt.formats.part import Part, Parts
from imgadapt.formats.table import Format, Reading, read, write

FORMATS: tuple[Format, ...] = (KOHYA, DIFFUSERS, OWN)

__all__ = ["DIFFUSERS", "FORMATS", "Format", "Part", "Parts", "Reading", "read", "write"]
