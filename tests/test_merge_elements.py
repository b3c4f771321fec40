"""Rules of elements: what peft and mergekit make of the same, exact thresholds, chances, bytes, memory."""

import hashlib
import json
import warnings
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft.utils import merge_utils
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from imgadapt import AdapterFile, Full, LoKr, LoRA, Norm
from imgadapt.combining.combine import combine_inputs, common_architecture, in_memory
from imgadapt.combining.engine import Engine, Input
from imgadapt.combining.entering import Change
from imgadapt.combining.lowrank import spectrum
from imgadapt.combining.recipe import Entry, MergeRecipe
from imgadapt.combining.rules import sparse, tiles
from imgadapt.combining.rules.elements import RULES
from imgadapt.combining.rules.masks import mask_key, uniform
from imgadapt.combining.rules.tiles import Source, largest
from imgadapt.combining.terms import Dense, Pair, Term
from imgadapt.errors import ConfigError, StateError
from imgadapt.formats import Part

WEIGHTS = [0.75, -0.5, 1.25]
NEUTRAL: dict[str, Any] = {"density": 1.0, "epsilon": 0.0, "gamma": 0.0}
QKV = [f"transformer.transformer_blocks.0.attn.to_{x}" for x in "qkv"]
NAMES = [rule.name for rule in RULES]


def row(name: str) -> Any:
    return next(rule for rule in RULES if rule.name == name)


def recipe(name: str, inputs: int = 1, seed: int = 0, **options: Any) -> MergeRecipe:
    return MergeRecipe(tuple(Entry(str(k)) for k in range(inputs)), name, options, seed=seed)


def layer(terms: Sequence[Term], weights: Sequence[float], biases: Sequence[Tensor | None] | None = None) -> Any:
    changes = tuple(Change(t, b) for t, b in zip(terms, biases or [None] * len(terms), strict=True))
    who = tuple(range(len(terms)))
    keys, numbers = tuple("xyz"[: len(terms)]), torch.tensor(weights, dtype=torch.float64)
    return SimpleNamespace(name="a.b", who=who, changes=changes, weights=numbers, keys=keys)


def merge(name: str, own: Any, seed: int = 0, **options: Any) -> tuple[Tensor, Tensor | None]:
    asked = recipe(name, len(own.who), seed, **options)
    (term,), bias = row(name).elements(own, asked, asked.row.checked(options))
    return term.rows(0, term.shape[0]), bias


def changes(count: int, *shape: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


PEFT: dict[str, Any] = {"elect": "plain", "divide": "count"}


@pytest.mark.parametrize("vote", ["sum", "count"])
@pytest.mark.parametrize("density", [0.13, 0.5, 0.99])
@pytest.mark.parametrize("shape", [(24, 40), (40, 7)])
def test_ties_and_pruning_equal_pefts(shape: tuple[int, int], density: float, vote: str) -> None:
    own, weights = changes(3, *shape), torch.tensor(WEIGHTS)
    method: Any = {"sum": "total", "count": "frequency"}[vote]
    wanted = merge_utils.ties(own, weights, density, method)
    found, _ = merge("ties", layer([Dense(t) for t in own], WEIGHTS), density=density, vote=vote, **PEFT)
    torch.testing.assert_close(found, wanted, rtol=2e-7, atol=0)
    wanted = merge_utils.magnitude_prune(own, weights, density)
    found, _ = merge("magnitude_prune", layer([Dense(t) for t in own], WEIGHTS), density=density)
    torch.testing.assert_close(found, wanted, rtol=2e-7, atol=0)


@pytest.mark.parametrize("rule", ["dare_linear", "dare_ties"])
def test_dare_equals_pefts_with_the_same_masks(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    own, density = changes(3, 24, 40), 0.3
    masks = iter([uniform(mask_key(5, digest, "a.b"), 0, 960).view(24, 40) < density for digest in "xyz"])
    monkeypatch.setattr(torch, "bernoulli", lambda chance: next(masks).to(chance.dtype))  # pyright: ignore[reportUnknownLambdaType] # a patch
    wanted = getattr(merge_utils, rule)(own, torch.tensor(WEIGHTS), density)
    options: dict[str, Any] = PEFT if rule == "dare_ties" else {}
    found, _ = merge(rule, layer([Dense(t) for t in own], WEIGHTS), 5, density=density, **options)
    torch.testing.assert_close(found, wanted, rtol=3e-7, atol=0)


MERGEKIT = json.loads(Path(__file__).with_name("mergekit_numbers.json").read_text())
OURS: Mapping[str, Mapping[str, Any]] = {
    "ties": {"divide": "weights"},
    "dare_linear": {"rescale": "l1"},
    "dare_ties": {"rescale": "l1", "divide": "none"},
    "della": {"rescale": "l1", "divide": "weights"},
    "della_linear": {"rescale": "l1"},
    "breadcrumbs": {},
    "breadcrumbs_ties": {"divide": "none"},
}


@pytest.mark.parametrize("rule", list(OURS))
def test_rules_equal_mergekits_with_the_same_numbers(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = {mask_key(0, d, "a.b"): torch.tensor(n) for d, n in zip("xyz", MERGEKIT["numbers"], strict=True)}
    monkeypatch.setattr(sparse, "uniform", lambda key, start, count: numbers[key].flatten()[start : start + count])  # pyright: ignore[reportUnknownLambdaType] # a patch
    own = layer([Dense(torch.tensor(c)) for c in MERGEKIT["changes"]], MERGEKIT["weights"])
    found, _ = merge(rule, own, **MERGEKIT["cases"][rule], **OURS[rule])
    wanted = torch.tensor(MERGEKIT["made"][rule])
    assert int((wanted != 0).sum()) > 8
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)


def philox(counter: int, key: int) -> list[int]:
    """Philox 4x64-10 as its paper has it."""
    mask, c, k = 2**64 - 1, [counter, 0, 0, 0], [key & (2**64 - 1), key >> 64]
    for _ in range(10):
        a, b = c[0] * 0xD2E7470EE14C6C93, c[2] * 0xCA5A826395121157
        c = [(b >> 64) ^ c[1] ^ k[0], b & mask, (a >> 64) ^ c[3] ^ k[1], a & mask]
        k = [(k[0] + 0x9E3779B97F4A7C15) & mask, (k[1] + 0xBB67AE8584CAA73B) & mask]
    return c


def test_random_numbers_are_philoxs_by_place() -> None:
    key = mask_key(7, "digest", "layer")
    assert key == int.from_bytes(hashlib.sha256(b"7\0digest\0layer").digest()[:16], "little")
    words = [w for block in (1, 2, 3) for w in philox(block, key)]
    wanted = [(half >> 8) / 2**24 for w in words for half in (w & 0xFFFFFFFF, w >> 32)]
    assert uniform(key, 0, 24).tolist() == wanted
    assert uniform(key, 5, 14).tolist() == wanted[5:19]
    assert len({mask_key(*k) for k in ((7, "d", "l"), (8, "d", "l"), (7, "e", "l"), (7, "d", "m"))}) == 4


def kept_by_sort(tensors: Sequence[Tensor], n: int) -> list[Tensor]:
    flat = torch.cat([t.flatten() for t in tensors]).abs()
    mask = torch.zeros(len(flat), dtype=torch.bool)
    mask[flat.argsort(descending=True, stable=True)[:n]] = True
    return [m.view_as(t) for m, t in zip(mask.split([t.numel() for t in tensors]), tensors, strict=True)]


@pytest.mark.parametrize("coarse", [False, True], ids=["distinct", "many of one magnitude"])
@pytest.mark.parametrize("elements", [16, 60, 2**18])
def test_the_n_largest_are_exactly_those_of_a_sort(
    elements: int, coarse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "_ELEMENTS", elements)
    own = [t * 3 for t in (*changes(2, 17, 12), *changes(1, 9, 16))]
    own = [t.round() if coarse else t for t in own]
    sources = [Source(0, "d", str(k), Dense(t)) for k, t in enumerate(own)]
    total = sum(t.numel() for t in own)
    counts = [0, 1, 5, total // 3, total // 2, total - 1, total]
    for workers in (1, 2):
        cuts = largest(lambda: sources, lambda s: s.who, lambda n: counts, workers)
        for k, n in enumerate(counts):
            wanted = kept_by_sort(own, n)
            for source, t, mask in zip(sources, own, wanted, strict=True):
                step = tiles.height(t.shape[1])
                parts = [cuts[source.key][k].keeps(t[a : a + step], a) for a in range(0, len(t), step)]
                assert torch.equal(torch.cat(parts), mask), (n, source.name)


def test_densities_are_exact_and_take_elements_in_order() -> None:
    own = torch.tensor([[1.0, -2, 2, 0, 2, -2, 1, 2]] * 5)
    for density, kept in ((0.1, 4), (0.5, 20), (0.6, 24), (0.01, 1)):
        found, _ = merge("magnitude_prune", layer([Dense(own)], [1.0]), density=density)
        assert torch.equal(found != 0, kept_by_sort([own], kept)[0]), density
    found, _ = merge("breadcrumbs", layer([Dense(own)], [1.0]), density=0.5, gamma=0.1)
    top = kept_by_sort([own], 4)[0]
    assert torch.equal(found, own * (kept_by_sort([own], 24)[0] & ~top))


def test_a_bias_has_its_own_threshold_and_its_own_chances() -> None:
    own, bias = changes(1, 6, 10)[0], changes(1, 50, seed=1)[0] * 100  # none of the weight's would be among the largest
    found, thin = merge("magnitude_prune", layer([Dense(own)], [1.0], [bias]), density=0.3)
    assert thin is not None
    assert torch.equal(found != 0, kept_by_sort([own], 18)[0])
    assert torch.equal(thin != 0, kept_by_sort([bias], 15)[0])
    _, thin = merge("dare_linear", layer([Dense(own)], [1.0], [bias]), 3, density=0.5)
    assert thin is not None
    assert torch.equal(thin != 0, uniform(mask_key(3, "x", "a.b.bias"), 0, 50) < 0.5)


def test_breadcrumbs_without_outliers_keep_what_their_density_says() -> None:
    own = changes(1, 8, 8)[0]  # a hundredth of 64 elements is none
    found, _ = merge("breadcrumbs", layer([Dense(own)], [1.0]), density=0.9, gamma=0.01)
    assert int((found != 0).sum()) == 57
    assert torch.equal(found != 0, kept_by_sort([own], 57)[0])


def file(seed: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> AdapterFile:
    """LoRA of alpha != rank (with a bias), a convolution's, LoKr, a whole difference, a norm."""
    g = torch.Generator().manual_seed(seed)

    def made(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=g) * scale).to(dtype)

    parts = {
        "unet.a": Part(LoRA(rank=3, alpha=2.0, bias=True), {"up": made(24, 3), "down": made(3, 40), "bias": made(24)}),
        "unet.b": Part(LoRA(rank=4, alpha=6.0), {"up": made(12, 4, 1, 1), "down": made(4, 8, 3, 3)}),
        "unet.c": Part(LoKr(rank=None, factor=4), {"w1": made(4, 2), "w2": made(6, 9)}),
        "unet.d": Part(Full(bias=True), {"diff": made(10, 15), "diff_b": made(10)}),
        "unet.e": Part(Norm(bias=True), {"w_norm": made(20), "b_norm": made(20)}),
    }
    return AdapterFile(parts, {}, "kohya", None)


def engine(asked: MergeRecipe, files: Sequence[AdapterFile], weights: Sequence[float]) -> Engine:
    inputs: list[Input] = []
    for k, (one, w) in enumerate(zip(files, weights, strict=True)):
        inputs.append(in_memory(one, str(k), lambda _, w=w: w))
    return Engine(asked, inputs, common_architecture(inputs))


def results(asked: MergeRecipe, files: Sequence[AdapterFile], weights: Sequence[float]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for made in engine(asked, files, weights).merged():
        (term,) = made.terms
        found[made.name] = term.rows(0, term.shape[0])
        if made.bias is not None:
            found[f"{made.name}.bias"] = made.bias
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("rule", NAMES)
def test_of_one_adapter_all_kept_is_the_adapter(rule: str, dtype: torch.dtype) -> None:
    options = {k: v for k, v in NEUTRAL.items() if k in row(rule).options}
    one, asked = file(1, dtype), recipe(rule, **options)
    found = results(asked, [one], [1.0])
    source = engine(asked, [one], [1.0])
    assert len(found) == 8
    for name in source.names:
        change = source.layer(name).changes[0]
        assert torch.equal(found[name], change.term.rows(0, change.term.shape[0])), name
        assert change.bias is None or torch.equal(found[f"{name}.bias"], change.bias)
    twice = results(asked, [one], [-0.5])
    assert all(torch.equal(twice[name], -0.5 * t) for name, t in found.items())


@pytest.mark.parametrize("rule", NAMES)
def test_all_weights_times_a_number_are_the_result_times_it(rule: str) -> None:
    files = [file(1), file(2), file(3)]
    found = results(recipe(rule, 3), files, WEIGHTS)
    for factor in (4.0, -2.0):  # by random numbers no sum is 0, so that no vote is a draw
        again = results(recipe(rule, 3), files, [w * factor for w in WEIGHTS])
        assert all(torch.equal(again[name], factor * t) for name, t in found.items())
    half = results(recipe(rule, 3, scale=0.5), files, WEIGHTS)
    assert all(torch.equal(half[name], 0.5 * t) for name, t in found.items())


def test_the_default_vote_counts_weights_and_divides_by_those_that_agree() -> None:
    own = layer([Dense(torch.tensor([[1.0, 1.0, 4.0]])), Dense(torch.tensor([[-1.0, 3.0, 0.0]]))], [0.5, -2.0])
    found, _ = merge("ties", own, density=1.0)
    assert torch.equal(found, torch.tensor([[(0.5 + 2.0) / 2, -6.0, 2.0]]))  # the minus turns the second's vote, too
    found, _ = merge("ties", own, density=1.0, divide="weights")
    assert torch.equal(found, torch.tensor([[1.0, -3.0, 4.0]]))
    found, _ = merge("ties", own, density=1.0, elect="plain")  # +, +, +: the second agrees in its own sign only
    assert torch.equal(found, torch.tensor([[0.5, (0.5 - 6.0) / 2, 2.0]]))
    found, _ = merge("emr_unified", own)
    assert torch.equal(found, torch.tensor([[2.0, -6.0, 2.0]]))


@pytest.mark.parametrize("rule", ["ties", "magnitude_prune", "breadcrumbs"])
def test_a_models_density_is_of_all_its_layers_together(rule: str) -> None:
    files = [file(1), file(2)]
    for k, one in enumerate(files):
        one.parts["unet.b"].tensors["up"].mul_(0.1 + k)
    asked = recipe(rule, 2, density=0.3, trim="model")
    source = engine(asked, files, [1.0, 1.0])
    thin: list[dict[str, Tensor]] = []
    for k in range(2):
        own = [source.layer(name).changes[k] for name in source.names]
        whole = [t for c in own for t in (c.term.rows(0, c.term.shape[0]), c.bias) if t is not None]
        total = sum(t.numel() for t in whole)
        drop = int(0.01 * total) if rule == "breadcrumbs" else 0
        masks = kept_by_sort(whole, drop + int(0.3 * total))
        masks = [a & ~b for a, b in zip(masks, kept_by_sort(whole, drop), strict=True)]
        keys = [
            key for n, c in zip(source.names, own, strict=True) for key in (n, f"{n}.bias")[: 1 + (c.bias is not None)]
        ]
        thin.append({key: t * m for key, t, m in zip(keys, whole, masks, strict=True)})
    found = results(asked, files, [1.0, 1.0])
    for name, t in found.items():
        a, b = thin[0][name], thin[1][name]
        if rule == "ties":
            sign = torch.where(a + b >= 0, 1.0, -1.0)
            agree = [(x * sign > 0).float() for x in (a, b)]
            wanted = (a * agree[0] + b * agree[1]) / (agree[0] + agree[1]).clamp(min=1)
        else:
            wanted = a + b
        torch.testing.assert_close(t, wanted, rtol=1e-6, atol=0)
    apart = results(recipe(rule, 2, density=0.3), files, [1.0, 1.0])
    assert not torch.equal(apart["unet.b"], found["unet.b"])


def test_dare_is_what_it_was_in_expectation() -> None:
    a, b = changes(2, 6, 9)
    own = layer([Dense(a), Dense(b)], [0.7, -1.2], [a[:, 0], None])
    for rule, least in (("dare_linear", 0.4), ("della_linear", 0.2)):
        options = {"epsilon": 0.2} if rule == "della_linear" else {}
        seeds = 1500
        found = [merge(rule, own, seed, density=0.4, **options) for seed in range(seeds)]
        mean = torch.stack([t for t, _ in found]).double().mean(0)
        deviation = ((1 / least - 1) * ((0.7 * a) ** 2 + (1.2 * b) ** 2) / seeds).sqrt()
        assert bool(((mean - (0.7 * a - 1.2 * b)).abs() < 4.5 * deviation + 1e-6).all())
        bias = torch.stack([v for _, v in found if v is not None]).double().mean(0)
        assert bool(
            ((bias - 0.7 * a[:, 0]).abs() < 4.5 * (1 / least - 1) ** 0.5 * 0.7 * a[:, 0].abs() / seeds**0.5).all()
        )
        assert len({tuple(t.flatten().tolist()) for t, _ in found[:50]}) == 50  # each seed is another


def test_dellas_chances_grow_with_the_rank_in_a_row() -> None:
    own, seeds = changes(1, 4, 5)[0], 1500
    found = [merge("della_linear", layer([Dense(own)], [1.0]), s, density=0.5, epsilon=0.3)[0] for s in range(seeds)]
    often = torch.stack([t != 0 for t in found]).double().mean(0)
    ranks = own.abs().argsort(1).argsort(1)
    assert bool(((often - (0.2 + 0.6 * ranks / 4)).abs() < 4.5 * (0.25 / seeds) ** 0.5).all())
    scaled, _ = merge("della_linear", layer([Dense(own)], [1.0]), density=0.5, epsilon=0.3, rescale="none")
    torch.testing.assert_close(found[0], scaled / (0.2 + 0.6 * ranks / 4), rtol=1e-6, atol=0)


def test_l1_brings_back_the_sum_of_magnitudes() -> None:
    own = changes(1, 30, 40)[0]
    found, _ = merge("dare_linear", layer([Dense(own)], [1.0]), density=0.3, rescale="l1")
    assert float(found.abs().sum()) == pytest.approx(float(own.abs().sum()), rel=1e-6)
    assert 0.25 < float((found != 0).float().mean()) < 0.35


@pytest.mark.parametrize("rule", NAMES)
def test_bytes_depend_neither_on_threads_nor_order_nor_tiles(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of tiles: of what is no product of matrices. A product's tile has one size, for BLAS may round it otherwise."""
    files = [file(1), file(2), file(3)]
    extra: dict[str, Any] = {"trim": "model"} if "trim" in row(rule).options else {}
    asked = recipe(rule, 3, 11, **extra)
    wanted = results(asked, files, WEIGHTS)
    order = [2, 0, 1]
    moved = results(asked, [files[k] for k in order], [WEIGHTS[k] for k in order])
    assert all(torch.equal(moved[name], t) for name, t in wanted.items())
    other = results(recipe(rule, 3, 12, **extra), files, WEIGHTS)
    chance = rule.startswith(("dare", "della"))
    assert all(torch.equal(other[name], t) != chance for name, t in wanted.items())
    found: list[dict[str, Tensor]] = []
    monkeypatch.setattr(tiles, "_ELEMENTS", 64)
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(results(asked, files, WEIGHTS))
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(found[0][name], found[1][name]) for name in wanted)
    for name in ("unet.c", "unet.d", "unet.d.bias", "unet.e", "unet.e.bias"):
        if not extra:  # a model's thresholds see all its layers
            assert torch.equal(found[0][name], wanted[name]), name


def test_an_adapter_given_twice_has_one_mask() -> None:
    found = results(recipe("dare_linear", 2), [file(1), file(1)], [0.5, 0.25])
    once = results(recipe("dare_linear", 1), [file(1)], [0.75])
    for name, t in found.items():
        torch.testing.assert_close(t, once[name], rtol=3e-7, atol=0)


@pytest.mark.parametrize("rule", ["ties", "dare_ties"])
def test_a_fused_layer_is_thinned_out_as_its_layers_are(rule: str) -> None:
    """The format of the result changes nothing in it."""
    g = torch.Generator().manual_seed(0)

    def made(names: Sequence[str]) -> AdapterFile:
        parts = {
            n: Part(
                LoRA(rank=2, alpha=1.0),
                {"up": torch.randn(3072, 2, generator=g), "down": torch.randn(2, 3072, generator=g)},
            )
            for n in names
        }
        return AdapterFile(parts, {}, "kohya", "flux")

    files = [made(QKV), made(QKV[:2])]
    rows: list[dict[str, Tensor]] = []
    for form in ("kohya", "diffusers"):
        asked = MergeRecipe((Entry("a"), Entry("b")), rule, {"density": 0.4}, format=form, whole=True)
        out, report = combine_inputs(asked, [in_memory(f, str(k), lambda _: 0.8) for k, f in enumerate(files)])
        assert len(report.rows) == (1 if form == "kohya" else 3)
        rows.append({name: part.tensors["diff"] for name, part in out.parts.items()})
    assert sorted(rows[0]) == sorted(QKV)
    assert all(torch.equal(rows[0][name], rows[1][name]) for name in QKV)
    assert 0.3 < float((rows[0][QKV[2]] != 0).float().mean()) < 0.5


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("ties", {"density": 0}, "density is 0"),
    ("ties", {"density": 1.1}, "density is 1.1"),
    ("ties", {"density": float("nan")}, "density is nan"),
    ("ties", {"epsilon": 0.1}, "has no option 'epsilon'"),
    ("ties", {"elect": "mergekit"}, "plain"),
    ("della", {"density": 0.1}, "epsilon must be below 0.1"),
    ("della", {"density": 1.0, "epsilon": 0.1}, "epsilon must be 0"),
    ("breadcrumbs", {"density": 0.995}, "gamma can be 0.005 at most"),
]


@pytest.mark.parametrize(("name", "options", "said"), REFUSED)
def test_options_out_of_range_are_refused(name: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        recipe(name, **options)


@pytest.mark.parametrize("rule", NAMES)
def test_what_is_not_finite_is_an_error_that_names_it(rule: str) -> None:
    for name, key, value in (("unet.d", "diff", float("nan")), ("unet.a", "bias", float("inf"))):
        broken = file(1)
        broken.parts[name].tensors[key].view(-1)[3] = value
        with pytest.raises(StateError, match=rf"{name}: .*0 has NaN"):
            list(engine(recipe(rule, 2), [broken, file(2)], [1.0, 1.0]).merged([name]))


@pytest.mark.parametrize("rule", NAMES)
def test_nothing_is_made_of_zeros(rule: str) -> None:
    extras: list[dict[str, Any]] = [{}, {"rescale": "l1"}] if "rescale" in row(rule).options else [{}]
    for extra in extras:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = results(recipe(rule, 2, **extra), [file(1, scale=0.0), file(2, scale=0.0)], [1.0, -1.0])
        assert len(found) == 8
        assert all(bool((t == 0).all()) for t in found.values())


class Alive(TorchDispatchMode):
    """The most storages of a size that live at one time."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least, self.most, self.seen = least, 0, list[weakref.ref[Tensor]]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for t in made if isinstance(made, tuple | list) else [made]:
            if isinstance(t, Tensor) and t.untyped_storage().nbytes() >= self.least:
                self.seen.append(weakref.ref(t))
        alive = [t for t in (ref() for ref in self.seen) if t is not None]
        self.seen = [ref for ref in self.seen if ref() is not None]
        self.most = max(self.most, len({t.untyped_storage().data_ptr() for t in alive}))
        return made


@pytest.mark.parametrize("rule", ["ties", "dare_ties", "della", "breadcrumbs"])
def test_no_more_than_one_dense_matrix_lives(rule: str) -> None:
    g = torch.Generator().manual_seed(0)

    def made() -> AdapterFile:
        parts = {
            f"unet.{k}": Part(
                LoRA(rank=4, alpha=2.0),
                {"up": torch.randn(1280, 4, generator=g), "down": torch.randn(4, 2560, generator=g)},
            )
            for k in range(3)
        }
        return AdapterFile(parts, {}, "kohya", None)

    files = [made(), made()]
    trim: dict[str, Any] = {"trim": "model"} if rule == "ties" else {}
    for run in (lambda e: list(e.cut(lambda _: 8)), _one_by_one):  # pyright: ignore[reportUnknownLambdaType] # an engine
        own = engine(recipe(rule, 2, **trim), files, [1.0, 0.5])
        with Alive(1280 * 2560 * 4 // 2) as alive:
            run(own)
        assert alive.most == 1


def _one_by_one(own: Engine) -> None:
    for made in own.merged():
        assert made.norm > 0
        del made


@pytest.mark.parametrize("shape", [(200, 320), (320, 200)])
def test_a_dense_result_is_cut_to_a_rank_within_a_hundredth_of_the_best(shape: tuple[int, int]) -> None:
    g = torch.Generator().manual_seed(0)
    pairs = [Pair(torch.randn(shape[0], 8, generator=g), torch.randn(8, shape[1], generator=g)) for _ in range(2)]
    dense, _ = merge("ties", layer(pairs, [1.0, 0.7]), density=0.3)
    values = torch.linalg.svdvals(dense.double())
    for rank in (8, 16, 32):
        found = spectrum([Dense(dense)], rank)
        best = float((values[rank:].square().sum() / values.square().sum()).sqrt())
        made = found.truncated(rank)
        true = float((dense.double() - made.up.double() @ made.down.double()).norm() / dense.double().norm())
        assert found.residual(rank) == pytest.approx(true, rel=1e-4)
        assert best <= true * (1 + 1e-6) <= best * 1.01
    for rank in (150, None):  # exactly
        found = spectrum([Dense(dense.bfloat16(), -0.5)], rank)
        whole = dense.bfloat16().double() * -0.5
        torch.testing.assert_close(found.values, torch.linalg.svdvals(whole), rtol=1e-6, atol=1e-6)
        made, count = found.truncated(150), 150
        u, s, vt = torch.linalg.svd(whole, full_matrices=False)
        torch.testing.assert_close(
            made.up.double() @ made.down.double(), (u[:, :count] * s[:count]) @ vt[:count], rtol=0, atol=1e-4
        )
    bare = spectrum([Dense(dense)], vectors=False)
    torch.testing.assert_close(bare.values, values, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dense", [torch.zeros(40, 60), torch.outer(torch.arange(1.0, 41), torch.ones(60))])
def test_values_of_a_dense_change_of_rank_none_and_one(dense: Tensor) -> None:
    found = spectrum([Dense(dense)], 30)
    made = found.truncated(30)
    torch.testing.assert_close(made.up @ made.down, dense, rtol=1e-5, atol=1e-5)
    assert found.residual(1) < 1e-6


def test_budgets_hold_for_dense_results() -> None:
    files = [file(1), file(2)]
    whole = results(recipe("ties", 2), files, WEIGHTS[:2])
    for error in (0.5, 0.2):
        asked = MergeRecipe((Entry("a"), Entry("b")), "ties", error=error)
        out, report = combine_inputs(
            asked, [in_memory(f, str(k), lambda _, k=k: WEIGHTS[k]) for k, f in enumerate(files)]
        )
        left = total = 0.0
        for name in ("unet.a", "unet.b", "unet.c", "unet.d"):
            part, t = out.parts.get(name), whole[name].double()
            kept = torch.zeros_like(t)
            if part is not None:
                kept = (
                    part.tensors["up"].double().flatten(1)
                    @ part.tensors["down"].double().flatten(1)
                    * part.method.scale
                )
            left, total = left + float((t - kept).square().sum()), total + float(t.square().sum())
        total += float(whole["unet.e"].square().sum())
        assert error * 0.8 < (left / total) ** 0.5 <= error * (1 + 1e-5)
        assert report.residual == pytest.approx((left / total) ** 0.5, rel=1e-4)


def test_threads_change_no_bit_of_a_factorisation() -> None:
    dense = changes(1, 700, 900)[0]
    for rank in (16, None):
        one, two = (spectrum([Dense(dense)], rank, workers=k) for k in (1, 2))
        assert torch.equal(one.values, two.values)
        assert torch.equal(one.truncated(16).up, two.truncated(16).up)
