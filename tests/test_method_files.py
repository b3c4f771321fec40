"""Files of every method of the docs' table: ours to the bit, peft's both ways, kohya's as LoRA."""

import copy
import json
import re
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LNTuningConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from imgadapt import AdapterFile, attach, collect, detach, load, parameters, plan, save
from imgadapt.combining.keep import Keep
from imgadapt.combining.resizing import resize
from imgadapt.errors import ConfigError, FormatError, ShapeError
from imgadapt.formats import FORMATS, read
from imgadapt.methods import BOFT, IA3, OFT, OSF, BitFit, GraLoRA, Method, Norm, RoAd, VBLoRA, VeRA
from imgadapt.sites import Site
from imgadapt.summary import summary
from imgadapt.tensors import read_tensors
from imgadapt.training import spelling
from tests.test_contract import in_the_docs

METHODS = in_the_docs()


def said(method: Method) -> str:
    changed = [f"{f.name}={v}" for f in fields(method) if (v := getattr(method, f.name)) != f.default]
    return f"{type(method).__name__}({','.join(changed)})"


EVERY = pytest.mark.parametrize("method", METHODS, ids=said)


class Words(nn.Sequential):
    """Two embeddings, added."""

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride] # one argument
        return self[0](x) + self[1](x)


def net(method: Method) -> tuple[nn.Sequential, Tensor]:
    """Layers that the method acts on, and an input: two linear ones of one size, others, a convolution; or embeddings
    of words.
    """
    torch.manual_seed(0)
    if method.check(Site((24, 12), bias="bias")) is not None:
        return Words(nn.Embedding(18, 12), nn.Embedding(18, 12)), torch.arange(18)
    return nn.Sequential(
        nn.Linear(12, 24),
        nn.Linear(24, 12),
        nn.Linear(12, 24),
        nn.Linear(24, 16, bias=False),
        nn.Unflatten(1, (16, 1, 1)),
        nn.Conv2d(16, 8, 3, padding=1),
    ), torch.randn(5, 12)


def trained(method: Method, ends: str = "0125") -> tuple[nn.Sequential, AdapterFile, Tensor]:
    """That net, bare, an adapter of its layers with these names, as if trained, and an input."""
    model, x = net(method)
    sites = {name: Site.of(model[int(name)]) for name in ("01" if isinstance(model, Words) else ends)}
    names = [f"*.{name}" for name, site in sites.items() if site is not None and method.check(site) is None]
    attach(model, method, targets=names)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in parameters(model):
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    file = collect(model)
    detach(model)
    assert len(file.parts) > 1
    return model, file, x


def live(model: nn.Module, file: AdapterFile, x: Tensor) -> Tensor:
    attach(model, file)
    try:
        return model(x)
    finally:
        detach(model)


@EVERY
def test_imgadapts_own_file_is_the_adapter_to_the_bit(method: Method, tmp_path: Path) -> None:
    model, file, x = trained(method)
    path = save(file, tmp_path / "a.safetensors", format="imgadapt")
    again = load(path)
    assert again.parts.keys() == file.parts.keys()
    for name, part in again.parts.items():
        assert part.method == file.parts[name].method
        assert part.tensors.keys() == file.parts[name].tensors.keys()
        assert all(torch.equal(t, file.parts[name].tensors[key]) for key, t in part.tensors.items())
    for key in {*method.common} & {key for part in file.parts.values() for key in part.tensors}:
        kinds = {id(part.tensors[key]) for part in file.parts.values()}
        assert len({id(part.tensors[key]) for part in again.parts.values()}) == len(kinds)
        assert sum(key in name for name in read_tensors(path)[0]) == len(kinds)
    assert save(again, tmp_path / "b.safetensors").read_bytes() == path.read_bytes()
    assert torch.equal(live(model, again, x), live(model, file, x))


PEFT = [method for method in METHODS if method.peft is not None]


def of_peft(method: Method) -> tuple[nn.Sequential, AdapterFile, Tensor] | None:
    """That net and an adapter that peft has a word for, of layers of several sizes if it has for these; or None."""
    turns_bias = method.name == "road"
    for ends in ("012", "02"):
        model, file, x = trained(replace(method, bias=True) if turns_bias else method, ends)  # pyright: ignore[reportCallIssue] # it has one
        parts = {
            name: replace(part, tensors={k: t for k, t in part.tensors.items() if not (turns_bias and k == "diff_b")})
            for name, part in file.parts.items()
        }
        file = replace(file, parts=parts)
        if {step.loss for step in plan(file, "peft")} == {"exact"}:
            return model, file, x
    assert all("peft" in step.reason for step in plan(file, "peft"))
    return None


def test_peft_has_a_word_for_every_method_that_says_so() -> None:
    assert {type(method) for method in PEFT if of_peft(method)} == {type(method) for method in PEFT}


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")  # RandLoRA's projections, once for each layer
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # SHiRA's
@pytest.mark.parametrize("method", PEFT, ids=said)
def test_peft_loads_what_imgadapt_writes_and_the_other_way_round(method: Method, tmp_path: Path) -> None:
    made = of_peft(method)
    if made is None:
        return
    model, file, x = made
    folder = save(file, tmp_path / "ours", format="peft")
    ours, bare = live(model, file, x), model(x)
    assert (ours - bare).abs().max() > 1e-3
    theirs: Any = PeftModel.from_pretrained(copy.deepcopy(model), folder).eval()
    torch.testing.assert_close(theirs(x), ours, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(live(model, load(folder), x), ours, rtol=1e-5, atol=1e-5)

    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if theirs.base_model.prefix in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    file = load(tmp_path / "theirs")
    torch.testing.assert_close(live(model, file, x), theirs(x), rtol=1e-5, atol=1e-5)
    tensors, _ = read_tensors(tmp_path / "theirs" / "adapter_model.safetensors")
    again, _ = read_tensors(save(file, tmp_path / "again", format="peft") / "adapter_model.safetensors")
    assert tensors.keys() == again.keys()
    assert all(torch.equal(tensor, again[key]) for key, tensor in tensors.items())


def of_widths(method: Method, *layers: nn.Module) -> tuple[nn.Sequential, AdapterFile, Tensor]:
    """Layers of several widths, bare, an adapter of all of them as if trained, and an input."""
    torch.manual_seed(0)
    model = nn.Sequential(*layers)
    attach(model, method, targets="*")
    with torch.no_grad():
        for parameter in parameters(model):
            parameter.add_(torch.randn(parameter.shape) * 0.2)
    file = collect(model)
    detach(model)
    return model, file, torch.randn(5, 12)


def test_osf_on_layers_of_several_widths_is_pefts(tmp_path: Path) -> None:
    """A rank for each, by its whole name: the second layer's is the beginning of another's."""
    ends = [nn.Linear(12, 24), nn.Linear(24, 16), *(nn.Identity() for _ in range(8)), nn.Linear(16, 10)]
    model, file, x = of_widths(OSF(rank=3), *ends)
    folder = save(file, tmp_path / "ours", format="peft")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["effective_rank"], config["rank_pattern"]) == (9, {"^1$": 13, "^10$": 7})
    theirs: Any = PeftModel.from_pretrained(copy.deepcopy(model), folder).eval()
    ours = live(model, file, x)
    assert (ours - model(x)).abs().max() > 1e-3
    torch.testing.assert_close(theirs(x), ours, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(live(model, load(folder), x), ours, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "hint"),
    [
        (RoAd(), "group_size=8"),
        (VBLoRA(), "vector_length=4"),
        (OFT(side="input"), "block_size=4"),
        (BOFT(side="input", rescaled=True), "block_size=2"),
    ],
    ids=lambda value: value if isinstance(value, str) else said(value),
)
def test_what_peft_has_one_size_for_says_which_would_fit_all_and_that_does(
    method: Method, hint: str, tmp_path: Path
) -> None:
    layers = [nn.Linear(12, 24, bias=False), nn.Linear(24, 16, bias=False), nn.Linear(16, 64, bias=False)]
    _, file, _ = of_widths(method, *layers)
    with pytest.raises(FormatError, match=f"; train with {hint}, which fits all of them"):
        save(file, tmp_path / "no", format="peft")
    field, _, value = hint.partition("=")
    model, file, x = of_widths(replace(method, **{field: int(value)}), *layers)
    again = load(save(file, tmp_path / "a", format="peft"))
    assert again.format == "peft"
    torch.testing.assert_close(live(model, again, x), live(model, file, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", [OFT(), BOFT(), IA3(), RoAd()], ids=said)
def test_what_peft_has_otherwise_says_how_and_that_is_written(method: Method, tmp_path: Path) -> None:
    layers = [nn.Linear(12, 24, bias=method.name != "road"), nn.Linear(24, 24)]
    _, file, _ = of_widths(method, *layers)
    with pytest.raises(FormatError) as caught:
        save(file, tmp_path / "no", format="peft")
    if method.name == "road":
        assert "turns a layer's bias, too" in str(caught.value)
        save(replace(file, parts={"model.0": file.parts["model.0"]}), tmp_path / "a", format="peft")
        return
    (text,) = re.findall(r"[a-z0-9]+\(.*?\)", str(caught.value))
    made = spelling.method(text, {})
    assert isinstance(made, Method)
    _, file, _ = of_widths(replace(made, block_size=4) if method.name == "oft" else made, *layers)
    assert load(save(file, tmp_path / "a", format="peft")).format == "peft"


def test_methods_for_linear_layers_in_peft_are_not_called_several_methods(tmp_path: Path) -> None:
    """They were: convolutions would be written as LoRA, which is the same change."""
    for method, why in ((GraLoRA(rank=4), "only as LoRA: peft has gralora for linear layers only"), (BitFit(), "")):
        _, file, _ = trained(method)
        with pytest.raises(FormatError) as caught:
            save(file, tmp_path / "a", format="peft")
        assert "write them apart" not in str(caught.value)
        assert str(caught.value).count("for linear layers only") == 1
        assert why in str(caught.value)


SD1 = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn"
PLACES = {f"{SD1}1.to_q": 0, f"{SD1}1.to_k": 1, f"{SD1}2.to_q": 2, f"{SD1}2.to_k": 3}


class Base:
    """The net's weights under SD1.5's names."""

    def __init__(self, model: nn.Sequential) -> None:
        self._layers: Any = model
        self.names = list(PLACES)

    def site(self, name: str) -> Site:
        site = Site.of(self._layers[PLACES[name]])
        assert site is not None
        return site

    def weight(self, name: str) -> tuple[Tensor, Site]:
        return self._layers[PLACES[name]].weight.detach(), self.site(name)

    def bias(self, name: str) -> Tensor | None:
        bias = self._layers[PLACES[name]].bias
        return None if bias is None else bias.detach()


@EVERY
def test_it_becomes_kohyas_lora_with_what_that_leaves_out(method: Method, tmp_path: Path) -> None:
    model, file, _ = trained(method, "0123")
    if isinstance(model, Words):
        return
    base, names = Base(model), {f"model.{place}": name for name, place in PLACES.items()}
    file = AdapterFile({names[name]: part for name, part in file.parts.items()}, {}, "imgadapt", "sd1")
    if not method.merges:
        with pytest.raises(ConfigError, match=f"{method.name} {method.apart}, so it cannot be merged"):
            resize(file, Keep(rank=3), base=base)
        assert {step.loss for step in plan(file, "kohya")} == {"impossible"}
        return
    cut = total = 0.0
    deltas: dict[str, Tensor] = {}
    for name, part in file.parts.items():
        weight, site = base.weight(name)
        delta = part.method.scale * part.method.delta(part.tensors, site, weight)
        deltas[name] = delta
        values = torch.linalg.svdvals(delta)
        cut, total = cut + float((values[3:] ** 2).sum()), total + float((values**2).sum())
    small, report = resize(file, Keep(rank=3), base=base)
    assert report.residual == pytest.approx((cut / total) ** 0.5 if total else 0.0, rel=1e-3, abs=1e-5)
    biased = any(part.method.bias_delta(part.tensors) is not None for part in small.parts.values())
    form = "lycoris" if biased else "kohya"
    again = load(save(small, tmp_path / "a.safetensors", format=form))
    assert again.format == form
    assert {part.method.name for part in again.parts.values()} == {"lora"}
    for name, part in again.parts.items():
        change = part.method.scale * part.method.delta(part.tensors, base.site(name), None)
        left = float((change - deltas[name]).norm() ** 2)
        assert left == pytest.approx(float((torch.linalg.svdvals(deltas[name])[3:] ** 2).sum()), rel=1e-2, abs=1e-4)


@EVERY
def test_a_plan_says_what_no_tool_has_a_word_for_and_what_helps(method: Method) -> None:
    _, file, _ = trained(method, "012")
    names = {f"model.{place}": name for name, place in PLACES.items()}
    file = AdapterFile({names[name]: part for name, part in file.parts.items()}, {}, "imgadapt", "sd1")
    for form in FORMATS:
        for step in plan(file, form.name):
            assert step.loss == "exact" or step.reason, form.name
            if step.loss == "exact" and step.reason:  # as LoRA
                assert "as LoRA of rank" in step.reason
    summary(file).as_json()


@pytest.mark.filterwarnings("ignore:Unsupported layer type")  # peft's, of the norms that it is for
@pytest.mark.parametrize("norm", [nn.LayerNorm(12), nn.RMSNorm(12)], ids=["layer norm", "rms norm"])
def test_pefts_tuned_norms_are_read_and_written_back(norm: nn.Module, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(12, 12), norm), torch.randn(5, 12)
    theirs: Any = get_peft_model(copy.deepcopy(model), LNTuningConfig(target_modules=["1"]))
    with torch.no_grad():
        for tensor in theirs.base_model.model[1].ln_tuning_layers.parameters():
            tensor.add_(torch.randn_like(tensor))
    theirs.save_pretrained(str(tmp_path / "theirs"))
    file = load(tmp_path / "theirs")
    torch.testing.assert_close(live(model, file, x), theirs(x))
    again = load(save(file, tmp_path / "again", format="peft"))
    torch.testing.assert_close(live(model, again, x), theirs(x))
    own = load(save(file, tmp_path / "own.safetensors", format="imgadapt"))
    torch.testing.assert_close(live(model, own, x), theirs(x))
    attach(model, Norm(), targets="*.1")
    assert {step.reason.partition(";")[0] for step in plan(collect(model), "peft")} == {
        "peft's LN_TUNING has the norms' weights themselves, and this is what they differ by"
    }


def _said(file: AdapterFile, folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors, metadata = read_tensors(save(file, folder / "own.safetensors", format="imgadapt"))
    return tensors, json.loads(metadata["imgadapt"])


def _read(tensors: Mapping[str, Tensor], said: Mapping[str, Any]) -> AdapterFile:
    reading = read(tensors, {"imgadapt": json.dumps(said)}, ())
    return AdapterFile(reading.parts, {}, reading.format)


SHARED = VeRA(rank=3, seed=None)
"""Whose projections layers of one size share."""


def test_tensors_of_one_name_that_are_several_stay_several(tmp_path: Path) -> None:
    """Of layers of two sizes, and of two adapters in one file; each is written once."""
    first, second = (trained(SHARED, "012")[1].parts for _ in range(2))
    other = {f"unet.{name}": part for name, part in second.items()}
    for part in other.values():
        part.tensors["vera_up"].mul_(2)
    tensors, said = _said(AdapterFile({**first, **other}, {}), tmp_path)
    assert said["common"]["model.0"] == said["common"]["model.2"] != said["common"]["model.1"]
    assert sorted(key for key in tensors if key.startswith("common.vera_up")) == [
        f"common.vera_up.{k}" for k in range(4)
    ]
    again = load(tmp_path / "own.safetensors").parts
    for name, part in {**first, **other}.items():
        assert all(torch.equal(tensor, again[name].tensors[key]) for key, tensor in part.tensors.items())
    assert again["model.0"].tensors["vera_up"] is again["model.2"].tensors["vera_up"]


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a rank of text": ({"rank": "3"}, "rank is '3', wanted int"),
    "a rank that is true": ({"rank": True}, "rank is True, wanted int"),
    "a rank of half": ({"rank": 2.5}, "rank is 2.5, wanted int"),
    "a list for a number": ({"d_initial": [1]}, "d_initial is .1., wanted float"),
    "an enormous seed": ({"seed": 10**30}, "seed is 10*"),
    "a seed below": ({"seed": -1}, "seed is -1"),
    "an enormous rank": ({"rank": 10**9}, "rank"),
}


@pytest.mark.parametrize("what", WRONG)
def test_settings_of_a_wrong_kind_are_refused(what: str, tmp_path: Path) -> None:
    change, wanted = WRONG[what]
    tensors, said = _said(trained(VeRA(rank=3), "02")[1], tmp_path)
    said["methods"][0] |= change
    with pytest.raises(FormatError, match=wanted):
        _read(tensors, said)


def test_what_layers_share_is_there_and_is_theirs_or_the_file_is_refused(tmp_path: Path) -> None:
    tensors, said = _said(trained(SHARED, "02")[1], tmp_path)
    with pytest.raises(FormatError, match=r"model\.[02] has it in common with others, and the file does not have it"):
        _read({key: t for key, t in tensors.items() if key != "common.vera_up.0"}, said)
    with pytest.raises(FormatError, match=r"are unknown to the nearest table|no tensor of any method"):
        _read({**tensors, "common.vera_up.7": torch.zeros(2)}, said)
    twice = {**said, "common": {**said["common"], "model.0": {"vera_up": 0, "vera_down": 0, "vera_b": 0}}}
    with pytest.raises(FormatError, match=r"and the file does not have it|has vera_b twice"):
        _read(tensors, twice)
    with pytest.raises(FormatError, match=r"which no layer has|that it does not have"):
        _read(tensors, {**said, "common": {"unet.elsewhere": {"vera_up": 0}}})
    small = _read({**tensors, "common.vera_up.0": torch.zeros(3, 3)}, said)
    model, _ = net(SHARED)
    with pytest.raises(ShapeError, match="vera_up is"):
        attach(model, small)
    for shape in ([10**6, 10**6], [0, 3], [True, 2], [1] * 6, "24", [2.0, 2]):
        with pytest.raises(FormatError, match=r"no weight is of the shape|is not what imgadapt writes"):
            _read(tensors, {**said, "shapes": {"model.0": shape}})
