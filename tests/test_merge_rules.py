"""What merging rules promise, all of them: identity, order, gauge, weights, missing layers."""

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from imgadapt import AdapterFile, LoRA
from imgadapt.combining.combine import combine_inputs
from imgadapt.combining.engine import Input, whole
from imgadapt.combining.recipe import Entry, MergeRecipe
from imgadapt.combining.rules import RULES
from imgadapt.combining.rules.rule import Rule
from imgadapt.errors import ConfigError, StateError
from imgadapt.formats import Part
from tests.changes import (
    METHODS,
    OF_BASE,
    Model,
    dense,
    engine,
    file,
    lora,
    merged,
    near,
    part,
    random,
)

TABLE = [rule for rule in RULES if rule.rotations is None]
CASES = [(rule, "delta") for rule in TABLE] + [(rule, "core") for rule in TABLE if rule.elements is not None]
NAMES = [f"{rule.name}{' in core space' * (space == 'core')}" for rule, space in CASES]
over_cases = pytest.mark.parametrize(("rule", "space"), CASES, ids=NAMES)
EVERYTHING = {"density": 1.0, "epsilon": 0.0, "gamma": 0.0, "flatten": 0.0}


def everything(rule: Rule) -> dict[str, Any]:
    """Options with which a rule leaves nothing out."""
    return {name: value for name, value in EVERYTHING.items() if name in rule.options}


def count(rule: Rule, wanted: int = 3) -> int:
    return min(wanted, rule.most)


# --- what all rules promise


@over_cases
def test_one_adapter_at_weight_1_comes_out_as_it_is(rule: Rule, space: str) -> None:
    methods = {n: m for n, m in METHODS.items() if rule.name != "legacy_factor_sum" or n in ("lora", "rslora", "norm")}
    one = file(*(part(*row, seed=3) for row in methods.values()), names=list(methods))
    base = Model({name: site for name, (_, site) in METHODS.items()})
    files = [one] * rule.least
    if rule.name == "np_lora":  # the style alone, and the subject alone
        parts = {n: p for n, p in one.parts.items() if n not in OF_BASE}
        zeros = {n: {k: torch.zeros_like(t) for k, t in p.tensors.items()} for n, p in parts.items()}
        files = [one, AdapterFile({n: replace(p, tensors=zeros[n]) for n, p in parts.items()})]
    made = engine(rule.name, files, space=space, base=base, **everything(rule))
    for name, (_, site) in methods.items():
        own = one.parts[name]
        found = made.merge(name)
        near(whole(found.terms), dense(own, site))
        bias = own.method.bias_delta({key: t.double() for key, t in own.tensors.items()})
        assert (found.bias is None) == (bias is None)
        if bias is not None and found.bias is not None:
            near(found.bias, bias * own.method.scale)


@over_cases
def test_the_order_of_inputs_changes_no_bit(rule: Rule, space: str) -> None:
    n = count(rule)
    files = [file(lora(1)), file(lora(2)), file(lora(3))][:n]
    weights = [0.8, -0.5, 0.3][:n]
    if rule.ordered:
        near(merged(rule.name, files, weights, space=space), merged(rule.name, files, weights, space=space), 0)
        assert not torch.equal(merged(rule.name, files), merged(rule.name, files[::-1], digests="bacd"))
        return
    wanted = merged(rule.name, files, weights, space=space)
    for order in itertools.permutations(range(n)):
        found = merged(
            rule.name, [files[k] for k in order], [weights[k] for k in order], space=space,
            digests="".join("abc"[k] for k in order),
        )  # fmt: skip
        assert torch.equal(found, wanted)


@over_cases
def test_other_factors_and_another_alpha_of_the_same_change_give_the_same(rule: Rule, space: str) -> None:
    if rule.name == "legacy_factor_sum":
        files = [file(lora(1)), file(lora(2))]
        wanted = merged(rule.name, files)
        found = merged(rule.name, [files[0], file(gauged(files[1].parts["unet.0"], 7))])
        assert float((found - wanted).norm() / wanted.norm()) > 0.1  # why it is called legacy
        return
    n = count(rule)
    files = [file(lora(1)), file(lora(2, 3)), file(lora(3, 5, 1.0))][:n]
    other = [file(gauged(f.parts["unet.0"], seed)) for seed, f in enumerate(files)]
    weights = [0.8, -0.5, 0.3][:n]
    near(merged(rule.name, other, weights, space=space), merged(rule.name, files, weights, space=space), 2e-5)


def gauged(one: Part, seed: int) -> Part:
    """(B, A) -> (B G⁻¹, G A), at four times the alpha."""
    rank, scale = one.tensors["down"].shape[0], one.method.scale
    g = random(500 + seed, rank, rank).double() + 2 * torch.eye(rank)
    up, down = one.tensors["up"].double() @ torch.linalg.inv(g) / 4, g @ one.tensors["down"].double()
    return Part(LoRA(rank=rank, alpha=4 * scale * rank), {"up": up.float(), "down": down.float()}, shape=one.shape)


@over_cases
def test_weights_act_as_the_rule_says(rule: Rule, space: str) -> None:
    n = count(rule)
    files = [file(lora(1)), file(lora(2)), file(lora(3))][:n]
    w, v = [0.8, -0.5, 0.3][:n], [0.25, 1.5, 0.5][:n]
    wanted = merged(rule.name, files, w, space=space)
    near(merged(rule.name, files, [-x for x in w], space=space), -wanted)
    twice = 1.0 if rule.relative else 2.0
    near(merged(rule.name, files, [2 * x for x in w], space=space), wanted * twice)
    both = merged(rule.name, files, [x + y for x, y in zip(w, v, strict=True)], space=space)
    other = merged(rule.name, files, v, space=space)
    linear = float((both - wanted - other).norm() / both.norm()) < 1e-5
    assert linear == (rule.linear or rule.name in ("dare_linear", "della_linear", "magnitude_prune", "breadcrumbs"))


@over_cases
def test_a_layer_that_one_input_does_not_have(rule: Rule, space: str) -> None:
    if rule.most < 2:
        return
    one, other = lora(1), lora(2)
    files = [file(one, one, names=["unet.0", "unet.1"]), file(other, names=["unet.1"])]
    weights = [0.8, 0.5]
    found = merged(rule.name, files, weights, space=space, **everything(rule))
    near(found, dense(one) * (0.8 / 1.3 if rule.relative else 0.8))
    off = engine(rule.name, files, weights, space=space, **everything(rule))
    off.inputs[1] = replace(off.inputs[1], weight=lambda name: 0.0)  # by a mask: as if it were not there
    found = whole(off.merge("unet.1").terms)
    near(found, dense(one) * (1.0 if rule.relative else 0.8))


@over_cases
def test_adapters_that_change_nothing_and_the_same_one_twice(rule: Rule, space: str) -> None:
    zero = lora(1)
    zero = replace(zero, tensors={**zero.tensors, "up": torch.zeros(24, 4)})
    n = count(rule, 2)
    found = engine(rule.name, [file(zero)] * n, space=space).merge("unet.0")
    assert found.norm == 0
    assert torch.equal(whole(found.terms), torch.zeros(24, 40))
    found = whole(engine(rule.name, [file(lora(1))] * n, space=space, **everything(rule)).merge("unet.0").terms)
    factor = float((found.double() * dense(lora(1))).sum() / dense(lora(1)).square().sum())
    near(found, dense(lora(1)) * factor if rule.name != "np_lora" else found)
    once = {"ties", "knots", "dare_ties", "della", "breadcrumbs_ties", "emr_unified", "tsv_m", "cosine_adaptive"}
    assert factor == pytest.approx(
        4.0 if rule.name == "legacy_factor_sum"
        else 1 + 1 / 1.5 if rule.name == "np_lora"
        else 1.0 if rule.relative or rule.name in once else 2.0, rel=1e-5,
    )  # fmt: skip


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@over_cases
def test_what_is_not_finite_is_refused_by_name(rule: Rule, space: str, bad: float) -> None:
    broken = lora(1)
    broken.tensors["down"][1, 2] = bad
    files = [file(lora(2)), file(broken)] if rule.most > 1 else [file(broken)]
    with pytest.raises(StateError, match=r"unet\.0: .*b has NaN or infinity"):
        merged(rule.name, files, space=space)


def test_every_row_says_what_it_is() -> None:
    assert len({rule.name for rule in RULES}) == len(RULES)
    for rule in RULES:
        assert rule.about
        assert rule.source
        assert len(rule.about) < 110
        kinds = [rule.scalar, rule.factors, rule.elements, rule.rotations]
        assert sum(kind is not None for kind in kinds) == 1, rule.name
        for name, option in rule.options.items():
            assert option.about
            assert rule.checked({name: option.default})[name] == option.default
    with pytest.raises(ConfigError, match="space is 'core'; tsv_m works in 'delta'"):
        MergeRecipe((Entry("a"),), "tsv_m", space="core")


@pytest.mark.parametrize("rule", ["tsv_m", "knots", "iso_c", "np_lora", "subspace", "karcher"])
def test_the_number_of_threads_changes_no_bit(rule: str) -> None:
    files = [file(*(lora(k + 10 * n) for k in range(6))) for n in range(2)]
    found: list[list[Tensor]] = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append([whole(made.terms) for made in engine(rule, files).merged()])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# --- layers that a format fuses

QKV = [f"transformer.transformer_blocks.0.attn.to_{x}" for x in "qkv"]


def flux(seed: int, *, shared: bool = True) -> AdapterFile:
    downs = [0.1 * random(seed + (0 if shared else k), 4, 3072) for k in range(3)]
    parts = {
        name: Part(LoRA(4, 2.0), {"up": 0.1 * random(seed + 50 + k, 3072, 4), "down": downs[k]})
        for k, name in enumerate(QKV)
    }
    return AdapterFile(parts, {}, "kohya", "flux")


@pytest.mark.parametrize(
    ("rule", "space"),
    [("ties", "core"), ("legacy_factor_sum", "delta"), ("slerp", "delta"), ("cosine_adaptive", "delta")],
)
def test_what_is_merged_apart_is_the_same_in_a_format_that_fuses(rule: str, space: Any) -> None:
    files = [flux(1), flux(200, shared=False)]
    if rule == "cosine_adaptive":  # one has no v, another shares its q
        del files[1].parts[QKV[2]]  # pyright: ignore[reportIndexIssue] # a dict here
        files[1].parts[QKV[0]].tensors["down"].add_(files[0].parts[QKV[0]].tensors["down"])
        files[1].parts[QKV[0]].tensors["up"].add_(files[0].parts[QKV[0]].tensors["up"])
    found: list[AdapterFile] = []
    for form in ("kohya", "diffusers"):
        recipe = MergeRecipe((Entry("a"), Entry("b")), rule, space=space, format=form)
        inputs = [Input(n, f, n, lambda _, w=w: w) for n, f, w in zip("ab", files, (0.8, -0.5), strict=True)]
        found.append(combine_inputs(recipe, inputs)[0])
    for name in QKV:
        a, b = ((t["up"][:40].double() @ t["down"].double()) for t in (f.parts[name].tensors for f in found))
        near(a, b, 2e-6)
