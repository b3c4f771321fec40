"""Requests and prompts: what they take, and how they say what they do not."""

import json
import time
from typing import Any

import pytest

from imgadapt.errors import ConfigError
from imgadapt.playground import prompts
from imgadapt.playground.prompts import Parsed, Tag
from imgadapt.playground.requests import GenerateRequest, Layout, Use

A, B = "a" * 16, "b" * 16


def refusal(values: Any) -> str:
    """What a request is told; it takes no time, is a line, and has no words of pydantic."""
    began = time.thread_time()
    with pytest.raises(ConfigError) as caught:
        GenerateRequest.of(values)
    assert time.thread_time() - began < 2
    said = str(caught.value)
    assert len(said) < 300
    assert "\n" not in said
    assert "pydantic" not in said
    assert "Input" not in said
    said.encode()  # half characters would raise
    return said


NUMBERS: list[tuple[str, Any, str]] = [
    ("guidance", float("nan"), "guidance: must be a finite number (it is nan)"),
    ("guidance", float("inf"), "guidance: must be a finite number (it is inf)"),
    ("guidance", float("-inf"), "guidance: must be a finite number (it is -inf)"),
    ("guidance", 1e308, "guidance: must be 50 or less (it is 1e+308)"),
    ("guidance", 10**400, "guidance: is far too large (it is '10^400 or so')"),
    ("guidance", True, "guidance: must be a number (it is True)"),
    ("guidance", "4", "guidance: must be a number (it is '4')"),
    ("guidance", [4], "guidance: must be a number"),
    ("guidance", -1, "guidance: must be 0 or more (it is -1)"),
    ("steps", None, "steps: must be a number"),
    ("steps", 0, "steps: must be 1 or more (it is 0)"),
    ("steps", 10**6, "steps: must be 200 or less (it is 1000000)"),
    ("steps", 2.5, "steps: must be a whole number (it is 2.5)"),
    ("steps", 10**5000, "steps: is far too large (it is '10^5000 or so')"),
    ("seed", float("nan"), "seed: must be a finite number (it is nan)"),
    ("seed", -2, "seed: must be -1 or more (it is -2)"),
    ("seed", 2**63, "seed: must be less than 9,007,199,254,740,992 (it is '10^19 or so')"),
    ("seed", 2**64, "seed: must be less than 9,007,199,254,740,992 (it is '10^19 or so')"),
    ("width", 7, "width: must be 8 or more (it is 7)"),
    ("width", 513, "width: must be a multiple of 8 (it is 513)"),
    ("width", 0, "width: must be 8 or more (it is 0)"),
    ("height", 100_000, "height: must be 4,096 or less (it is 100000)"),
    ("count", 10**4, "count: must be 32 or less (it is 10000)"),
    ("denoise", 0, "denoise: must be more than 0 (it is 0)"),
    ("denoise", 1.5, "denoise: must be 1 or less (it is 1.5)"),
]


@pytest.mark.parametrize(("name", "value", "said"), NUMBERS, ids=[f"{name}: {said[-30:]}" for name, _, said in NUMBERS])
def test_a_number_that_is_none_or_out_of_range_is_refused_by_name(name: str, value: Any, said: str) -> None:
    assert refusal({name: value}) == said


def test_whole_numbers_may_be_written_as_floats_and_minus_zero_is_zero() -> None:
    request = GenerateRequest.of(
        {"seed": -0.0, "steps": 20.0, "guidance": -0.0, "adapters": [{"adapter": A, "weight": -0.0}]}
    )
    assert repr((request.seed, request.steps, request.guidance)) == "(0, 20, 0.0)"
    assert repr(request.adapters[0].weight) == "0.0"
    assert GenerateRequest.of({"seed": -1}).seed == -1
    assert GenerateRequest.of({"seed": 2**53 - 1}).seed == 2**53 - 1


TEXTS: list[tuple[str, str]] = [
    ("x" * 10**7, "prompt: has more than 8,000 characters"),
    ("(" * 10**5, "prompt: has more than 8,000 characters"),
    ("a\0b", "prompt: has control characters (it is 'a\\x00b')"),
    ("a\x1b[31mb", "prompt: has control characters (it is 'a\\x1b[31mb')"),
    ("\ud800", "prompt: has half a character (a lone surrogate) (it is '?')"),
]


@pytest.mark.parametrize(("text", "said"), TEXTS, ids=range(len(TEXTS)))
def test_a_text_that_no_file_takes_is_refused_at_once(text: str, said: str) -> None:
    assert refusal({"prompt": text}) == said


@pytest.mark.parametrize("text", ["", "\u202egnp.txt", "a 🦊 é ü", "(" * 8000, "</textarea><script>alert(1)</script>"])
def test_odd_texts_that_are_texts_stay_as_they_are(text: str) -> None:
    assert GenerateRequest.of({"prompt": text, "negative": text}).prompt == text


def test_line_ends_are_one_character() -> None:
    assert GenerateRequest.of({"prompt": "a\r\nb\rc\nd"}).prompt == "a\nb\nc\nd"


def test_tables_lists_and_unknown_keys_in_wrong_places_are_refused() -> None:
    assert refusal([]) == "a request is a table of settings, not list"
    assert refusal(None) == "a request is a table of settings, not NoneType"
    assert refusal({"prompt": {"a": 1}}) == "prompt: must be text"
    assert refusal({"sampler": ["base"]}).startswith("sampler: must be one of 'base', 'DDIM', ")
    assert "xx" not in refusal({"sampler": "x" * 10**6})
    assert refusal({"layout": [1]}) == "layout: must be a table of settings"
    assert refusal({"adapters": {"adapter": A}}) == "adapters: must be a list"
    assert refusal({"adapters": [{}]}) == "adapters.0.adapter: is missing"
    assert refusal({"x" * 10**7: 1}) == f"{'x' * 37}...: is no setting of this request"
    assert refusal({"colour": "a", "stepps": 1}) == "colour: is no setting of this request; and 1 more"


def test_what_is_nested_a_hundred_thousand_deep_is_refused() -> None:
    table: dict[str, Any] = {}
    listed: list[Any] = []
    for _ in range(10**5):
        table, listed = {"prompt": table}, [listed]
    assert refusal(table) == "the request is nested too deeply"
    assert refusal({"prompt": listed}) == "the request is nested too deeply"
    while table:  # freed a level at a time: in one go it takes as much stack
        table = table["prompt"]
    while listed:
        listed = listed[0]


@pytest.mark.parametrize("id", ["../../etc/passwd", "/etc/passwd", "a" * 16 + "\n", "A" * 16, "a" * 41, "", "con"])
def test_ids_are_no_paths(id: str) -> None:
    assert refusal({"init": id}).startswith("init: is none of the ids that were given out here")


def test_settings_that_contradict_each_other_are_refused() -> None:
    assert refusal({"mask": A}) == "there is a mask and no picture under it"
    assert refusal({"adapters": [{"adapter": A}, {"adapter": A}]}) == "an adapter is in the stack twice"
    assert (
        refusal({"adapters": [{"adapter": A, "start": 5, "stop": 5}]}) == "adapters.0: stop (5) is not after start (5)"
    )
    assert refusal({"layout": {"rows": 2, "row": 2}}) == "layout: row 2 is not one of 2"
    assert refusal({"layout": {}, "count": 2}) == "layout is for one picture"
    assert refusal({"adapters": [{"adapter": f"{k:016x}"} for k in range(17)]}) == "adapters: has more than 16 entries"


def test_a_request_survives_json() -> None:
    request = GenerateRequest(
        prompt="a fox",
        adapters=(Use(adapter=A, weight=0.5, text=0, blocks="MID", start=1, stop=3),),
        width=64,
        layout=Layout(),
    )
    assert GenerateRequest.of(json.loads(request.model_dump_json())) == request


TAGS: list[tuple[str, Parsed]] = [
    ("a  fox ,, b", Parsed("a  fox ,, b")),
    ("a fox <lora:x>", Parsed("a fox", (Tag("x"),))),
    ("a fox, <lora:x:0.8>, grass", Parsed("a fox, grass", (Tag("x", 0.8),))),
    ("<lora:x:0.8:.3>a fox", Parsed("a fox", (Tag("x", 0.8, 0.3),))),
    ("<LoRA:x:-1e-1> a <lyco:y:2> b", Parsed("a b", (Tag("x", -0.1), Tag("y", 2.0)))),
    ("a\n<lora:x:te=0:unet=0.5>\nb", Parsed("a\n\nb", (Tag("x", 0.5, 0.0),))),
    ("<lora:x:1:lbw=0,1,0.5:step=2-8>", Parsed("", (Tag("x", 1.0, None, "0,1,0.5", 2, 8),))),
    ("<lora:x:lbw=MIDD:start=3>", Parsed("", (Tag("x", 1.0, None, "MIDD", 3),))),
    ('<lora:"my style":0.5>', Parsed("", (Tag("my style", 0.5),))),
    ("<lora:../../x:1>", Parsed("", (Tag("../../x"),))),
    ("a < b, c > d, <b>", Parsed("a < b, c > d, <b>")),
]


@pytest.mark.parametrize(("text", "parsed"), TAGS, ids=[text for text, _ in TAGS])
def test_tags_are_read_and_taken_out(text: str, parsed: Parsed) -> None:
    assert prompts.parse(text) == parsed


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a <lora:", "the tag <lora: does not end; it lacks a >"),
        ("a <lora:x <lora:y>", "the tag <lora:x <lora:y> does not end; it lacks a >"),
        ("<lora:x\n>", "the tag <lora:x\n> does not end; it lacks a >"),
        ("<lora:>", "a <lora:...> tag has no name"),
        ("<lora::1>", "a <lora:...> tag has no name"),
        ("<lora:n:NaN>", "<lora:n>: 'NaN' is not a weight; write a number such as 0.8"),
        ("<lora:n:inf>", "<lora:n>: 'inf' is not a weight; write a number such as 0.8"),
        ("<lora:n:1_0>", "<lora:n>: '1_0' is not a weight; write a number such as 0.8"),
        ("<lora:n:>", "<lora:n>: '' is not a weight; write a number such as 0.8"),
        ("<lora:n:1e9>", "<lora:n>: weight 1e+09 is out of range; it goes from -10 to 10"),
        ("<lora:n:1:1:1>", "<lora:n> has 3 numbers; it takes a weight, and one for text encoders"),
        ("<lora:n:dyn=4>", "<lora:n> has dyn=; known are unet=, te=, lbw=, start=, stop=, step="),
        ("<lora:n:start=-1>", "<lora:n>: '-1' is not a step; write a whole number, 0 or more"),
        ("<lora:n:1> <lora:N:2>", "<lora:N> is in the prompt twice; give it one weight"),
        ("".join(f"<lora:n{k}:1>" for k in range(1000)), "the prompt has more than 16 <lora:...> tags"),
    ],
)  # fmt: skip
def test_tags_that_cannot_be_meant_are_refused(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        prompts.parse(text)
    assert str(caught.value) == said


def test_prompts_are_read_in_one_pass() -> None:
    began = time.thread_time()
    assert prompts.parse("(" * 10**6 + "<" * 10**6).tags == ()
    for text in ("<lora:" * 10**5, "<lora:x" + " " * 10**6, "<lora:" + "a" * 10**6 + ">", "<lora:x:1>" * 10**5):
        with pytest.raises(ConfigError, match=r"^.{1,120}$"):
            prompts.parse(text)
    assert time.thread_time() - began < 2


def test_what_is_spelled_is_read_as_the_same_in_either_order_of_numbers() -> None:
    uses = [
        Use(adapter=A, weight=0.8, text=0.25, blocks="1,0,1", start=2, stop=9),
        Use(adapter=B, weight=-1),
    ]
    text = prompts.spell(uses, {A: "my style", B: "b"})
    assert text == "<lora:my style:te=0.25:unet=0.8:lbw=1,0,1:start=2:stop=9> <lora:b:-1>"
    for te_first in (False, True):
        parsed = prompts.parse(f"a fox {text}", te_first=te_first)
        assert parsed.prompt == "a fox"
        assert [tag.use(id) for tag, id in zip(parsed.tags, (A, B), strict=True)] == uses
    assert prompts.parse("<lora:x:0.25:0.8>", te_first=True).tags == (Tag("x", 0.8, 0.25),)


def test_a_tag_whose_steps_are_in_the_wrong_order_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"^<lora:x>: stop \(2\) is not after start \(5\)$"):
        prompts.parse("<lora:x:step=5-2>").tags[0].use(A)
