"""What the page says in a few words: methods, times, the header's status, cards, and drawings that are lost."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest
from imgadapt_ui import cards_html, page, results, stack, telling
from imgadapt_ui.jobs import Jobs

from imgadapt.playground.desk import Ticket
from imgadapt.playground.library.library import Card
from imgadapt.playground.trainings.runs import Running


def card(name: str, *kinds: tuple[str, int | None]) -> Card:
    rows = [SimpleNamespace(method=method, rank=rank) for method, rank in kinds]
    return Card("0" * 16, name, "", SimpleNamespace(), 1, 0.0, kinds=rows)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("kinds", "said"),
    [
        ([("lora", 2)], "LoRA, rank 2"),
        ([("lokr", None), ("lokr", 8)], "LoKr, rank 8"),
        ([("lora", 16), ("lora", 4), ("lora", 8)], "LoRA, rank 4 to 16"),
        ([("full", None)], "Full"),
        ([("lora", 4), ("loha", 8), ("norm", None), ("ia3", None)], "LoRA, rank 4 + LoHa, rank 8 + 2 more"),
        ([("unheard", 3)], "unheard, rank 3"),
    ],
)
def test_methods_are_said_as_people_write_them(kinds: list[tuple[str, int | None]], said: str) -> None:
    assert stack.kinds(card("one", *kinds)) == said


def test_a_card_without_a_preview_has_the_letter_of_its_own_name_not_of_its_folder() -> None:
    shown = cards_html.cards([card("demo/ink"), card("plain")], searched=False)
    assert [part.partition("<")[0] for part in shown.split('aria-hidden="true">')[1:]] == ["I", "P"]


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.42, "0.4 s"), (9.94, "9.9 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (117, "1 min 57 s")]
)
def test_a_picture_says_how_long_it_took(seconds: float, said: str) -> None:
    assert f"<span>drawn in {said}</span>" in results.facts({"request": {}, "seconds": seconds})


@pytest.mark.parametrize(
    ("load", "run", "shared", "said"),
    [
        (0, None, False, "idle"),
        (2, None, False, "2 in the queue"),
        (0, Running("<emoji>", "user-a", 12, 30), False, "training &lt;emoji&gt; 12/30"),
        (1, Running("emoji", "user-b", 12, 30), True, "1 in the queue, training emoji 12/30"),
        (0, Running("emoji", "user-a", 12, 30), True, "a training of someone else&#x27;s"),
    ],
)
def test_the_header_says_what_runs_and_names_no_other_users_training(
    load: int, run: Running | None, shared: bool, said: str
) -> None:
    playground = SimpleNamespace(desk=SimpleNamespace(load=load), whose=lambda owner: owner if shared else None)
    house: Any = SimpleNamespace(playground=playground, runs=SimpleNamespace(running=lambda: run))
    assert f'role="status">{said}</span>' in page._load(house, "user-b")


def test_jobs_of_this_process_are_known_and_those_of_one_before_are_not() -> None:
    desk: Any = SimpleNamespace()
    jobs = Jobs()
    job = jobs.add(Ticket(lambda ticket: None, "user-a", desk))
    assert (jobs.knows(job.id), jobs.knows("0" * 16)) == (True, False)


def test_messages_are_text_and_nobody_shows_one_but_by_telling(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = list[str]()
    monkeypatch.setattr(gr, "Warning", shown.append)
    monkeypatch.setattr(gr, "Info", shown.append)
    telling.warn("<b>x</b> & 'y'")
    telling.inform("<i>")
    assert shown == ["&lt;b&gt;x&lt;/b&gt; &amp; &#x27;y&#x27;", "&lt;i&gt;"]
    assert str(telling.fault("<b>").message) == "&lt;b&gt;"
    folder = Path(page.__file__).parent
    users = {path.name for path in folder.glob("*.py") if re.search(r"gr\.(Warning|Info|Error)\(", path.read_text())}
    assert users == {"telling.py", "api.py"}  # programs are told as they are
