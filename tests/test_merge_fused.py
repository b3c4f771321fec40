"""What a tool's files have as one layer is merged as one: its rank is the one asked for, not three times that."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from imgadapt import AdapterFile, LoKr, LoRA, load, save
from imgadapt.arch import Slice
from imgadapt.combining.combine import combine_inputs, in_memory
from imgadapt.combining.entering import Change
from imgadapt.combining.fused import over, split, stacked
from imgadapt.combining.lowrank import spectrum
from imgadapt.combining.recipe import Entry, MergeRecipe
from imgadapt.combining.terms import Dense, Kron, Pair
from imgadapt.formats import Part
from imgadapt.sites import Site

QKV = [f"transformer.transformer_blocks.0.attn.to_{x}" for x in "qkv"]
KEY = "lora_unet_double_blocks_0_img_attn_qkv"


def flux(seed: int, rank: int, layers: list[str], alpha: float = 2.0) -> AdapterFile:
    """With one `down` for all layers, as files of the model's own naming have it."""
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, 3072, generator=generator) * 0.1
    parts = {
        name: Part(
            LoRA(rank=rank, alpha=alpha), {"up": torch.randn(3072, rank, generator=generator) * 0.1, "down": down}
        )
        for name in layers
    }
    return AdapterFile(parts, {}, "kohya", "flux")


def delta(file: AdapterFile, name: str, rows: slice) -> Tensor:
    part = file.parts[name]
    return part.method.scale * (part.tensors["up"][rows].double() @ part.tensors["down"].double())


@pytest.mark.parametrize("form", ["kohya", "diffusers"])
def test_a_fused_layer_keeps_the_rank_asked_for(tmp_path: Path, form: str) -> None:
    files = [flux(1, 4, QKV), flux(2, 3, QKV[:2])]  # the second has no v
    recipe = MergeRecipe((Entry("a"), Entry("b")), "svd", rank=7, format=form)
    made, report = combine_inputs(
        recipe, [in_memory(files[0], "a", lambda _: 0.8), in_memory(files[1], "b", lambda _: -1.5)]
    )
    assert len(report.rows) == (1 if form == "kohya" else 3)
    path = save(made, tmp_path / "c.safetensors", format=form)
    with safe_open(path, "pt") as opened:
        shapes = {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118
    if form == "kohya":
        assert shapes[f"{KEY}.lora_down.weight"] == (7, 3072)
        assert shapes[f"{KEY}.lora_up.weight"] == (9216, 7)
    again, rows = load(path), slice(100, 140)
    for name in QKV:
        wanted = 0.8 * delta(files[0], name, rows)
        if name in files[1].parts:
            wanted = wanted - 1.5 * delta(files[1], name, rows)
        found = delta(again, name, rows)
        assert (found - wanted).norm() < 1e-5 * wanted.norm()


def test_layers_of_unlike_weights_are_merged_apart() -> None:
    file = flux(1, 4, QKV)
    weight = {QKV[0]: 1.0, QKV[1]: 1.0, QKV[2]: 0.0}
    recipe = MergeRecipe((Entry("a"),), "svd", rank=2, format="kohya")
    made, report = combine_inputs(recipe, [in_memory(file, "a", weight.__getitem__)])
    assert set(made.parts) == set(QKV[:2])
    assert report.skipped == [QKV[2]]
    weight[QKV[1]] = 0.5
    made, report = combine_inputs(recipe, [in_memory(file, "a", lambda name: weight[name] or 1.0)])
    assert [row.layer for row in report.rows] == sorted(QKV)


def test_a_stack_is_its_layers_one_above_the_other() -> None:
    torch.manual_seed(0)
    sites = [Site((6, 10)), Site((4, 10)), Site((5, 10))]
    pair, kron = Pair(torch.randn(6, 2), torch.randn(2, 10)), Kron(torch.randn(2, 5), torch.randn(2, 2))
    dense = Dense(torch.randn(5, 10), 0.5)
    for terms in ([pair, kron, None], [pair, None, dense], [None, kron, None]):
        changes = [None if term is None else Change(term) for term in terms]
        made = stacked(changes, sites)
        wanted = torch.cat(
            [torch.zeros(s.rows, 10) if t is None else t.rows(0, s.rows) for t, s in zip(terms, sites, strict=True)]
        )
        torch.testing.assert_close(made.term.rows(0, 15), wanted)
        assert over(sites).shape == (15, 10)
    bias = stacked([Change(pair, torch.ones(6)), None, Change(dense)], sites).bias
    assert bias is not None
    assert bias.tolist() == [1.0] * 6 + [0.0] * 9


def test_a_shared_down_is_found_and_stays_shared() -> None:
    torch.manual_seed(0)
    down = torch.randn(3, 10)
    changes = [Change(Pair(torch.randn(n, 3), down)) for n in (6, 4)]
    made = stacked(changes, [Site((6, 10)), Site((4, 10))]).term
    assert isinstance(made, Pair)
    assert made.up.shape == (10, 3)  # not a block diagonal of rank 6
    cut = spectrum([made], 2).truncated(2)
    rows = split([cut], torch.arange(10.0), [Slice("a", 0, 0, 6), Slice("b", 0, 6, 4)])
    (a,), (b,) = rows["a"][0], rows["b"][0]
    assert isinstance(a, Pair)
    assert isinstance(b, Pair)
    assert a.down is b.down
    torch.testing.assert_close(torch.cat([a.rows(0, 6), b.rows(0, 4)]), cut.rows(0, 10))
    assert rows["b"][1] is not None
    assert rows["b"][1].tolist() == [6.0, 7.0, 8.0, 9.0]


def test_a_full_kronecker_product_enters_a_fused_layer_exactly() -> None:
    torch.manual_seed(0)
    name = QKV[0]
    part = Part(LoKr(rank=None, factor=4), {"w1": torch.randn(4, 4), "w2": torch.randn(768, 768) * 0.01})
    files = [AdapterFile({name: part}, {}, "lycoris", "flux"), flux(3, 2, QKV)]
    recipe = MergeRecipe((Entry("a"), Entry("b")), format="kohya")
    made, _ = combine_inputs(recipe, [in_memory(files[0], "a", lambda _: 1.0), in_memory(files[1], "b", lambda _: 1.0)])
    own, w = made.parts[name], part.tensors
    rows = slice(760, 800)
    wanted = delta(files[1], name, rows) + torch.kron(w["w1"], w["w2"])[rows].double()
    found = own.tensors["diff"][rows].double() if "diff" in own.tensors else delta(made, name, rows)
    assert (found - wanted).norm() < 1e-5 * wanted.norm()
