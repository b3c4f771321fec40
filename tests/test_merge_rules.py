"""What merging rules promise, all of them: identity, order, gauge, weights; and each one's own formula, dense, fp64."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from imgadapt import BOFT, IA3, OFT, AdapterFile, DoRA, Full, GLoRA, LoHa, LoKr, LoRA, Norm, save
from imgadapt.combining.combine import combine_inputs
from imgadapt.combining.corespace import canonical, frame
from imgadapt.combining.engine import Engine, Input, truncated, whole
from imgadapt.combining.files import read_input
from imgadapt.combining.ranks import Choice, rank_of, ranks_for
from imgadapt.combining.recipe import Entry, MergeRecipe
from imgadapt.combining.rule import Rule
from imgadapt.combining.rules import RULES
from imgadapt.combining.terms import Pair
from imgadapt.errors import ConfigError, StateError
from imgadapt.formats import Part
from imgadapt.methods import Method
from imgadapt.sites import Site

LINEAR, CONV, NORM = (
    Site((24, 40), bias="bias"),
    Site((12, 10, 3, 3), "conv", bias="bias"),
    Site((24,), "norm", bias="bias"),
)
TABLE = [rule for rule in RULES if rule.rotations is None]
CASES = [(rule, "delta") for rule in TABLE] + [(rule, "core") for rule in TABLE if rule.elements is not None]
NAMES = [f"{rule.name}{' in core space' * (space == 'core')}" for rule, space in CASES]
over_cases = pytest.mark.parametrize(("rule", "space"), CASES, ids=NAMES)
EVERYTHING = {"density": 1.0, "epsilon": 0.0, "gamma": 0.0, "flatten": 0.0}

METHODS: dict[str, tuple[Method, Site]] = {
    "lora": (LoRA(rank=4, alpha=2.0), LINEAR),
    "rslora": (LoRA(rank=4, alpha=3.0, rank_stabilised=True), LINEAR),
    "lora with bias": (LoRA(rank=3, alpha=1.0, bias=True), LINEAR),
    "lora on a convolution": (LoRA(rank=4, alpha=2.0), CONV),
    "tucker": (LoRA(rank=4, alpha=2.0, tucker=True), CONV),
    "loha": (LoHa(rank=3, alpha=1.5), LINEAR),
    "loha with cores": (LoHa(rank=2, alpha=1.5, tucker=True), CONV),
    "lokr of low rank": (LoKr(rank=2, alpha=1.0, factor=4), LINEAR),
    "full lokr": (LoKr(rank=None, factor=4), LINEAR),
    "lokr on a convolution": (LoKr(rank=2, alpha=1.0, factor=2), CONV),
    "full": (Full(), LINEAR),
    "full on a convolution": (Full(), CONV),
    "norm": (Norm(), NORM),
    "dora": (DoRA(LoRA(rank=4, alpha=2.0)), LINEAR),
    "oft": (OFT(block_size=4), LINEAR),
    "boft": (BOFT(block_size=4), LINEAR),
    "glora": (GLoRA(rank=3, alpha=1.0), LINEAR),
    "ia3": (IA3(), LINEAR),
}  # fmt: skip
OF_BASE = ("dora", "oft", "boft", "glora", "ia3")


@dataclass(frozen=True)
class Model:
    """A base: one weight for each layer."""

    sites: Mapping[str, Site]

    @property
    def names(self) -> list[str]:
        return list(self.sites)

    def weight(self, name: str) -> tuple[Tensor, Site]:
        site = self.sites[name]
        return random(99, *site.shape), site

    def bias(self, name: str) -> Tensor | None:
        return random(98, self.sites[name].rows)


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def part(method: Method, site: Site = LINEAR, seed: int = 0, dtype: torch.dtype = torch.float32) -> Part:
    method = method.at(site)
    shapes = method.shapes(site)
    tensors = {key: (0.3 * random(100 * seed + k, *shapes[key])).to(dtype) for k, key in enumerate(sorted(shapes))}
    return Part(method, tensors, shape=site.shape)


def dense(one: Part, site: Site = LINEAR) -> Tensor:
    """Its change by the method's own formula, fp64, (out, fan_in)."""
    t = {key: tensor.double() for key, tensor in one.tensors.items()}
    weight = random(99, *site.shape).double()
    return (one.method.delta(t, site, weight) * one.method.scale).reshape(site.shape[0], -1)


def lora(seed: int, rank: int = 4, alpha: float = 2.0) -> Part:
    return part(LoRA(rank=rank, alpha=alpha), seed=seed)


def file(*parts: Part, names: Sequence[str] = ()) -> AdapterFile:
    return AdapterFile(dict(zip(names or [f"unet.{k}" for k in range(len(parts))], parts, strict=False)))


def engine(
    rule: str,
    files: Sequence[AdapterFile],
    weights: Sequence[float] | None = None,
    *,
    space: Any = "delta",
    base: Model | None = None,
    digests: Sequence[str] = "abcdefgh",
    **options: Any,
) -> Engine:
    recipe = MergeRecipe(tuple(Entry(d) for d in digests[: len(files)]), rule, options, space)
    made = [
        Input(d, f, d, lambda _, w=w: w) for f, d, w in zip(files, digests, weights or [1.0] * len(files), strict=False)
    ]
    return Engine(recipe, made, None, base)


def merged(rule: str, files: Sequence[AdapterFile], weights: Sequence[float] | None = None, **options: Any) -> Tensor:
    """The first layer's merged change."""
    return whole(engine(rule, files, weights, **options).merge("unet.0").terms)


def near(found: Tensor, wanted: Tensor, most: float = 1e-5) -> None:
    assert found.shape == wanted.shape
    assert float((found.double() - wanted.double()).norm()) <= most * float(wanted.double().norm())


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


# --- the sum


@pytest.mark.parametrize("rule", ["weighted", "concat", "svd", "task_arithmetic"])
@pytest.mark.parametrize("site", [LINEAR, CONV], ids=["linear", "conv"])
def test_sums_of_any_methods_ranks_and_dtypes_are_those_of_fp64(rule: str, site: Site) -> None:
    names = [name for name, (_, own) in METHODS.items() if own == site]
    parts = [part(METHODS[name][0], site, seed, torch.bfloat16 if seed % 3 == 0 else torch.float32)
             for seed, name in enumerate(names)]  # fmt: skip
    weights = [0.9 - 0.25 * k for k in range(len(parts))]
    digests = [f"{k:02}" for k in range(len(parts))]
    made = engine(rule, [file(p) for p in parts], weights, base=Model({"unet.0": site}), digests=digests)
    wanted = torch.stack([w * dense(p, site) for w, p in zip(weights, parts, strict=True)]).sum(0)
    found = made.merge("unet.0")
    near(whole(found.terms), wanted, 2e-6)
    assert found.norm == pytest.approx(float(wanted.norm()), rel=1e-5)
    products = torch.stack([dense(p, site).flatten() for p in parts])
    torch.testing.assert_close(found.gram, products @ products.t(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_a_cut_is_the_best_and_its_residual_the_tail(rank: int) -> None:
    parts = [lora(1), lora(2, 6, 3.0), part(LoHa(rank=2, alpha=1.0), seed=3)]
    weights = [0.8, -0.5, 1.2]
    wanted = torch.stack([w * dense(p) for w, p in zip(weights, parts, strict=True)]).sum(0)
    values = torch.linalg.svdvals(wanted)
    found = truncated(engine("svd", [file(p) for p in parts], weights).merge("unet.0"), rank)
    tail = float(values[rank:].norm() / values.norm())
    assert found.residual == pytest.approx(tail, rel=1e-5)
    assert float((whole(found.terms) - wanted).norm() / wanted.norm()) == pytest.approx(tail, rel=1e-5)
    assert isinstance(found.terms[0], Pair)
    assert found.terms[0].up.shape == (24, rank)


# --- rules by inner products, against their formulas on whole matrices


def test_slerp_is_mergekits_formula_or_goes_from_norm_to_norm() -> None:
    a, b = lora(1, alpha=6.0), lora(2)
    x, y = dense(a), dense(b)
    omega = torch.acos((x * y).sum() / (x.norm() * y.norm()))
    for wa, wb in ((0.5, 0.5), (0.3, 0.9)):
        t = wb / (wa + wb)
        s, u = torch.sin((1 - t) * omega) / torch.sin(omega), torch.sin(t * omega) / torch.sin(omega)
        near(merged("slerp", [file(a), file(b)], [wa, wb]), s * x + u * y)
        unit = s * x / x.norm() + u * y / y.norm()
        found = merged("slerp", [file(a), file(b)], [wa, wb], magnitude="mean", scale=1.5)
        near(found, unit * ((1 - t) * x.norm() + t * y.norm()) * 1.5)
        assert float(found.norm()) == pytest.approx(float(1.5 * ((1 - t) * x.norm() + t * y.norm())), rel=1e-5)
        near(merged("karcher", [file(a), file(b)], [wa, wb], scale=1.5), found)
        swapped = merged("slerp", [file(b), file(a)], [wb, wa], magnitude="mean", scale=1.5, digests="ba")
        assert torch.equal(swapped, found)
        near(merged("slerp", [file(a), file(b)], [wa, -wb]),
             torch.sin((1 - t) * (math.pi - omega)) / torch.sin(omega) * x
             - torch.sin(t * (math.pi - omega)) / torch.sin(omega) * y)  # fmt: skip


def test_slerp_of_parallel_and_of_opposite_changes_is_the_straight_line() -> None:
    a = lora(1)
    b = replace(a, tensors={**a.tensors, "up": a.tensors["up"] * 3})
    near(merged("slerp", [file(a), file(b)], [0.5, 0.5]), dense(a) * 2)
    near(merged("slerp", [file(a), file(b)], [0.5, -0.5]), dense(a) * -1)
    assert merged("karcher", [file(a), file(a)], [0.5, -0.5]).abs().max() == 0


def test_karchers_mean_has_no_pull_left() -> None:
    parts, weights = [lora(k, alpha=1.0 + k) for k in (1, 2, 3, 4)], [1.0, 0.5, -0.8, 0.3]
    found = merged("karcher", [file(p) for p in parts], weights).double()
    mean = found / found.norm()
    total = torch.zeros_like(mean)
    for p, w in zip(parts, weights, strict=True):
        x = math.copysign(1.0, w) * dense(p) / dense(p).norm()
        c = (x * mean).sum()
        total += abs(w) / sum(map(abs, weights)) * torch.acos(c) / (1 - c**2).sqrt() * (x - c * mean)
    assert total.norm() < 1e-6
    norms = [abs(w) * float(dense(p).norm()) for p, w in zip(parts, weights, strict=True)]
    assert float(found.norm()) == pytest.approx(sum(norms) / sum(map(abs, weights)), rel=1e-5)


def test_model_stock_is_the_papers_ratio_of_the_mean() -> None:
    shared = dense(lora(9))
    parts = [part(Full(bias=False), seed=k) for k in range(3)]
    parts = [replace(p, tensors={"diff": (0.3 * p.tensors["diff"].double() + shared).float()}) for p in parts]
    x = [dense(p) for p in parts]
    c = sum(float((a * b).sum() / (a.norm() * b.norm())) for a, b in itertools.combinations(x, 2)) / 3
    t = 3 * c / (1 + 2 * c)
    assert 0.3 < t < 0.99
    near(merged("model_stock", [file(p) for p in parts]), t * torch.stack(x).mean(0))
    # two that are the same, counted as one of double weight: the same sum and the same agreement of the rest
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    gram = torch.tensor([[float((a * b).sum() / (a.norm() * b.norm())) for b in x] for a in x], dtype=torch.float64)
    c = float((p @ gram @ p - (p**2).sum()) / (1 - (p**2).sum()))
    k = 1 / float((p**2).sum())
    wanted = sum(float(w) * d for w, d in zip(p, x, strict=True)) * (k * c / (1 + (k - 1) * c))
    near(merged("model_stock", [file(q) for q in parts], [1.0, 0.6, 0.4]), torch.as_tensor(wanted))
    opposite = [file(parts[0]), file(replace(parts[0], tensors={"diff": -parts[0].tensors["diff"]}))]
    assert merged("model_stock", opposite).abs().max() == 0


def test_cosine_adaptive_counts_what_two_share_once() -> None:
    a, b = lora(1), lora(2)
    x, y = dense(a), dense(a) * 0.6 + dense(b)
    mixed = part(Full(bias=False))
    mixed = replace(mixed, tensors={"diff": y.float()})
    y = mixed.tensors["diff"].double()
    wa, wb = 0.8, 0.5
    h = wa * wb * float((x * y).sum())
    ha, hb = wa**2 * float((x * x).sum()), wb**2 * float((y * y).sum())
    assert h > 0.1 * hb
    files = [file(a), file(mixed)]
    near(merged("cosine_adaptive", files, [wa, wb]), wa * ha / (ha + h) * x + wb * hb / (hb + h) * y)
    near(
        merged("cosine_adaptive", files, [wa, wb], strength=0.5),
        wa * ha / (ha + h / 2) * x + wb * hb / (hb + h / 2) * y,
    )
    near(merged("cosine_adaptive", files, [wa, -wb]), wa * x - wb * y)  # they point apart
    near(merged("cosine_adaptive", [file(a)] * 3), x)
    faint = merged("cosine_adaptive", [file(a)] * 2, [1.0, 1e-3])  # a faint copy takes next to nothing
    near(faint, x * (1 + 1e-6) / (1 + 1e-3), 1e-5)


# --- rules by factors, against the papers' dense formulas


def svd(x: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    u, s, vt = torch.linalg.svd(x, full_matrices=False)
    return u[:, :rank], s[:rank], vt[:rank]


def ties(tensors: Sequence[Tensor], weights: Sequence[float], density: float) -> Tensor:
    """Trim, elect with weights, mean of those that agree."""
    kept: list[Tensor] = []
    for x, w in zip(tensors, weights, strict=True):
        k = int(density * x.numel())
        index = x.abs().flatten().argsort(descending=True)[:k]
        kept.append(w * torch.zeros_like(x).flatten().index_copy(0, index, x.flatten()[index]).view_as(x))
    sign = torch.stack(kept).sum(0).sign()
    agree = torch.stack([(x.sign() == sign) & (x != 0) for x in kept])
    return (torch.stack(kept) * agree).sum(0) / agree.sum(0).clamp(min=1)


@pytest.mark.parametrize("density", [1.0, 0.5, 0.2])
def test_knots_is_ties_in_the_right_factors_of_all_side_by_side(density: float) -> None:
    parts, weights = [lora(1), lora(2, 3), lora(3, 5, 1.0)], [0.8, -0.5, 1.0]
    x = [dense(p) for p in parts]
    u, s, vt = svd(torch.cat(x, 1), 12)
    aligned = [s[:, None] * v for v in vt.split(40, dim=1)]
    near(merged("knots", [file(p) for p in parts], weights, density=density), u @ ties(aligned, weights, density), 2e-5)


@pytest.mark.parametrize("keep", [1.0, 0.5])
def test_tsv_m_is_the_official_dense_code(keep: float) -> None:
    parts, weights = [lora(1), lora(2, 2), lora(3, 6, 1.0)], [0.8, -0.5, 1.0]
    own = [svd(dense(p), round(keep * p.tensors["down"].shape[0])) for p in parts]
    sums = torch.cat([u for u, _, _ in own], 1), torch.cat([w * s for w, (_, s, _) in zip(weights, own, strict=True)])
    (uu, _, vu), (uv, _, vv) = (
        torch.linalg.svd(x, full_matrices=False) for x in (sums[0], torch.cat([v for _, _, v in own]))
    )
    wanted = torch.linalg.multi_dot((uu, vu, torch.diag(sums[1]), uv, vv))
    near(merged("tsv_m", [file(p) for p in parts], weights, keep=keep), wanted)


def test_iso_c_makes_the_values_of_the_sum_equal_within_its_span() -> None:
    parts, weights = [lora(1), lora(2, 3), lora(1)], [0.8, -0.5, 1.0]  # the third is the first
    total = torch.stack([w * dense(p) for w, p in zip(weights, parts, strict=True)]).sum(0)
    u, s, vt = svd(total, 7)
    files = [file(p) for p in parts]
    near(merged("iso_c", files, weights), u @ vt * s.mean())
    assert torch.linalg.matrix_rank(merged("iso_c", files, weights), rtol=1e-4) == 7
    near(merged("iso_c", files, weights, flatten=0.25, scale=2.0), 2 * (u * (0.75 * s + 0.25 * s.mean())) @ vt)


@pytest.mark.parametrize("mu", [0.0, 0.5, 1e6])
def test_np_lora_projects_the_subject_away_from_the_style(mu: float) -> None:
    style, subject = lora(1), lora(2, 5, 1.0)
    _, _, v = svd(dense(style), 4)
    wanted = 0.8 * dense(style) + 1.5 * dense(subject) @ (torch.eye(40) - mu / (1 + mu) * v.t() @ v)
    files = [file(style), file(subject)]
    near(merged("np_lora", files, [0.8, 1.5], mu=mu), wanted)
    near(merged("np_lora", files, [0.8, 1.5], mu=mu, digests="zy"), wanted)  # the order is the recipe's
    wanted = dense(style) + dense(subject) @ (torch.eye(40) - mu / (1 + mu) * v[:2].t() @ v[:2])
    near(merged("np_lora", files, mu=mu, keep=0.5), wanted)


def shared(deltas: Sequence[Tensor], ranks: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Bases of core space: of the factors that share singular values evenly."""
    own = [svd(x, r) for x, r in zip(deltas, ranks, strict=True)]
    left = svd(torch.cat([u * s.sqrt() for u, s, _ in own], 1), sum(ranks))[0]
    return left, svd(torch.cat([s.sqrt()[:, None] * v for _, s, v in own]), sum(ranks))[2]


@pytest.mark.parametrize("density", [1.0, 0.4])
def test_ties_in_core_space_is_ties_of_the_aligned_cores(density: float) -> None:
    parts, weights = [lora(1), lora(2, 3), lora(3, 5, 1.0)], [0.8, -0.5, 1.0]
    x = [dense(p) for p in parts]
    left, right = shared(x, [4, 3, 5])
    cores = [left.t() @ d @ right.t() for d in x]
    found = engine("ties", [file(p) for p in parts], weights, space="core", density=density).merge("unet.0")
    near(whole(found.terms), left @ ties(cores, weights, density) @ right, 2e-5)
    assert isinstance(found.terms[0], Pair)
    assert found.terms[0].rank == 12


def test_core_space_loses_nothing_and_drops_what_is_nothing() -> None:
    parts = [lora(1), lora(1), lora(2, 3)]
    there = frame([Pair(p.tensors["up"] * p.method.scale, p.tensors["down"]) for p in parts])
    assert there.left.shape == (24, 7)
    assert there.right.shape == (7, 40)
    assert there.ranks == (4, 4, 3)
    torch.testing.assert_close(there.left.t() @ there.left, torch.eye(7, dtype=torch.float64))
    for core, p in zip(there.cores, parts, strict=True):
        near(there.lifted(core).rows(0, 24), dense(p), 2e-6)
    own = canonical(Pair(torch.randn(24, 3) @ torch.ones(3, 6), torch.randn(6, 40)))
    assert own.s.shape == (1,)


def test_core_space_with_a_threshold_over_the_whole_adapter_and_with_norms_and_biases() -> None:
    files = [file(lora(k), lora(k + 5, 3), part(Norm(), NORM, k), part(LoRA(2, bias=True), seed=k)) for k in (1, 2)]
    made = list(engine("ties", files, space="core", density=0.3, trim="model").merged())
    assert [len(m.terms) for m in made] == [1] * 4
    frames = {
        name: frame([Pair(p.tensors["up"] * p.method.scale, p.tensors["down"]) for p in (f.parts[name] for f in files)])
        for name in ("unet.0", "unet.1", "unet.3")
    }
    flat: list[Tensor] = []
    for k, f in enumerate(files):
        cores = [there.cores[k].flatten() for there in frames.values()]
        norm, biased = f.parts["unet.2"].tensors, f.parts["unet.3"]
        flat.append(
            torch.cat([*cores, *(t.double() for t in norm.values()), biased.tensors["bias"] * biased.method.scale])
        )
    wanted = ties(flat, [1.0, 1.0], 0.3)
    found, first = whole(made[0].terms).double(), frames["unet.0"]
    near(first.left.t() @ found @ first.right.t(), wanted[:64].view(8, 8), 2e-5)
    assert made[3].bias is not None
    near(made[3].bias, wanted[-24:])


def test_the_subspace_is_the_first_of_core_space() -> None:
    parts, weights = [lora(1), lora(2, 3), lora(3, 5, 1.0)], [0.8, -0.5, 1.0]
    x = [w * dense(p) for w, p in zip(weights, parts, strict=True)]
    left, right = shared(x, [4, 3, 5])
    for keep, size in ((1.0, 5), (0.4, 2), (100.0, 12)):
        u, v = left[:, :size], right[:size]
        near(merged("subspace", [file(p) for p in parts], weights, keep=keep), u @ u.t() @ sum(x) @ v.t() @ v)
    assert merged("subspace", [file(p) for p in parts], weights, keep=100.0).shape == (24, 40)


# --- what other tools give


@pytest.mark.parametrize("weights", [(0.7, 0.4), (0.7, -0.4), (-1.5, -0.5)])
def test_legacy_factor_sum_is_pefts_linear(weights: tuple[float, float]) -> None:
    peft = pytest.importorskip("peft")
    model = torch.nn.Sequential(torch.nn.Linear(40, 24))
    parts = [lora(1, alpha=2.0), lora(2, alpha=6.0)]
    configs = [peft.LoraConfig(r=4, lora_alpha=p.method.file_alpha, target_modules=["0"]) for p in parts]
    wrapped = peft.get_peft_model(model, configs[0], "one")
    wrapped.add_adapter("two", configs[1])
    layer = wrapped.base_model.model[0]
    for name, p in zip(("one", "two"), parts, strict=True):
        layer.lora_A[name].weight.data, layer.lora_B[name].weight.data = p.tensors["down"], p.tensors["up"]
    wrapped.add_weighted_adapter(["one", "two"], list(weights), "both", "linear")
    wanted = layer.get_delta_weight("both").detach()
    near(merged("legacy_factor_sum", [file(p) for p in parts], weights), wanted, 1e-6)


@pytest.mark.parametrize("ratios", [(0.7, 0.4), (0.7, -0.4)])
def test_legacy_factor_sum_is_kohyas_whose_ratios_count_twice(ratios: tuple[float, float]) -> None:
    parts = [lora(1, alpha=2.0), lora(2, alpha=6.0)]
    base, up, down = 2.0, torch.zeros(24, 4), torch.zeros(4, 40)
    for p, ratio in zip(parts, ratios, strict=True):  # sd-scripts, networks/merge_lora.py, merge_lora_models
        assert p.method.file_alpha is not None
        scale = math.sqrt(p.method.file_alpha / base) * ratio
        up, down = up + p.tensors["up"] * abs(scale), down + p.tensors["down"] * scale
    wanted = up @ down * base / 4
    near(merged("legacy_factor_sum", [file(p) for p in parts], ratios, tool="kohya"), wanted, 1e-6)
    near(merged("legacy_factor_sum", [file(parts[0])], [0.5], tool="kohya"), dense(parts[0]) / 4)


def test_legacy_factor_sum_says_what_it_cannot() -> None:
    with pytest.raises(ConfigError, match=r"unet\.0: .* one rank, and they have \[4, 3\]; take rule 'svd'"):
        merged("legacy_factor_sum", [file(lora(1)), file(lora(2, 3))])
    with pytest.raises(ConfigError, match="factors of LoRA"):
        merged("legacy_factor_sum", [file(lora(1)), file(part(LoHa(rank=2)))])


# --- how much is kept


def choices(seed: int) -> dict[str, Choice]:
    costs = [5, 9, 16]
    rows = [random(seed + k, 4).abs().sort(descending=True).values.double() for k in range(3)]
    return {f"layer {k}": Choice(row, cost) for k, (row, cost) in enumerate(zip(rows, costs, strict=True))}


def of(layers: Mapping[str, Choice], ranks: Sequence[int]) -> tuple[float, int]:
    """Squared norm kept, numbers stored."""
    kept = sum(float((c.values[:r] ** 2).sum()) for c, r in zip(layers.values(), ranks, strict=True))
    return kept, sum(c.cost * r for c, r in zip(layers.values(), ranks, strict=True))


@pytest.mark.parametrize("seed", range(5))
def test_ranks_for_is_as_good_as_trying_all(seed: int) -> None:
    layers = choices(10 * seed)
    every = [of(layers, ranks) for ranks in itertools.product(range(5), repeat=3)]
    total = max(kept for kept, _ in every)
    one = max(float(c.values[0] ** 2) for c in layers.values())
    gains = sorted(((float(v**2) / c.cost, c.cost) for c in layers.values() for v in c.values), reverse=True)
    for numbers in itertools.accumulate(cost for _, cost in gains):  # where the best per number fill the room
        kept, used = of(layers, list(ranks_for(layers, numbers=numbers).values()))
        assert used == numbers
        assert kept == pytest.approx(max(k for k, u in every if u <= numbers), rel=1e-12)
    for numbers in range(5, 120, 7):
        kept, used = of(layers, list(ranks_for(layers, numbers=numbers).values()))
        assert used <= numbers
        assert kept >= max(k for k, u in every if u <= numbers) - one
    for error in (0.05, 0.2, 0.5, 0.9):
        ranks = ranks_for(layers, error=error)
        kept, used = of(layers, list(ranks.values()))
        assert 1 - kept / total <= error**2 * (1 + 1e-9)
        assert used <= min(u for k, u in every if 1 - k / total <= error**2) + max(c.cost for c in layers.values())
        assert ranks == ranks_for(layers, energy=1 - error**2)
    assert ranks_for(layers, error=1.0) == dict.fromkeys(layers, 0)
    assert ranks_for(layers, energy=1.0) == dict.fromkeys(layers, 4)


def test_rank_of_is_each_tools_rule_in_exact_terms() -> None:
    values = torch.tensor([8.0, 4.0, 2.0, 1.0, 1.0])
    assert [rank_of(values, "ratio", bound) for bound in (1.0, 2.0, 3.9, 4.0, 100.0)] == [1, 2, 2, 3, 5]
    assert [rank_of(values, "threshold", bound) for bound in (9.0, 4.0, 1.0)] == [1, 2, 5]
    assert [rank_of(values, "cumulative", bound) for bound in (0.5, 0.51, 0.75, 1.0)] == [1, 2, 2, 5]
    energy = [64, 80, 84, 85, 86]
    for k, reached in enumerate(energy):
        assert rank_of(values, "fro", (reached / 86) ** 0.5) == k + 1
    assert rank_of(values, "fro", (65 / 86) ** 0.5) == 2
    assert rank_of(values, "quantile", 0.5) == 2
    assert rank_of(torch.zeros(3), "fro", 0.9) == 1


@pytest.mark.parametrize("rule", ["svd", "tsv_m", "ties", "slerp"])
@pytest.mark.parametrize("budget", [{"error": 0.4}, {"energy": 0.7}, {"size": 0.0012}, {"rank": 3}])
def test_budgets_are_met_by_the_whole_adapter(tmp_path: Path, rule: str, budget: dict[str, Any]) -> None:
    files = [file(lora(1 + k), lora(3 + k, 6, 3.0), names=["unet.a", "unet.b"]) for k in (0, 10)]
    recipe = MergeRecipe((Entry("a"), Entry("b")), rule, **budget, dtype="fp16")
    exact = list(engine(rule, files).merged())
    inputs = engine(rule, files).inputs
    made, report = combine_inputs(recipe, inputs)
    squares = lost = 0.0
    for m in exact:
        wanted = whole(m.terms).double()
        found = dense(made.parts[m.name]) if m.name in made.parts else torch.zeros(24, 40)
        squares, lost = squares + float(wanted.square().sum()), lost + float((found - wanted).square().sum())
    error = (lost / squares) ** 0.5
    assert error == pytest.approx(report.residual, rel=2e-4)
    ranks = [p.method.file_rank or 0 for p in made.parts.values()]
    if "error" in budget or "energy" in budget:
        most = budget.get("error", 0.3**0.5)
        assert 0.7 * most < error <= most * (1 + 1e-5)
    elif "rank" in budget:
        assert ranks == [3, 3]
    else:
        assert (
            0.0012e6 - 2 * 64 < sum(2 * t.numel() for p in made.parts.values() for t in p.tensors.values()) <= 0.0012e6
        )


def test_files_of_three_formats_are_one_merge(tmp_path: Path) -> None:
    layers = [f"unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_{x}" for x in "qk"]
    site = Site((320, 320))
    parts = [part(m, site, k) for k, m in enumerate((LoRA(4, 2.0), LoRA(3, 1.0), LoHa(2, 1.0)))]
    inputs: list[Input] = []
    for k, (own, form) in enumerate(zip(parts, ("kohya", "diffusers", "lycoris"), strict=True)):
        written = AdapterFile(dict.fromkeys(layers, own), {}, None, "sd1")
        path = save(written, tmp_path / f"{form}.safetensors", format=form)
        inputs.append(read_input(Entry(str(path)), lambda _, k=k: 0.5 + k))
    made, _ = combine_inputs(MergeRecipe(tuple(Entry(i.name) for i in inputs), "concat"), inputs)
    wanted = sum((0.5 + k) * dense(own, site) for k, own in enumerate(parts))
    for name in layers:
        near(dense(made.parts[name], site), torch.as_tensor(wanted), 2e-6)
        assert made.parts[name].method.file_rank == 4 + 3 + 4


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
