"""OFT and BOFT merged as rotations: as matrices they are what the rule says, and so are the weights that they turn."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from imgadapt import AdapterFile, load, save
from imgadapt.arch import Slice
from imgadapt.combining.combine import combine_inputs, in_memory
from imgadapt.combining.cutting import whole
from imgadapt.combining.engine import Engine
from imgadapt.combining.recipe import Entry, MergeRecipe
from imgadapt.combining.report import Report
from imgadapt.combining.rules import orthogonal
from imgadapt.errors import ConfigError, ShapeError, StateError
from imgadapt.formats import Part
from imgadapt.methods import BOFT, OFT, LoRA, Method, Norm
from imgadapt.methods.rotation import cayley, skew
from imgadapt.sites import Site

TO_Q = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"  # 320 x 320 of SD1
CONV = "unet.conv_in"  # 320 x 4 x 3 x 3
SHAPES = {TO_Q: (320, 320), CONV: (320, 4, 3, 3), "net.layer": (24, 72)}
MEANS = ("polar", "geodesic", "ortho")
OFTS: list[Any] = [OFT(8), OFT(8, rescaled=True), OFT(8, "input"), OFT(6, "input", rescaled=True)]
BOFTS: list[Any] = [BOFT(4, 2), BOFT(4, 2, "input", rescaled=True), BOFT(2, 3, rescaled=True)]


def made(method: Method, seed: int, name: str = "net.layer", size: float = 0.1, dtype: Any = torch.float32) -> Part:
    generator = torch.Generator().manual_seed(seed)
    site = Site(SHAPES[name], "conv" if len(SHAPES[name]) > 2 else "linear")
    method = method.at(site)
    return Part(
        method,
        {
            key: ((1 if key == "rescale" else 0) + size * torch.randn(shape, generator=generator)).to(dtype)
            for key, shape in method.shapes(site).items()
        },
    )


def merged(
    rule: str, parts: Sequence[Part | None], weights: Sequence[float], name: str = "net.layer", **options: Any
) -> tuple[AdapterFile, Report]:
    table = "sd1" if name.startswith("unet.") else None
    inputs = [
        in_memory(
            AdapterFile({} if part is None else {name: part}, {}, None, table), f"{k}.safetensors", lambda _, w=w: w
        )
        for k, (part, w) in enumerate(zip(parts, weights, strict=True))
    ]
    recipe = MergeRecipe(tuple(Entry(i.name) for i in inputs), rule, options)
    return combine_inputs(recipe, inputs)


def matrix(part: Part, name: str = "net.layer", *, rescaled: bool = True) -> Tensor:
    """The whole rotation by what the method does to a weight of the identity, fp64."""
    method: Any = part.method
    t = {key: tensor.double() for key, tensor in part.tensors.items()}
    shape = SHAPES[name]
    size = shape[0] if method.side == "output" else math.prod(shape[1:])
    eye = torch.eye(size, dtype=torch.float64)
    if method.rescaled and (method.side == "input" or not rescaled):
        t.pop("rescale")
    out = (
        method.delta({k: v.reshape(-1, 1) if k == "rescale" else v for k, v in t.items()}, Site((size, size)), eye)
        + eye
    )
    return out if method.side == "output" else out.t()


def weights_of(part: Part, weight: Tensor) -> Tensor:
    t = {key: tensor.to(weight.dtype) for key, tensor in part.tensors.items()}
    return weight + part.method.delta(t, Site(tuple(weight.shape), "conv" if weight.ndim > 2 else "linear"), weight)


def rotation(size: int, seed: int, scale: float = 0.3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return cayley(skew(scale * torch.randn(3, size, size, generator=generator, dtype=torch.float64)))


def far(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


# the group


def test_powers_go_along_the_geodesic() -> None:
    r = rotation(5, 1)
    eye = torch.eye(5, dtype=torch.float64)
    half = orthogonal.power(r, 0.5)
    assert far(half @ half, r) < 1e-13
    assert far(orthogonal.power(r, -0.3) @ orthogonal.power(r, 1.3), r) < 1e-13
    assert far(orthogonal.power(r, -1) @ r, eye.expand_as(r)) < 1e-13
    assert far(torch.matrix_exp(orthogonal.logarithm(r)), r) < 1e-13
    assert far(cayley(orthogonal.uncayley(r)), r) < 1e-13
    q = orthogonal.uncayley(r)
    assert far(cayley(q / 2), half) > 0.01  # half of Cayley's Q is not half of the way


def test_the_polar_mean_of_two_is_the_middle_of_the_geodesic() -> None:
    a, b = rotation(6, 1), rotation(6, 2)
    equal, options = torch.tensor([0.7, 0.7], dtype=torch.float64), {"strength": 1.0}
    middle = a @ orthogonal.power(a.transpose(1, 2) @ b, 0.5)
    assert far(orthogonal.chordal_mean([a, b], equal, options), middle) < 1e-10
    assert far(orthogonal.geodesic_mean([a, b], equal, options), middle) < 1e-10
    third = a @ orthogonal.power(a.transpose(1, 2) @ b, 0.25)
    unequal = torch.tensor([3.0, 1.0], dtype=torch.float64)
    assert far(orthogonal.geodesic_mean([a, b], unequal, options), third) < 1e-10
    assert far(orthogonal.chordal_mean([a, b], unequal, options), third) > 1e-3  # they differ there


def test_orthomerge_is_its_formula() -> None:
    """Qs of three, by the paper's formula, through numpy-free arithmetic on whole matrices."""
    qs = [
        skew(0.2 * torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(k), dtype=torch.float64))
        for k in (1, 2, 3)
    ]
    lengths = sum(float(q.pow(2).sum()) ** 0.5 for q in qs)
    total = qs[0] + qs[1] + qs[2]
    wanted = lengths / float(total.pow(2).sum()) ** 0.5 / 3 * total
    got = orthogonal.lie_mean([cayley(q) for q in qs], torch.ones(3, dtype=torch.float64), {"strength": 1.0})
    eye = torch.eye(4, dtype=torch.float64)
    assert far(got, (eye - wanted) @ torch.linalg.inv(eye + wanted)) < 1e-13


def test_half_turns_and_what_has_no_middle_are_refused() -> None:
    half = torch.eye(4, dtype=torch.float64)[None].clone()
    half[0, 0, 0] = half[0, 1, 1] = -1
    with pytest.raises(StateError, match="180 degrees"):
        orthogonal.uncayley(half)
    a = rotation(4, 1)
    two, options = torch.ones(2, dtype=torch.float64), {"strength": 1.0}
    with pytest.raises(StateError, match="opposite ways"):
        orthogonal.chordal_mean([a, a @ half], two, options)
    quarter = made(OFT(2), 1)
    quarter.tensors["blocks"].zero_()
    quarter.tensors["blocks"][0, 0, 1] = 1.0  # Q = 1: 90 degrees
    with pytest.raises(StateError, match=r"net.layer: .*180 degrees"):
        merged("compose", [quarter, quarter], [1, 1])
    with pytest.raises(StateError, match="cancel"):
        merged("ortho", [a_part := made(OFT(8), 1), a_part], [1, -1])


# rules on parts


@pytest.mark.parametrize("method", [*OFTS, *BOFTS])
@pytest.mark.parametrize("rule", ["compose", *MEANS])
def test_one_adapter_at_weight_1_is_itself(method: Method, rule: str) -> None:
    part = made(method, 3)
    file, report = merged(rule, [part], [1])
    assert file.parts["net.layer"] is part
    assert report.rows[0].residual == 0
    assert report.rows[0].norm == pytest.approx(
        float(torch.linalg.vector_norm(matrix(part) - torch.eye(len(matrix(part)))))
    )


@pytest.mark.parametrize("method", [OFT(8), OFT(6, "input")])
@pytest.mark.parametrize("rule", ["compose", *MEANS])
def test_what_comes_out_is_a_rotation(method: Method, rule: str) -> None:
    file, _ = merged(rule, [made(method, 1), made(method, 2), made(method, 3)], [0.8, -0.3, 1.4])
    r = matrix(file.parts["net.layer"])
    assert far(r @ r.t(), torch.eye(len(r), dtype=torch.float64)) < 1e-12
    assert far(r, torch.eye(len(r), dtype=torch.float64)) > 0.05


@pytest.mark.parametrize("method", OFTS[:1] + OFTS[2:])
def test_compose_is_the_product_on_a_weight(method: Any) -> None:
    """W -> R1 (R2 W), or (W R2t) R1t, as attaching the second, baking it and attaching the first."""
    a, b, weight = (
        made(method, 1),
        made(method, 2),
        torch.randn(24, 72, generator=torch.Generator().manual_seed(5)).double(),
    )
    file, report = merged("compose", [a, b], [1, 1])
    wanted = weights_of(a, weights_of(b, weight))
    assert far(weights_of(file.parts["net.layer"], weight), wanted) < 2e-6
    other, _ = merged("compose", [b, a], [1, 1])
    assert far(weights_of(other.parts["net.layer"], weight), weights_of(b, weights_of(a, weight))) < 2e-6
    assert far(weights_of(other.parts["net.layer"], weight), wanted) > 0.1
    assert report.rows[0].residual < 1e-12
    assert report.inputs == ["0.safetensors", "1.safetensors"]


def test_compose_of_convolutions_in_bf16_equals_lycoris() -> None:
    """The merged blocks, put into LyCORIS' module, change the weight as its two modules do one after another."""
    lycoris: Any = pytest.importorskip("lycoris.modules.diag_oft")
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 320, 3)
    parts = [made(OFT(16, constraint=c), k, CONV, 0.05, torch.bfloat16) for k, c in ((1, None), (2, 0.001))]
    file, _ = merged("compose", parts, [1, 1], CONV)

    def theirs(part: Part, weight: Tensor) -> Tensor:
        base = nn.Conv2d(4, 320, 3)
        base.weight.data = weight.clone()
        method: Any = part.method
        limit = method.constraint or 0
        module = lycoris.DiagOFTModule("x", base, 1.0, lora_dim=20, constraint=limit)
        assert module.oft_blocks.shape == part.tensors["blocks"].shape
        module.oft_blocks.data = part.tensors["blocks"].float()
        return weight + module.get_diff_weight()[0].detach().reshape(weight.shape)

    wanted = theirs(parts[0], theirs(parts[1], conv.weight.data))
    got = theirs(file.parts[CONV], conv.weight.data)
    assert got.shape == wanted.shape
    assert far(got, wanted) < 1e-5
    assert far(got, conv.weight.data) > 0.05


@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("rule", MEANS)
def test_means_are_between_and_do_not_mind_the_order(side: Any, rule: str) -> None:
    parts = [made(OFT(4, side), k) for k in (1, 2, 3)]
    file, report = merged(rule, parts, [1.0, 2.0, -0.5])
    other, _ = merged(rule, parts[::-1], [-0.5, 2.0, 1.0])
    one, two = file.parts["net.layer"], other.parts["net.layer"]
    assert all(torch.equal(one.tensors[k], two.tensors[k]) for k in one.tensors)
    scaled, _ = merged(rule, parts, [2.0, 4.0, -1.0])  # weights are shares
    assert far(matrix(scaled.parts["net.layer"]), matrix(one)) < 1e-6
    rs = [matrix(parts[0]), matrix(parts[1]), matrix(parts[2]).t()]
    if rule == "polar":
        left, _, right = torch.linalg.svd((rs[0] + 2 * rs[1] + 0.5 * rs[2]) / 3.5)
        assert far(matrix(one), left @ right) < 1e-6
    if rule == "geodesic":  # the logarithms towards all inputs balance
        logs = [_log(matrix(one).t() @ r) for r in rs]
        assert far((logs[0] + 2 * logs[1] + 0.5 * logs[2]) / 3.5, torch.zeros_like(logs[0])) < 1e-6
    assert report.rows[0].residual == 0


def _log(r: Tensor) -> Tensor:
    values, vectors = torch.linalg.eig(r)
    return (vectors @ torch.diag(values.log()) @ torch.linalg.inv(vectors)).real


@pytest.mark.parametrize("method", [OFT(8), OFT(6, "input")])
def test_weights_are_powers_and_a_negative_one_undoes(method: Method) -> None:
    part = made(method, 1)
    back, _ = merged("compose", [part], [-1])
    assert far(matrix(back.parts["net.layer"]), matrix(part).t()) < 1e-6
    half, _ = merged("compose", [part], [0.5])
    r = matrix(half.parts["net.layer"])
    assert far(r @ r, matrix(part)) < 1e-6
    strong, _ = merged("polar", [part], [1], strength=0.5)
    assert far(matrix(strong.parts["net.layer"]), r) < 1e-6
    straight = 0.5 * (matrix(part) + torch.eye(len(r)))  # what attach makes of strength 0.5
    assert far(r, straight) > 0.01


def test_an_input_without_the_layer_does_not_turn_it() -> None:
    part = made(OFT(8), 1)
    file, report = merged("compose", [None, part], [1, 1])
    assert file.parts["net.layer"] is part
    assert report.rows[0].who == (1,)
    mean, _ = merged("polar", [part, None], [1, 1])
    half, _ = merged("compose", [part], [0.5])
    assert far(matrix(mean.parts["net.layer"]), matrix(half.parts["net.layer"])) < 1e-6


def test_blocks_of_different_sizes_meet_in_common_ones() -> None:
    a, b = made(OFT(4), 1), made(OFT(6), 2)
    file, _ = merged("compose", [a, b], [1, 1])
    assert file.parts["net.layer"].method == OFT(12)
    assert far(matrix(file.parts["net.layer"]), matrix(a) @ matrix(b)) < 1e-6


def test_limits_are_worked_in() -> None:
    for method in (OFT(8, constraint=0.001), OFT(6, "input", constraint=0.1), BOFT(4, 2, constraint=0.002)):
        a, b = made(method, 1), made(method, 2)
        free: Any = replace(method, constraint=None)
        assert far(matrix(a), matrix(replace(a, method=free))) > 0.01
        file, _ = merged("compose", [a, b], [1, 1], butterfly="blocks")
        assert file.parts["net.layer"].method.constraint is None  # pyright: ignore[reportAttributeAccessIssue] # it is OFT
        assert far(matrix(file.parts["net.layer"]), matrix(a) @ matrix(b)) < 1e-6


def test_shared_blocks_stay_shared_until_another_is_not() -> None:
    a, b, c = (made(OFT(6, "input", shared=k < 3), k) for k in (1, 2, 3))
    file, _ = merged("compose", [a, b], [1, 1])
    assert file.parts["net.layer"].method == OFT(6, "input", shared=True)
    assert file.parts["net.layer"].tensors["packed"].shape == (1, 15)
    assert far(matrix(file.parts["net.layer"]), matrix(a) @ matrix(b)) < 1e-6
    file, _ = merged("compose", [a, c], [1, 1])
    assert file.parts["net.layer"].method == OFT(6, "input")
    assert far(matrix(file.parts["net.layer"]), matrix(a) @ matrix(c)) < 1e-6
    with pytest.raises(ShapeError, match="do not tell the layer's size"):
        merged("compose", [a, made(OFT(9, "input", shared=True), 4)], [1, 1])


def test_pefts_polynomials_become_the_nearest_rotations() -> None:
    part = made(OFT(6, "input", neumann=5), 1, size=0.15)
    r = matrix(part)
    assert far(r @ r.t(), torch.eye(72, dtype=torch.float64)) > 1e-3
    file, report = merged("compose", [part, None], [1, 1])
    assert file.parts["net.layer"] is part  # alone it stays as it is
    other = made(OFT(6, "input"), 2)
    file, report = merged("compose", [part, other], [1, 1])
    left, _, right = torch.linalg.svd(r)
    assert file.parts["net.layer"].method == OFT(6, "input")
    assert far(matrix(file.parts["net.layer"]), left @ right @ matrix(other)) < 1e-6
    moved, norm = float(torch.linalg.vector_norm(left @ right - r)), report.rows[0].norm
    assert report.rows[0].residual == pytest.approx(moved / norm, rel=1e-9)


def test_factors_of_outputs_multiply() -> None:
    a, b = made(OFT(6, "input", rescaled=True), 1), made(OFT(6, "input", rescaled=True), 2)
    weight = torch.randn(24, 72, generator=torch.Generator().manual_seed(5)).double()
    file, report = merged("compose", [a, b], [1, 1])
    assert far(weights_of(file.parts["net.layer"], weight), weights_of(a, weights_of(b, weight))) < 2e-6
    assert report.rows[0].residual == 0
    mean, _ = merged("polar", [a, b], [1, 3])
    wanted = a.tensors["rescale"].double() ** 0.25 * b.tensors["rescale"].double() ** 0.75
    assert far(mean.parts["net.layer"].tensors["rescale"].double(), wanted) < 1e-6
    a, b = made(OFT(8, rescaled=True), 1), made(OFT(8, rescaled=True), 2)  # of outputs they do not commute
    file, report = merged("compose", [a, b], [1, 1])
    got, wanted = matrix(file.parts["net.layer"]), matrix(a) @ matrix(b)
    norm = float(torch.linalg.vector_norm(got - torch.eye(24)))
    assert report.rows[0].residual == pytest.approx(float(torch.linalg.vector_norm(got - wanted)) / norm, rel=1e-4)
    assert 0.001 < report.rows[0].residual < 0.5
    a.tensors["rescale"][0] = -1
    with pytest.raises(StateError, match="not above 0"):
        merged("polar", [a, b], [1, 1])


@pytest.mark.parametrize("method", [BOFT(4, 2), BOFT(4, 2, "input"), BOFT(2, 3)])
def test_boft_factor_by_factor_says_how_far_it_is(method: Method) -> None:
    a, b = made(method, 1), made(method, 2)
    for rule in ("compose", "polar"):
        file, report = merged(rule, [a, b], [1, 1])
        part = file.parts["net.layer"]
        assert part.method == method
        if rule == "compose":
            wanted = matrix(a) @ matrix(b)
        else:
            left, _, right = torch.linalg.svd((matrix(a) + matrix(b)) / 2)
            wanted = left @ right
        norm = float(torch.linalg.vector_norm(matrix(part) - torch.eye(len(wanted))))
        distance = float(torch.linalg.vector_norm(matrix(part) - wanted)) / norm
        assert report.rows[0].residual == pytest.approx(distance, rel=1e-4)
        assert 0.005 < distance < 0.5
        exact, report = merged(rule, [a, b], [1, 1], butterfly="blocks")
        assert isinstance(exact.parts["net.layer"].method, OFT)
        assert far(matrix(exact.parts["net.layer"]), wanted) < 1e-6
        assert report.rows[0].residual == 0


@pytest.mark.parametrize("method", BOFTS)
def test_boft_is_oft_of_larger_blocks(method: Any) -> None:
    part = made(method, 1)
    file, _ = merged("compose", [part], [1], butterfly="blocks")
    own: Any = file.parts["net.layer"].method
    assert own == OFT(method.block_size * 2 ** (method.factors - 1), method.side, method.rescaled)
    weight = torch.randn(24, 72, generator=torch.Generator().manual_seed(5)).double()
    assert far(weights_of(file.parts["net.layer"], weight), weights_of(part, weight)) < 1e-6


def test_boft_and_oft_meet_as_blocks_only() -> None:
    a, b = made(BOFT(4, 2), 1), made(OFT(6), 2)
    with pytest.raises(ConfigError, match="butterfly='blocks'"):
        merged("compose", [a, b], [1, 1])
    with pytest.raises(ConfigError, match="butterfly='blocks'"):
        merged("compose", [a, made(BOFT(2, 3), 2)], [1, 1])
    file, _ = merged("compose", [a, b], [1, 1], butterfly="blocks")
    assert far(matrix(file.parts["net.layer"]), matrix(a) @ matrix(b)) < 1e-6


def test_what_cannot_be_merged_is_refused_with_the_remedy() -> None:
    with pytest.raises(
        ConfigError, match=r"net.layer: one rotates outputs \(LyCORIS, kohya\), another inputs \(peft\)"
    ):
        merged("polar", [made(OFT(4), 1), made(OFT(4, "input"), 2)], [1, 1])
    with pytest.raises(ConfigError, match=r"net.layer: an input has lora here"):
        merged("compose", [made(OFT(4), 1), made(LoRA(2), 2)], [1, 1])
    with pytest.raises(ConfigError, match=r"merges rotations \(OFT, BOFT\), and the inputs are lora"):
        merged("compose", [made(LoRA(2), 1), made(LoRA(2), 2)], [1, 1])
    with pytest.raises(ConfigError, match="no rank"):
        MergeRecipe((Entry("a"), Entry("b")), "polar", rank=4)
    with pytest.raises(ShapeError, match="for another base"):
        merged("compose", [replace(made(OFT(4), 1), shape=(320, 320))], [0.5], TO_Q)
    narrow, _ = merged("compose", [made(OFT(4), 1)], [0.5], TO_Q)  # of a model of other widths, as the embedded base
    assert narrow.parts[TO_Q].tensors["blocks"].shape == (6, 4, 4)
    broken = made(OFT(4), 1)
    broken.tensors["blocks"][0, 0, 1] = math.nan
    with pytest.raises(StateError, match=r"net.layer: blocks has NaN"):
        merged("polar", [made(OFT(4), 2), broken], [1, 1])


def test_what_is_no_rotation_beside_them_is_added_up() -> None:
    norms = [Part(Norm(bias=False), {"w_norm": torch.full((24,), float(k))}) for k in (1, 3)]
    files = [AdapterFile({"net.layer": made(OFT(4), k), "net.norm": norms[k]}) for k in (0, 1)]
    inputs = [
        in_memory(file, str(k), lambda _, w=w: w) for k, (file, w) in enumerate(zip(files, (0.5, 1.5), strict=True))
    ]
    for rule, wanted in (("compose", 0.5 + 4.5), ("polar", 0.25 + 2.25)):
        file, _ = combine_inputs(MergeRecipe((Entry("0"), Entry("1")), rule), inputs)
        assert torch.allclose(file.parts["net.norm"].tensors["w_norm"], torch.full((24,), wanted))


@pytest.mark.parametrize(
    ("method", "form"),
    [
        (OFT(8, rescaled=True), "lycoris"),
        (OFT(16, constraint=0.01), "lycoris"),
        (OFT(8, "input"), "peft"),
        (BOFT(4, 2), "lycoris"),
    ],
)
def test_a_merged_file_is_read_back_to_the_bit(tmp_path: Path, method: Method, form: str) -> None:
    files = [AdapterFile({TO_Q: made(method, k, TO_Q)}, {}, None, "sd1") for k in (1, 2)]
    inputs = [in_memory(file, "x", lambda _: 1.0) for file in files]
    file, _ = combine_inputs(MergeRecipe((Entry("0"), Entry("1")), "polar"), inputs)
    path = save(file, tmp_path / ("c" if form == "peft" else "c.safetensors"), format=form)
    again = load(path)
    assert again.parts.keys() == file.parts.keys()
    ours, theirs = file.parts[TO_Q], again.parts[TO_Q]
    assert theirs.method == ours.method
    assert all(torch.equal(theirs.tensors[k].reshape(t.shape), t) for k, t in ours.tensors.items())
    assert far(matrix(theirs, TO_Q), matrix(ours, TO_Q)) == 0


def test_a_fused_layer_that_is_turned_as_one_stays_so() -> None:
    fused = "transformer.transformer_blocks.0.attn.to_qkv"
    slices = tuple(Slice(f"transformer.transformer_blocks.0.attn.to_{x}", 0, 8 * k, 8) for k, x in enumerate("qkv"))
    parts = [replace(made(OFT(4), k), slices=slices) for k in (1, 2)]
    file, _ = merged("compose", parts, [1, 1], fused)
    assert file.parts[fused].slices == slices
    assert far(matrix(file.parts[fused]), matrix(parts[0]) @ matrix(parts[1])) < 1e-6
    with pytest.raises(ConfigError, match="split this fused layer in different ways"):
        merged("compose", [parts[0], replace(parts[1], slices=slices[:2])], [1, 1], fused)
    other = in_memory(AdapterFile({slices[0].layer: made(OFT(4), 3)}), "b", lambda _: 1.0)
    with pytest.raises(ConfigError, match=r"turns .*to_qkv as one, and another has .*to_q, which is part of it"):
        combine_inputs(
            MergeRecipe((Entry("a"), Entry("b")), "compose"),
            [in_memory(AdapterFile({fused: parts[0]}), "a", lambda _: 1.0), other],
        )


class Weights:
    """A base of one layer."""

    names = ("net.layer",)

    def __init__(self, weight: Tensor) -> None:
        self.value = weight

    def site(self, name: str) -> Site:
        return Site(tuple(self.value.shape))

    def weight(self, name: str) -> tuple[Tensor, Site]:
        return self.value, Site(tuple(self.value.shape))

    def bias(self, name: str) -> Tensor | None:
        return None


@pytest.mark.parametrize("method", [OFT(8), OFT(6, "input", rescaled=True), BOFT(4, 2)])
def test_with_the_base_the_terms_are_what_the_rotation_changes(method: Method) -> None:
    """For a checkpoint that it is baked into; the adapter is the same with and without it."""
    weight = torch.randn(24, 72, generator=torch.Generator().manual_seed(5))
    parts = [made(method, k) for k in (1, 2)]
    inputs = [in_memory(AdapterFile({"net.layer": part}), str(k), lambda _: 1.0) for k, part in enumerate(parts)]
    recipe = MergeRecipe((Entry("0"), Entry("1")), "polar")
    (layer,) = Engine(recipe, inputs, None, Weights(weight)).merged()
    file, _ = combine_inputs(recipe, inputs)
    part = file.parts["net.layer"]
    assert layer.part is not None
    assert all(torch.equal(layer.part.tensors[k], t) for k, t in part.tensors.items())
    assert far(whole(layer.terms), weights_of(part, weight) - weight) < 1e-5
    assert float(whole(layer.terms).norm()) > 1
