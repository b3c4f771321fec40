"""Each merging rule against its own formula, on whole matrices in fp64, and against what other tools give."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from imgadapt import Full, LoHa, LoRA, Norm
from imgadapt.combining.engine import truncated, whole
from imgadapt.combining.rules.corespace import canonical, frame
from imgadapt.combining.terms import Pair
from imgadapt.errors import ConfigError
from imgadapt.sites import Site
from tests.changes import (
    CONV,
    LINEAR,
    METHODS,
    NORM,
    Model,
    dense,
    engine,
    file,
    lora,
    merged,
    near,
    part,
)

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
