"""Checking: what a training would do, what it takes, and what is odd about its pictures; no weights are read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from imgadapt.playground.desk import Ticket, public
from imgadapt.playground.pictures.album import Album, Picture
from imgadapt.training import fit, ladder, pictures, plan, preflight, sheets
from imgadapt.training.job import pictures as pictures_of
from imgadapt.training.plan import Kind


@dataclass(frozen=True)
class Check:
    """findings: (level, text). summary: what would be done and what it takes, in lines; plan: (setting, value, reason).
    sheet: what the trainer will see.
    """

    findings: Sequence[tuple[str, str]]
    summary: Sequence[str]
    plan: Sequence[tuple[str, str, str]]
    sheet: Picture | None


def check(ticket: Ticket[Check], given: Mapping[str, Any], kind: Kind | None, album: Album, device: str) -> Check:
    """given, kind: as `plan.of` takes them. What a step has in memory is not simulated, which takes longer than all the
    rest; a training that runs out of memory computes its batches in pieces.

    Raises:
        ConfigError, DataError: the plan cannot be made, pictures cannot be read.
    """
    ticket.progress("looking at the pictures", 0, 3)
    made = plan.of(given, kind)
    config = preflight.settled(made)
    examples, held_out = pictures_of(config)
    ticket.progress("reading the base's config", 1, 3)
    predictor = fit.Predictor(examples, device=torch.device(device).type)
    findings, views, _ = preflight.seen(config, predictor.family(config), examples, held_out)
    ticket.progress("drawing what is cut off", 2, 3)
    sheet = sheets.contact_sheet(views, config.crop, use_mask=config.mask, variants=config.crops, seed=config.seed)
    counted = f"{len(examples)} pictures" + (f", and {len(held_out)} held out" if held_out else "")
    rank = f" of rank {config.rank}" if config.rank else ""
    head = f"{made.kind}: {config.method}{rank}, {config.steps} steps of {config.batch_size}, {counted}"
    least, room = predictor.floor(config) / 1e9, ladder.available(torch.device(device)) / 1e9
    takes = f"{least:.2g} GB for the base, the adapter and the optimiser, and what steps need"
    memory = f"memory: {takes}; {room:.1f} GB are free"
    told = [(finding.level, public(finding.text)) for finding in findings]
    if least > room:
        told = [("error", f"{memory}: it does not fit"), *told]
    picture = album.accept(pictures.png(sheet), owner=ticket.owner)
    rows = [(name, public(value), public(why)) for name, value, why in made.rows]
    return Check(told, [head, memory], rows, picture)
