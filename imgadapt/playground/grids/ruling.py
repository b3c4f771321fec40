"""Ruling: the stacks of a grid's rule axis, each merged into an adapter that its cells then draw with.

They are files of the home's `adapters/rules/`, so that their pictures can be drawn again, and the best one be kept.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from imgadapt import save
from imgadapt.combining.combine import DTYPES, combine_inputs
from imgadapt.combining.files import cast, metadata_of, opened
from imgadapt.combining.recipe import MergeRecipe
from imgadapt.errors import ConfigError
from imgadapt.playground.desk import Ticket
from imgadapt.playground.filenames import cleaned
from imgadapt.playground.grids.axis import Rule, changed
from imgadapt.playground.merges import stacking
from imgadapt.playground.pictures.provenance import fingerprint
from imgadapt.playground.requests import GenerateRequest, Use
from imgadapt.playground.session import Playground


def checked(request: GenerateRequest, rule: Rule) -> None:
    """Raises ConfigError where a rule cannot merge the stack."""
    if not request.adapters:
        raise ConfigError(f"{rule.name} has nothing to merge")
    for use in request.adapters:
        if use.start or use.stop is not None:
            raise ConfigError(f"{rule.name}: start and stop are of steps, and a merged adapter acts in all of them")
    MergeRecipe(tuple(stacking.entry(use, use.adapter) for use in request.adapters), rule.name, rule.options)  # pyright: ignore[reportArgumentType] # its path is not looked at


def merged(
    ticket: Ticket[Any], playground: Playground, requests: Mapping[int, tuple[GenerateRequest, Rule]]
) -> dict[int, GenerateRequest]:
    """Key -> the request with its stack merged, at weight 1. Each stack is merged once by each rule on each base, ever.

    Raises:
        ConfigError, FormatError, StateError: see `combine_inputs`.
    """
    jobs = {_name(playground, request.adapters, rule): (request.adapters, rule) for request, rule in requests.values()}
    for k, (name, (uses, rule)) in enumerate(jobs.items()):
        ticket.progress(f"merging by {rule.name}", k, len(jobs))
        path = playground.settings.folder("adapters") / "rules" / f"{name}.safetensors"
        if not path.is_file():
            recipe = MergeRecipe(
                tuple(stacking.entry(use, playground.library.get(use.adapter).path) for use in uses),
                rule.name,
                rule.options,
            )
            settled, inputs, base = opened(recipe)
            if stacking.needs_base(inputs, recipe.row):
                loaded = playground.studio.base or playground.bases.first
                settled, inputs, base = opened(replace(recipe, base=stacking.base_place(loaded.place)))
            file, _ = combine_inputs(
                settled,
                inputs,
                base=base,
                metadata=metadata_of(settled, inputs),
                progress=lambda *_: ticket.check(),
            )
            save(cast(file, DTYPES[settled.dtype or "fp32"]), path, format=settled.format)
    playground.library.scan()
    ids = {card.path.stem: card.id for card in playground.library.cards(folder="rules")}
    made: dict[int, GenerateRequest] = {}
    for key, (request, rule) in requests.items():
        name = _name(playground, request.adapters, rule)
        if name not in ids:
            raise ConfigError(f"{name} was merged, and is gone from the library again")
        made[key] = changed(request, adapters=({"adapter": ids[name]},))
    return made


def _name(playground: Playground, uses: tuple[Use, ...], rule: Rule) -> str:
    """Of a file: what it was made of, so that other contents have another name."""
    library = playground.library
    rows = [[library.mark(use.adapter), use.weight, use.text, use.blocks] for use in uses]
    base = playground.studio.base or playground.bases.first  # which DoRA, OFT, ... are merged on
    about = json.dumps([rule.name, sorted(rule.options.items()), rows, fingerprint(base.place)])
    names = [cleaned(library.get(use.adapter).name, "adapter", 30) for use in uses]
    joined = "+".join(names) if len(names) < 4 else f"{names[0]} and {len(names) - 1} more"
    return f"{joined} {rule.name} {hashlib.sha256(about.encode()).hexdigest()[:8]}"
