"""How much of a merge is kept: ranks by error, energy and size, of one layer and of the whole."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from imgadapt import AdapterFile, LoHa, LoRA, save
from imgadapt.combining.combine import combine_inputs
from imgadapt.combining.engine import Input, whole
from imgadapt.combining.files import read_input
from imgadapt.combining.ranks import Choice, rank_of, ranks_for
from imgadapt.combining.recipe import Entry, MergeRecipe
from imgadapt.sites import Site
from tests.changes import (
    dense,
    engine,
    file,
    lora,
    near,
    part,
    random,
)

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
@pytest.mark.parametrize("budget", [{"error": 0.4}, {"energy": 0.7}, {"size": 0.0032}, {"rank": 3}])
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
        path = save(made, tmp_path / "made.safetensors", format="imgadapt", dtype=torch.float16)
        assert 0.0032e6 / 2 < path.stat().st_size <= 0.0032e6


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


@pytest.mark.parametrize("form", ["kohya", "diffusers", "imgadapt"])
def test_a_size_is_used_up(tmp_path: Path, form: str) -> None:
    """What names of layers take counts only where a layer stays."""
    names = [f"unet.down_blocks.0.attentions.0.transformer_blocks.0.attn{a}.to_{x}" for a in (1, 2) for x in "qkv"]
    own = file(*(part(LoRA(24, 2.0), seed=k) for k in range(6)), names=names)
    inputs = [Input("0", own, "0", lambda _: 1.0)]
    for size in (0.008, 0.016):
        made, _ = combine_inputs(MergeRecipe((Entry("0"),), "svd", size=size, format=form), inputs)
        path = save(made, tmp_path / "a.safetensors", format=form)
        assert size * 1e6 - 3500 < path.stat().st_size <= size * 1e6
