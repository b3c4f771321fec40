"""Resizing: each layer the best approximation of its rank, budgets met, and nothing lost."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from imgadapt import IA3, AdapterFile, DoRA, Full, LoHa, LoKr, LoRA, load, save
from imgadapt.combining.keep import Keep
from imgadapt.combining.resizing import resize
from imgadapt.embeddings import Embedding
from imgadapt.errors import ConfigError
from imgadapt.formats import Part
from imgadapt.methods import Method, Norm
from imgadapt.sites import Site

LINEAR, CONV = Site((24, 40), bias="bias"), Site((20, 12, 3, 3), "conv", bias="bias")
NAMES = {"unet.a.to_q": LINEAR, "unet.b.conv1": CONV, "text_encoder.c.fc1": Site((56, 24), bias="bias")}


def made(method: Method, site: Site, dtype: torch.dtype = torch.float32) -> Part:
    """With singular values that fall, as those of trained adapters do."""
    tensors = {key: torch.randn(shape) * 0.3 for key, shape in method.shapes(site).items()}
    for key, falls in {"down": 0, "up_1": 1, "w2_b": 0}.items():
        if key in tensors:
            n = tensors[key].shape[falls]
            shape = [n if k == falls else 1 for k in range(tensors[key].ndim)]
            tensors[key] *= (0.7 ** torch.arange(n)).reshape(shape)
    return Part(method, {key: t.to(dtype) for key, t in tensors.items()}, shape=site.shape)


def adapter(method: Method, dtype: torch.dtype = torch.float32) -> AdapterFile:
    return AdapterFile({name: made(method.at(site), site, dtype) for name, site in NAMES.items()}, {})


def delta(part: Part, site: Site) -> Tensor:
    t = {key: tensor.double() for key, tensor in part.tensors.items()}
    return part.method.scale * part.method.delta(t, site, None).flatten(1)


def best(whole: Tensor, rank: int) -> Tensor:
    u, s, vt = torch.linalg.svd(whole, full_matrices=False)
    return u[:, :rank] * s[:rank] @ vt[:rank]


METHODS: dict[str, Method] = {
    "lora": LoRA(rank=9, alpha=4),
    "rslora": LoRA(rank=9, alpha=4, rank_stabilised=True),
    "tucker": LoRA(rank=9, alpha=5, tucker=True),
    "bias": LoRA(rank=9, alpha=4, bias=True),
    "loha": LoHa(rank=3, alpha=2),
    "lokr": LoKr(rank=2, alpha=3, factor=4),
    "lokr full": LoKr(rank=None, factor=4),
    "full": Full(bias=True),
}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_becomes_the_truncation_of_its_change(name: str) -> None:
    file = adapter(METHODS[name])
    small, report = resize(file, Keep(rank=5, rank_conv=3))
    cut = total = 0.0
    for layer, site in NAMES.items():
        part, whole = small.parts[layer], delta(file.parts[layer], site)
        rank = 3 if site.kind == "conv" else 5
        assert part.method.name == "lora"
        assert part.method.file_rank == part.method.file_alpha == rank
        found = delta(part, site)
        assert (found - best(whole, rank)).norm() < 1e-5 * whole.norm()
        tail = torch.linalg.svdvals(whole)[rank:].norm()
        row = next(row for row in report.rows if row.layer == layer)
        assert row.residual == pytest.approx(float(tail / whole.norm()), rel=1e-4)
        cut, total = cut + float(tail) ** 2, total + float(whole.norm()) ** 2
        before = file.parts[layer].method.bias_delta(file.parts[layer].tensors)
        after = part.method.bias_delta(part.tensors)
        if before is not None:
            assert after is not None
            torch.testing.assert_close(after * part.method.scale, before * file.parts[layer].method.scale)
    assert report.residual == pytest.approx((cut / total) ** 0.5, rel=1e-4)


def test_the_dtype_stays() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        file = adapter(LoRA(rank=9, alpha=4), dtype)
        small, _ = resize(file, Keep(rank=6))
        for layer, site in NAMES.items():
            part, whole = small.parts[layer], delta(file.parts[layer], site)
            assert {t.dtype for t in part.tensors.values()} == {dtype}
            assert (delta(part, site) - best(whole, 6)).norm() < 0.02 * whole.norm()


def test_what_is_not_cut_stays_to_the_byte() -> None:
    norm = Part(Norm(bias=True), {"w_norm": torch.randn(24), "b_norm": torch.randn(24)}, shape=(24,))
    file = adapter(LoRA(rank=4, alpha=3))
    parts = {**file.parts, "unet.norm": norm, "unet.big": made(LoRA(rank=9, alpha=4), LINEAR)}
    words = {"<x>": Embedding("<x>", {"clip_l": torch.randn(2, 8)})}
    small, report = resize(AdapterFile(parts, {"modelspec.title": "a"}, embeddings=words), Keep(rank=4))
    assert {n for n in parts if small.parts[n] is parts[n]} == {*NAMES, "unet.norm"}
    assert sorted(report.kept) == sorted(NAMES)
    assert small.parts["unet.big"].method.file_rank == 4
    assert small.metadata["modelspec.title"] == "a"
    assert small.embeddings == words


@pytest.mark.parametrize("method", [LoRA(rank=9, alpha=4), Full(bias=False)], ids=["lora", "full"])
@pytest.mark.parametrize("error", [0.1, 0.3])
def test_an_error_of_the_whole_is_met_and_not_by_much(method: Method, error: float) -> None:
    file = adapter(method)
    small, report = resize(file, Keep(error=error))
    wholes = {n: delta(p, NAMES[n]) for n, p in file.parts.items()}
    zero = {n: torch.zeros_like(w) for n, w in wholes.items()}
    found = {n: delta(small.parts[n], NAMES[n]) if n in small.parts else zero[n] for n in wholes}
    left = sum(float((found[n] - wholes[n]).norm()) ** 2 for n in wholes)
    total = sum(float(w.norm()) ** 2 for w in wholes.values())
    assert (left / total) ** 0.5 <= error * (1 + 1e-6)
    assert report.residual <= error * (1 + 1e-6)
    if method.name == "lora":
        assert (left / total) ** 0.5 > 0.6 * error
        energy, _ = resize(file, Keep(energy=1 - error**2))
        assert {n: p.method for n, p in energy.parts.items()} == {n: p.method for n, p in small.parts.items()}


@pytest.mark.parametrize("megabytes", [0.004, 0.006])
def test_a_size_of_the_file_is_met(tmp_path: Path, megabytes: float) -> None:
    file = adapter(LoRA(rank=9, alpha=4), torch.float16)
    small, report = resize(file, Keep(size=megabytes))
    path = save(small, tmp_path / "small.safetensors", format="diffusers")
    assert path.stat().st_size <= megabytes * 1e6
    assert 0 < report.residual < 1


def test_a_size_that_is_too_small_says_what_there_is_anyway() -> None:
    with pytest.raises(ConfigError, match=r"size is 0\.0005 MB, and without any rank"):
        resize(adapter(LoRA(rank=9)), Keep(size=0.0005))


def test_no_more_than_the_highest_rank_is_given() -> None:
    small, report = resize(adapter(LoRA(rank=9, alpha=4)), Keep(error=0.001, most=4))
    assert {part.method.file_rank for part in small.parts.values()} == {4}
    assert any("rank 4 at most leaves out more than asked" in note for note in report.notes)
    small, _ = resize(adapter(LoRA(rank=9, alpha=4)), Keep(rule="ratio", bound=1e6, most=4))
    assert {part.method.file_rank for part in small.parts.values()} == {4}


VALUES = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.5])
RULES = {
    ("ratio", 4.0): 3, ("ratio", 3.9): 2, ("ratio", 1.0): 1, ("cumulative", 14 / 15.5): 3, ("cumulative", 0.91): 4,
    ("fro", (84 / 85.25) ** 0.5): 3, ("fro", 0.5): 1, ("threshold", 1.0): 4, ("threshold", 100.0): 1,
}  # fmt: skip


@pytest.mark.parametrize(("rule", "bound"), RULES)
def test_rules_of_layers_are_their_definitions(rule: str, bound: float) -> None:
    q, _ = torch.linalg.qr(torch.randn(24, 5))
    p, _ = torch.linalg.qr(torch.randn(40, 5))
    part = Part(LoRA(rank=5, alpha=2.5), {"up": q * VALUES * 2, "down": p.t()}, shape=LINEAR.shape)
    nudged = bound * (1 - 1e-5 if rule != "ratio" else 1 + 1e-5)
    small, _ = resize(
        AdapterFile({"unet.a.to_q": part}, {}), Keep(rule=rule, bound=max(nudged, 1.0 * (rule == "ratio")))
    )
    assert small.parts["unet.a.to_q"].method.file_rank == RULES[rule, bound]


def test_a_whole_difference_stays_where_factors_would_be_larger() -> None:
    file = adapter(Full(bias=True))
    small, report = resize(file, Keep(rank=15))  # 15 * (24 + 40) >= 24 * 40
    assert small.parts["unet.a.to_q"] is file.parts["unet.a.to_q"]
    assert small.parts["text_encoder.c.fc1"].method.file_rank == 15
    assert report.kept == ["unet.a.to_q"]


class Weights(nn.Module):
    """A base of one layer."""

    names = ("unet.a.to_q",)

    def site(self, name: str) -> Site:
        return LINEAR

    def weight(self, name: str) -> tuple[Tensor, Site]:
        return torch.linspace(-1, 1, 24 * 40).reshape(24, 40), LINEAR

    def bias(self, name: str) -> Tensor | None:
        return None


def test_what_reads_the_weights_is_refused_kept_or_worked_out() -> None:
    dora = made(DoRA(LoRA(rank=4, alpha=2)), LINEAR)
    weight, _ = (base := Weights()).weight("")
    norm = weight.norm(dim=1)
    dora = Part(dora.method, {**dora.tensors, "magnitude": norm * 1.1}, shape=LINEAR.shape)
    parts = {"unet.a.to_q": dora, "unet.b.conv1": made(LoRA(rank=9), CONV)}
    file = AdapterFile(parts, {})
    with pytest.raises(ConfigError, match=r"1 layers \(unet\.a\.to_q\) are dora, .* depends on the base's weights"):
        resize(file, Keep(rank=3))
    kept, report = resize(file, Keep(rank=3), others=True)
    assert kept.parts["unet.a.to_q"] is dora
    assert kept.parts["unet.b.conv1"].method.file_rank == 3
    assert report.kept == ["unet.a.to_q"]
    with pytest.raises(ConfigError, match="save those that are kept"):
        resize(AdapterFile({"unet.a.to_q": dora}, {}), Keep(rank=3), others=True)
    small, report = resize(AdapterFile({"unet.a.to_q": dora}, {}), Keep(rank=3), base=base)
    wanted = dora.method.delta(dora.tensors, LINEAR, weight).double()
    assert (delta(small.parts["unet.a.to_q"], LINEAR) - best(wanted, 3)).norm() < 1e-5 * wanted.norm()
    assert report.residual == pytest.approx(float(torch.linalg.svdvals(wanted)[3:].norm() / wanted.norm()), rel=1e-4)
    ia3 = Part(IA3(), {"vector": torch.ones(24)}, shape=LINEAR.shape)
    with pytest.raises(ConfigError, match="are ia3"):
        resize(AdapterFile({"unet.a.to_q": ia3}, {}), Keep(rank=3))


def test_layers_without_rank_are_named() -> None:
    file = adapter(LoRA(rank=9, alpha=4))
    tiny = file.parts["unet.a.to_q"]
    tiny = Part(tiny.method, {**tiny.tensors, "up": tiny.tensors["up"] * 1e-6}, shape=LINEAR.shape)
    small, report = resize(AdapterFile({**file.parts, "unet.a.to_q": tiny}, {}), Keep(error=0.2))
    assert "unet.a.to_q" not in small.parts
    assert "1 layers have no rank left and are gone: unet.a.to_q" in report.notes


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({}, "there is none"),
        ({"rank": 4, "error": 0.1}, "rank and error"),
        ({"rank": 0}, "rank is 0"),
        ({"rank": True}, "rank is True"),
        ({"rank_conv": 4, "error": 0.1}, "give the rank, too"),
        ({"error": 1.5}, "above 0, 1 at most"),
        ({"size": float("inf")}, "size is inf"),
        ({"rule": "sv_ratio", "bound": 2.0}, "no rule 'sv_ratio'"),
        ({"rule": "ratio", "bound": 0.5}, "from 1"),
        ({"rule": "fro", "bound": 1.5}, "from 0 to 1"),
    ],
)
def test_nonsense_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Keep(**wrong)


def kohya(path: Path) -> AdapterFile:
    """A file of sd-scripts' with a few of SDXL's layers."""
    start = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1"
    parts = {f"{start}.to_{x}": made(LoRA(rank=8, alpha=2), Site((640, 640)), torch.float16) for x in "qkv"}
    said = {
        "ss_network_dim": "8", "ss_network_alpha": "2", "ss_tag_frequency": '{"a": {"cat": 3}}',
        "ss_network_args": '{"conv_dim": "8", "algo": "locon", "dropout": "0.1"}', "modelspec.hash_sha256": "0xab",
    }  # fmt: skip
    save(AdapterFile(parts, said, "kohya", "sdxl"), path, format="kohya")
    return load(path)


def test_metadata_say_what_is_true(tmp_path: Path) -> None:
    file = kohya(tmp_path / "a.safetensors")
    small, _ = resize(file, Keep(rank=3))
    again = load(save(small, tmp_path / "b.safetensors")).metadata
    assert (again["ss_network_dim"], again["ss_network_alpha"]) == ("3", "3")
    assert again["ss_tag_frequency"] == file.metadata["ss_tag_frequency"]
    assert json.loads(again["ss_network_args"]) == {"dropout": "0.1"}
    assert "modelspec.hash_sha256" not in again
    assert again["sshs_model_hash"] != file.metadata["sshs_model_hash"]
    assert json.loads(again["imgadapt_resized"])["keep"] == "rank 3"


def test_threads_change_no_byte(tmp_path: Path) -> None:
    file = kohya(tmp_path / "a.safetensors")
    hashes: set[str] = set()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            for k, keep in enumerate((Keep(rank=3), Keep(error=0.2))):
                path = save(resize(file, keep)[0], tmp_path / f"{k}.safetensors")
                hashes.add(f"{k} {hashlib.sha256(path.read_bytes()).hexdigest()}")
        finally:
            torch.set_num_threads(1)
    assert len(hashes) == 2


Run = Callable[[str, Sequence[str]], None]


def test_the_program_reports_and_writes(tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    file = kohya(tmp_path / "a.safetensors")
    a, b = str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")
    run("resize", [a, b, "--sv-fro", "0.9", "--max-rank", "3", "--dtype", "bf16", "--json"])
    found = json.loads(capsys.readouterr().out)
    small = load(b)
    ranks = {name: part.method.file_rank for name, part in small.parts.items()}
    assert {row["layer"]: row["rank"] for row in found["layers"]} == ranks
    assert found["components"][0]["mean_rank"] == pytest.approx(sum(r or 0 for r in ranks.values()) / 3)
    assert {t.dtype for part in small.parts.values() for t in part.tensors.values()} == {torch.bfloat16}
    whole = torch.stack([delta(file.parts[name], Site((640, 640))) for name in ranks])
    left = torch.stack([delta(small.parts[name], Site((640, 640))) for name in ranks]) - whole
    assert found["residual"] == pytest.approx(float(left.norm() / whole.norm()), rel=0.01)
    run("resize", [a, b, "--rank", "8"])
    out = capsys.readouterr().out
    assert "3 layers are as they were" in out
    assert "NOTE" not in out
    for wrong in ([a, a, "--rank", "2"], [a, b], [a, b, "--sv-fro", "0.9", "--threshold", "1"]):
        with pytest.raises(ConfigError):
            run("resize", wrong)


def test_a_file_that_is_larger_than_its_input_is_said_to_be(
    tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    method = LoKr(rank=None, factor=8)
    name = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    save(AdapterFile({name: made(method, Site((640, 640)))}, architecture="sd1"), a, format="lycoris")
    run("resize", [str(a), str(b), "--rank", "16"])
    said, sizes = capsys.readouterr().out, (b.stat().st_size, a.stat().st_size)
    assert sizes[0] > sizes[1]
    assert f"\nNOTE the output, {sizes[0]:,} bytes, is larger than the input, {sizes[1]:,}: " in said
    run("resize", [str(a), str(b), "--rank", "16", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["bytes"] == sizes[0]
    assert found["notes"][-1].startswith("NOTE the output, ")
    run("resize", [str(b), str(tmp_path / "c.safetensors"), "--first", "15"])
    assert "NOTE" not in capsys.readouterr().out
    run("resize", [str(a), str(tmp_path / "small"), "--rank", "2", "--format", "peft"])  # a folder, of two files
    assert "NOTE" not in capsys.readouterr().out
