"""Checking: what a training would do, what it takes, and what is odd about its pictures; no weights are read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from imgadapt.playground.album import Album, Picture
from imgadapt.playground.desk import Ticket, public
from imgadapt.training import pictures, preflight, sheets
from imgadapt.training.plan import Kind
from imgadapt.training.preflight import Preflight


@dataclass(frozen=True)
class Check:
    """findings: (level, text); plan: settings with their reasons, as lines; sheet: what the trainer will see."""

    findings: Sequence[tuple[str, str]]
    plan: Sequence[str]
    sheet: Picture | None


def check(ticket: Ticket[Check], given: Mapping[str, Any], kind: Kind | None, album: Album, device: str) -> Check:
    """given, kind: as `plan.of` takes them.

    Raises:
        ConfigError, DataError: see `preflight.look`.
    """
    stages = list[str]()

    def say(text: str) -> None:
        stages.append(text)
        ticket.progress(text, len(stages) - 1, 4)

    found = preflight.look(given, kind, torch.device(device), step=False, say=say)
    say("drawing what is cut off")
    config = found.config
    sheet = sheets.contact_sheet(
        found.views, config.crop, use_mask=config.mask, variants=config.crops, seed=config.seed
    )
    told = [(finding.level, public(finding.text)) for finding in found.findings]
    faults = [("error", public(fault)) for fault in found.faults if ("error", public(fault)) not in told]
    picture = album.accept(pictures.png(sheet), owner=ticket.owner)
    return Check([*faults, *told], [*_head(found), *public(str(found.plan)).splitlines(), *_memory(found)], picture)


def _head(found: Preflight) -> list[str]:
    config, held = found.config, len(found.held_out)
    counted = f"{len(found.examples)} pictures" + (f", and {held} held out" if held else "")
    rank = f" of rank {config.rank}" if config.rank else ""
    return [f"{found.plan.kind}: {config.method}{rank}, {config.steps} steps of {config.batch_size}, {counted}"]


def _memory(found: Preflight) -> list[str]:
    """What it needs of memory, and what may be changed where that is too much."""
    need, room = found.need.peak / 1e9, found.room / 1e9
    fits = "it fits" if found.fits else "it does not fit"
    lines = [f"memory: {need:.1f} GB at most, and {room:.1f} GB are free: {fits}"]
    return [*lines, *(f"  {change.flags}: {change.peak / 1e9:.1f} GB; {change.text}" for change in found.changes)]
