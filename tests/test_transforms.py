"""FourierFT, WaveFT, C3A and SHiRA: peft's deltas, and what the contract does not say of them."""

from typing import Any

import pytest
import torch
from peft import C3AConfig, FourierFTConfig, ShiraConfig, WaveFTConfig
from peft.tuners.c3a.layer import C3ALinear
from peft.tuners.fourierft.layer import FourierFTLinear
from peft.tuners.shira.layer import Linear as ShiraLinear
from peft.tuners.shira.mask_functions import random_mask
from peft.tuners.waveft.layer import WaveFTLinear
from peft.tuners.waveft.wavelet import Wavelet
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from imgadapt import attach, parameters, set_weights
from imgadapt.errors import ConfigError, FormatError, ShapeError
from imgadapt.layer import AdapterLayer
from imgadapt.methods import C3A, FourierFT, Method, SHiRA, WaveFT
from imgadapt.methods.waveft import WAVELETS
from imgadapt.sites import Site

SHAPES = [(24, 12), (13, 25), (24, 13), (7, 1), (14, 28)]


def there_and_back(kind: type[Method], t: dict[str, Tensor], config: dict[str, Any], shape: tuple[int, ...]) -> Any:
    """The method and tensors of peft's file, which written again are that file."""
    assert kind.peft is not None
    method, own = kind.peft.read(t, config, shape)
    assert method.fits(own, Site(shape)) is None
    tensors, fields = kind.peft.write(method, own, shape)
    assert fields == {key: config.get(key) for key in fields}
    assert tensors.keys() == t.keys()
    assert all(torch.equal(tensors[k], t[k]) and tensors[k].dtype == t[k].dtype for k in t)
    return method, own


@pytest.mark.parametrize("shape", SHAPES)
def test_the_deltas_of_fourierft_are_pefts(shape: tuple[int, int]) -> None:
    n = min(30, shape[0] * shape[1])
    config: dict[str, Any] = {"n_frequency": n, "scaling": 15.0, "random_loc_seed": 5}
    peer = FourierFTLinear(nn.Linear(shape[1], shape[0]), "default", FourierFTConfig(**config), n_frequency=n)
    t = {"fourierft_spectrum": peer.fourierft_spectrum["default"].detach()}
    method, own = there_and_back(FourierFT, t, config, shape)
    delta = method.scale * method.delta(own, Site(shape), None)
    torch.testing.assert_close(delta, peer.get_delta_weight("default").detach())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("wavelet", ["db1", "db2", "db5", None])
def test_the_deltas_of_waveft_are_pefts(shape: tuple[int, int], wavelet: str | None) -> None:
    n = min(30, shape[0] * shape[1])
    config: dict[str, Any] = {"n_frequency": n, "scaling": 15.0, "random_loc_seed": 5, "use_idwt": wavelet is not None}
    config |= {"wavelet_family": wavelet or "db1"}
    chosen = WaveFTConfig(**config, init_weights=False)
    peer = WaveFTLinear(nn.Linear(shape[1], shape[0]), "default", chosen, n_frequency=n)
    t = {"waveft_spectrum": peer.waveft_spectrum["default"].detach()}
    method, own = there_and_back(WaveFT, t, config, shape)
    delta = method.scale * method.delta(own, Site(shape), None)
    torch.testing.assert_close(delta, peer.get_delta_weight("default").detach())


def test_the_wavelets_are_those_of_the_tables() -> None:
    for name, low in WAVELETS.items():
        assert low == pytest.approx(Wavelet(name).rec_lo, abs=1e-11)


@pytest.mark.parametrize("seed", [5, None])
@pytest.mark.parametrize("shape", [(24, 12), (13, 25)])
def test_the_deltas_of_shira_are_pefts_of_a_seed_or_none(shape: tuple[int, int], seed: int | None) -> None:
    base, config = nn.Linear(shape[1], shape[0]), ShiraConfig(r=2, random_seed=seed, init_weights=False)
    peer = ShiraLinear(base, random_mask(base, 2, random_seed=seed), "default", config=config, r=2)
    t = {"shira_weight": peer.shira_weight["default"].detach(), "shira_indices": peer.shira_indices["default"]}
    method, own = there_and_back(SHiRA, t, {"r": 2, "random_seed": seed}, shape)
    assert method.listed == (seed is None)
    wanted = torch.zeros(shape)
    wanted[tuple(peer.shira_indices["default"].long())] = peer.shira_weight["default"].detach()
    assert torch.equal(method.delta(own, Site(shape), None), wanted)
    half = {name: tensor.bfloat16() for name, tensor in own.items()}  # the places survive it
    assert torch.equal(method.delta(half, Site(shape), None), wanted.bfloat16())


def test_a_seed_that_did_not_draw_the_places_is_not_believed() -> None:
    method = SHiRA(rank=2, seed=5)
    t, _ = SHiRA.peft.write(method, {"shira_weight": torch.randn(72)}, (24, 12))  # pyright: ignore[reportOptionalMemberAccess]
    found, _ = SHiRA.peft.read(t, {"random_seed": 6}, (24, 12))  # pyright: ignore[reportOptionalMemberAccess]
    assert found == SHiRA(entries=72, listed=True)


def test_the_deltas_of_c3a_are_pefts() -> None:
    config = C3AConfig(block_size=4, init_weights="gaussian")
    peer = C3ALinear(nn.Linear(12, 8), "default", config=config, block_size=4)
    t = {"c3a_kernel": peer.c3a_kernel["default"].detach()}
    method, own = there_and_back(C3A, t, {"block_size": 4}, (8, 12))
    torch.testing.assert_close(method.delta(own, Site((8, 12)), None), peer.get_delta_weight("default").detach())


def test_pefts_second_c3a_reads_what_the_first_put_out() -> None:
    base, config = nn.Linear(8, 8), C3AConfig(block_size=8, init_weights="gaussian")
    peer = C3ALinear(base, "a", config=config, block_size=8)
    peer.update_layer("b", 8, config)
    peer.set_adapter(["a", "b"])
    x = torch.randn(3, 8)
    a, b = (peer.get_delta_weight(name).detach() for name in "ab")
    torch.testing.assert_close(peer(x), base(x) + x @ a.t() + x @ a.t() @ b.t())
    assert not torch.allclose(peer(x), base(x) + x @ (a + b).t(), atol=1e-3)


BY_TRANSFORMS: list[tuple[Method, Any, tuple[int, ...]]] = [
    (FourierFT(n_frequency=20), nn.Linear(65, 96), (2, 3, 65)),
    (WaveFT(n_frequency=40, wavelet="db3"), nn.Linear(65, 96), (2, 3, 65)),
    (SHiRA(entries=60), nn.Conv2d(64, 96, 1), (2, 64, 3, 4)),
    (C3A(8), nn.Linear(64, 96), (2, 3, 64)),
    (C3A(8), nn.Conv2d(32, 64, 3, padding=1, stride=2, groups=2), (2, 32, 5, 6)),
]


def adapted(method: Method, base: Any, dtype: torch.dtype = torch.float32) -> Any:
    model = nn.Sequential(base).requires_grad_(False).to(dtype)
    attach(model, method, targets="*")
    with torch.no_grad():
        for tensor in parameters(model):
            tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)))
    return model


def gradients(model: Any, x: Tensor, wanted: Tensor) -> list[Tensor]:
    """Of the input and of the adapter."""
    return list(torch.autograd.grad((model(x) * wanted).sum(), [x, *parameters(model)]))


@pytest.mark.parametrize(("method", "base", "size"), BY_TRANSFORMS, ids=lambda v: type(v).__name__)
def test_gradients_are_those_through_the_delta(method: Method, base: Any, size: tuple[int, ...]) -> None:
    model = adapted(method, base, torch.float64).double()
    layer: Any = model[0]
    assert isinstance(layer, AdapterLayer)
    (slot,) = layer
    assert not slot.way.dense
    x = torch.randn(size, dtype=torch.float64, requires_grad=True)
    wanted = torch.randn_like(model(x))
    found = gradients(model, x, wanted)
    t = slot.tensors()
    whole = layer.base.weight + slot.method.scale * slot.method.delta(t, layer.site, None)
    dense = torch.autograd.grad((layer.site.op(x, whole) * wanted).sum(), [x, *t.values()])
    for a, b in zip(found, dense, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("method", [FourierFT(n_frequency=20), C3A(8)], ids=lambda m: m.name)
def test_compiled_transforms_are_the_same(method: Method) -> None:
    torch.compiler.reset()
    model = adapted(method, nn.Linear(64, 96))
    x = torch.randn(3, 64, requires_grad=True)
    wanted = torch.randn(3, 96)
    compiled = gradients(torch.compile(model, fullgraph=True, backend="eager"), x, wanted)
    for a, b in zip(compiled, gradients(model, x, wanted), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("method", [FourierFT(), WaveFT(), SHiRA(rank=2), C3A(256)], ids=lambda m: m.name)
def test_no_product_of_the_weights_size_is_made_and_nothing_in_fp32_is_kept(method: Method) -> None:
    tokens, width = 64, 1280
    model = adapted(method, nn.Linear(width, width), torch.bfloat16)
    x = torch.randn(tokens, width, dtype=torch.bfloat16, requires_grad=True)
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = model(x)
        out.sum().backward()
    assert counter.get_total_flops() / (4 * tokens * width**2) == pytest.approx(
        1 + 0.0118 * (method.name == "c3a"), abs=1e-3
    )
    wide = [t for t in kept.values() if t.is_floating_point() and t.dtype.itemsize > 2]
    assert sum(t.untyped_storage().nbytes() for t in wide) < tokens * width


@pytest.mark.parametrize("make", [FourierFT, WaveFT, SHiRA])
@pytest.mark.parametrize("seed", [10**30, -(10**30), 1.5, None, "1", True])
def test_a_seed_that_no_generator_takes_is_refused(make: Any, seed: Any) -> None:
    with pytest.raises(ConfigError, match="seed is"):
        make(seed=seed)


@pytest.mark.parametrize("make", [FourierFT, WaveFT])
@pytest.mark.parametrize("scaling", [0, -1.0, float("nan"), float("inf"), None, "150"])
def test_a_scaling_that_is_none_is_refused(make: Any, scaling: Any) -> None:
    with pytest.raises(ConfigError, match="scaling is"):
        make(scaling=scaling)


def test_what_a_file_says_of_more_than_there_is_is_refused_before_it_is_made() -> None:
    site = Site((24, 12))
    many = {"spectrum": torch.zeros(289)}
    assert "289" in str(FourierFT(n_frequency=289).fits(many, site))
    assert FourierFT(n_frequency=10**9).at(site).n_frequency == 288
    assert SHiRA(rank=10**9).at(site).rank == 8
    assert C3A(10**9).at(site).block_size == 12
    digits = torch.zeros(2, 3, 1)
    for place in (12.0, 0.5, -1.0, float("nan")):
        digits[1, 0, 0] = place
        found = SHiRA(entries=1, listed=True).fits({"shira_weight": torch.ones(1), "shira_indices": digits}, site)
        assert "no rows and columns" in str(found)
    with pytest.raises(ShapeError):
        SHiRA.peft.read({"shira_weight": torch.ones(2), "shira_indices": torch.zeros(2, 3)}, {}, None)  # pyright: ignore[reportOptionalMemberAccess]
    with pytest.raises(FormatError, match="sym4"):
        WaveFT.peft.read({"waveft_spectrum": torch.ones(2)}, {"wavelet_family": "sym4"}, None)  # pyright: ignore[reportOptionalMemberAccess]


def test_strengths_per_sample_reach_the_transforms() -> None:
    model = adapted(FourierFT(n_frequency=20), nn.Linear(64, 96))
    x = torch.randn(2, 5, 64)
    base = model[0].base(x)
    whole = model(x) - base
    set_weights(model, {"default": torch.tensor([0.5, -2.0])})
    torch.testing.assert_close(model(x) - base, whole * torch.tensor([0.5, -2.0]).view(2, 1, 1), rtol=1e-4, atol=1e-5)
