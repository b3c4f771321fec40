"""The block analyser: it finds the block that acts, and suggests what may be left out."""

from collections.abc import Iterator

import pytest
import torch
from PIL import Image

from imgadapt import attach, collect, demo, detach, live, save
from imgadapt.combining.blocks import LISTS, expanded
from imgadapt.errors import ConfigError
from imgadapt.methods import LoRA
from imgadapt.playground.desk import Done, Event, Failed, Made
from imgadapt.playground.grids.analyser import Analyser, AnalyseRequest, Analysis
from imgadapt.playground.pictures.comparing import difference
from imgadapt.playground.requests import GenerateRequest
from imgadapt.playground.session import Playground
from imgadapt.playground.settings import Settings

ACTIVE = "up_blocks.1.attentions.0"
"""The denoiser's layers that the adapter changes; all others that it has are at 0."""


@pytest.fixture(scope="module")
def playground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Playground]:
    folder, pipe = tmp_path_factory.mktemp("adapters"), demo.pipeline()
    for name, seed in (("one block", 1), ("nothing", 2)):
        torch.manual_seed(seed)
        attach(pipe, LoRA(rank=3, alpha=6.0), targets=["transformer"])
        for layer, _, slot in live.slots(pipe, "default"):
            with torch.no_grad():
                for parameter in slot.parameters():
                    acts = name == "one block" and ACTIVE in layer
                    parameter.copy_(0.3 * torch.randn_like(parameter) if acts else torch.zeros_like(parameter))
        save(collect(pipe), folder / f"{name}.safetensors", format="kohya")
        detach(pipe)
    made = Playground(Settings(tmp_path_factory.mktemp("home"), adapters=(folder,)))
    yield made
    made.close()


def _request(playground: Playground, name: str, **more: object) -> AnalyseRequest:
    id = playground.library.named(name).id
    common = {"prompt": "a fox", "seed": 5, "steps": 2, "adapters": [{"adapter": id, **more}]}
    return AnalyseRequest.of({"common": common, "adapter": id, "seeds": 1})


def _analysed(playground: Playground, request: AnalyseRequest) -> tuple[Analysis, list[Event]]:
    events = list(Analyser(playground).start(request).events())
    assert isinstance(events[-1], Done), events[-1]
    return events[-1].result, events


def test_the_one_block_that_acts_is_found_and_the_others_may_be_left_out(playground: Playground) -> None:
    request = _request(playground, "one block", weight=0.8)
    found, events = _analysed(playground, request)
    strong = [one for one in found.effects if one.only > 0.5]
    assert len(strong) == 1
    block = strong[0].block
    assert (strong[0].only, strong[0].without) == (pytest.approx(1, abs=0.01), pytest.approx(1, abs=0.01))
    assert strong[0].norm == 1
    others = [one for one in found.effects if one.block != block]
    assert len(others) >= 3
    assert all(max(one.only, one.without) < 0.01 and one.norm == 0 for one in others)
    assert found.whole > 0.2
    blocks = expanded(next(text for text in LISTS["sd1"] if block in expanded(text)))
    numbers = dict(zip(blocks, found.suggestion.split(","), strict=True))
    assert numbers[block] == "1"
    assert {numbers[one.block] for one in others} == {"0"}
    assert block in found.said
    assert [event.item for event in events if isinstance(event, Made)] == list(found.effects)

    whole = request.common.adapters[0]
    kept = whole.model_copy(update={"blocks": found.suggestion})
    made = [
        playground.generate(request.common.model_copy(update={"adapters": (use,)})).result()[0] for use in (whole, kept)
    ]
    assert difference(*(Image.open(picture.path) for picture in made)).largest <= 1


def test_an_adapter_without_effect_is_said_to_have_none(playground: Playground) -> None:
    found, _ = _analysed(playground, _request(playground, "nothing"))
    assert (found.whole, found.suggestion) == (0.0, "")
    assert "changes nothing" in found.said


def test_an_adapter_outside_the_stack_is_refused(playground: Playground) -> None:
    request = _request(playground, "one block")
    other = playground.library.named("nothing").id
    with pytest.raises(ConfigError, match="not in the stack"):
        Analyser(playground).start(request.model_copy(update={"adapter": other}))


def test_it_stops_within_a_step(playground: Playground) -> None:
    request = _request(playground, "one block")
    common = GenerateRequest.of({**request.common.model_dump(), "steps": 50})
    ticket = Analyser(playground).start(request.model_copy(update={"common": common}))
    calls = playground.studio.counts["calls"]
    for event in ticket.events():
        if getattr(event, "what", "") == "analysing" and event.done > 0:  # pyright: ignore[reportAttributeAccessIssue] # Progress
            ticket.cancel()
        if isinstance(event, Failed):
            assert event.cancelled
    assert playground.studio.counts["calls"] == calls + 1
