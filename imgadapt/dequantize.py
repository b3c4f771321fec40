"""The weight of a module as floating-point numbers, however it is stored, and storing a changed one the same way.

| storage | library | values | merges |
|---|---|---|---|
| NF4, FP4, also doubly quantised | bitsandbytes `Linear4bit` | yes | yes, once the model has been moved to its device |
| int8 | bitsandbytes `Linear8bitLt` | yes | yes, as above |
| int8, intx (int4, ... in int8), float8 | torchao (tensor classes of version 2) | yes | yes |
| int4 and other packed layouts | torchao | yes: a product with the identity | no: each kernel packs its own way |
| Q8_0, Q5_1, Q5_0, Q4_1, Q4_0, BF16 | GGUF as diffusers loads it | yes | yes |
| Q6_K, Q5_K, Q4_K, Q3_K, Q2_K, IQ4_* | GGUF as diffusers loads it | yes | no: the gguf package cannot make them |
| float8 without scales | torch, diffusers' layerwise casting | yes | yes |
| float8 with scales in the module, other integers | several | no | no |
| a tensor class with a `dequantize` of its own | any | yes | no |

"Values" is what DoRA, dense changes and merging need; LoRA, LoHa, LoKr, OFT and BOFT act on activations where they can,
and then on any storage. Where there is no merging, adapters stay live. Values are those that the base's own forward
computes with, up to its rounding to the dtype of the activation. A merge rounds the sum to the storage's grid and
costs, of normal weights, 0.5 % (8-bit integers), 2.5 % (float8), 4 % (5 bits), 7 to 11 % (4 bits), more where a change
has outliers; `restore` measures it. None of the libraries is imported here before a weight of its class comes.
"""

import copy
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from imgadapt.errors import StateError


@dataclass(frozen=True)
class Storage:
    """One way to keep a weight.

    read: the values, from module and weight.
    write: a weight stored as the given one, from module, weight and new values (fp32); None where nothing here can.
    """

    read: Callable[[Any, Any], Tensor]
    write: Callable[[Any, Any, Tensor], Any] | None = None


def weight_of(module: nn.Module, parameter: str = "weight") -> Tensor:
    """The values of a weight: the parameter itself where it is plain, else its dequantised values, detached.

    Raises:
        StateError: it has no values here (on 'meta', and no offload hook knows them), or a quantisation unknown to us.
    """
    weight: Any = module._parameters[parameter]
    if weight.is_meta:
        held = getattr(getattr(module, "_hf_hook", None), "weights_map", None)  # accelerate's sequential offload
        if held is None:
            raise StateError("the weights are on 'meta': load them first")
        weight = held[parameter]
    return values_of(module, weight)


def values_of(module: nn.Module, weight: Tensor) -> Tensor:
    """`weight_of` for a parameter that is, or was before a merge, this module's.

    Raises:
        StateError: a quantisation unknown to us.
    """
    storage = _storage(module, weight)
    if storage is None:
        return weight
    with torch.no_grad():
        return storage.read(module, weight)


def is_plain(module: nn.Module, weight: Tensor) -> bool:
    """Whether a parameter holds its values as they are.

    Raises:
        StateError: a quantisation unknown to us.
    """
    return _storage(module, weight) is None


@torch.no_grad()
def restore(module: nn.Module, original: Tensor, total: Tensor) -> tuple[nn.Parameter, float | None]:
    """A new parameter with the values `total`, stored as the original is; the original keeps its own.

    The second is what the storage's grid cost: ‖stored - total‖ / ‖total‖ (Frobenius), None where the original is
    plain.

    Raises:
        StateError: this storage cannot be written here, or the values are beyond its range.
    """
    storage = _storage(module, original)
    if storage is None:
        return nn.Parameter(total.to(original.dtype), requires_grad=original.requires_grad), None
    if storage.write is None:
        raise _unwritable(type(original).__name__)
    fresh = storage.write(module, original, total).requires_grad_(original.requires_grad)
    gap = storage.read(module, fresh).to(total.dtype) - total
    size = total.norm().clamp(min=torch.finfo(total.dtype).tiny)
    error = float(gap.norm() / size)
    if not math.isfinite(error):
        raise _beyond(original, total)
    return fresh, error


@torch.no_grad()
def follow(original: Tensor, current: Tensor) -> None:
    """Bring the original parameter, in place, to where the model has moved meanwhile; to its dtype, too, if plain."""
    if type(original) in _PLAIN:
        if original.device != current.device or original.dtype != current.dtype:
            original.data = original.data.to(current.device, current.dtype)
    elif original.device != current.device:
        moved: Any = original.to(current.device)
        if is_traceable_wrapper_subclass(original):
            torch.utils.swap_tensors(original, nn.Parameter(moved, requires_grad=original.requires_grad))
        else:
            original.data = moved.data
            vars(original).update({name: value for name, value in vars(moved).items() if value is not None})


_PLAIN = (nn.Parameter, Tensor)
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)


def _storage(module: nn.Module, weight: Tensor) -> Storage | None:
    """The row for this weight; None: it is plain.

    Raises:
        StateError: there is none.
    """
    kind = type(weight)
    if kind not in _PLAIN:
        for cls in kind.__mro__:
            if row := _STORAGES.get((cls.__module__.partition(".")[0], cls.__name__)):
                return row
        if kind.dequantize is not Tensor.dequantize:
            return _OWN
    if weight.dtype in _FLOAT8:
        return _PLAIN_FLOAT8
    if not (weight.is_floating_point() or weight.is_complex()):
        raise StateError(
            f"{type(module).__name__}: its weight is a {kind.__name__} of {weight.dtype}, a quantisation that is not "
            "known here (bitsandbytes, torchao, GGUF, float8 are); use a method that does not read the weight, such as "
            "LoRA, unmerged, or dequantise it first"
        )
    return None


def _unwritable(what: str) -> StateError:
    return StateError(
        f"the weight is stored as {what}, which can be read here but not made: keep the adapter live (do not merge), "
        "or merge into the model before it is quantised"
    )


def _beyond(weight: Tensor, total: Tensor) -> StateError:
    return StateError(
        f"the merged weight, up to {float(total.abs().max()):.3g}, is beyond the range of its storage "
        f"({type(weight).__name__} of {weight.dtype}): lower the strength, or keep the adapter live"
    )


def _read_4bit(module: Any, weight: Any) -> Tensor:
    if weight.is_floating_point():
        return weight.detach()  # bitsandbytes quantises when the model is moved
    from bitsandbytes import functional

    packed, state = weight.data, _state_4bit(module, weight)
    if getattr(state, "packing_format_for_cpu", False):
        # laid out anew for AVX512-BF16 by a forward in eval mode; the library's way back mixes up the scales (0.50.2)
        state = copy.copy(state)
        state.absmax = state.absmax.t().reshape(-1).float()
        state.original_nested = False
        packed, state = functional._convert_weight_packed_for_cpu_inverse(packed, state)
    return functional.dequantize_4bit(packed, state)


def _write_4bit(module: Any, weight: Any, total: Tensor) -> Any:
    _require_quantised(weight)
    state = _state_4bit(module, weight)
    fresh = type(weight)(
        total,
        blocksize=state.blocksize,
        compress_statistics=weight.compress_statistics,
        quant_type=state.quant_type,
        quant_storage=weight.quant_storage,
    ).to(total.device)
    fresh.quant_state.dtype = getattr(state, "original_dtype", state.dtype)
    return fresh


def _state_4bit(module: Any, weight: Any) -> Any:
    return module.quant_state if weight.quant_state is None else weight.quant_state


def _read_8bit(module: Any, weight: Any) -> Tensor:
    if weight.is_floating_point():
        return weight.detach()
    scale = module.state.SCB if weight.SCB is None else weight.SCB
    return weight.detach().float() * (scale[:, None] / 127)


def _write_8bit(module: Any, weight: Any, total: Tensor) -> Any:
    _require_quantised(weight)
    if weight.CB is None:
        # the module has taken the scales over, and would keep those of the merged weight: given back to the weight,
        # they are taken over anew by the first forward after `unmerge`
        weight.CB, weight.SCB = module.state.CB, module.state.SCB
    return type(weight)(total, requires_grad=False, has_fp16_weights=False)._quantize(total.device)


def _require_quantised(weight: Any) -> None:
    if weight.is_floating_point():
        raise StateError(
            "bitsandbytes has not quantised this weight: move the model to its device, which does it, before merging"
        )


def _read_gguf(module: Any, weight: Any) -> Tensor:
    return sys.modules[type(weight).__module__].dequantize_gguf_tensor(weight).detach()


def _write_gguf(module: Any, weight: Any, total: Tensor) -> Any:
    from gguf import quants

    try:
        stored = quants.quantize(total.cpu().numpy(), weight.quant_type)
    except NotImplementedError:
        raise _unwritable(f"GGUF {weight.quant_type.name}") from None
    return type(weight)(torch.from_numpy(stored).to(total.device), quant_type=weight.quant_type)


def _read_torchao(module: Any, weight: Any) -> Tensor:
    if type(weight).dequantize is Tensor.dequantize:  # none of its own: a packed layout
        return F.linear(torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device), weight).t()
    values, before = weight.dequantize(), getattr(weight, "act_pre_scale", None)
    return values if before is None else values * before


def _write_torchao_int8(module: Any, weight: Any, total: Tensor) -> Any:
    from torchao.quantization import PerBlock

    before = weight.act_pre_scale
    fresh = type(weight).from_hp(
        (total if before is None else total / before).to(weight.dtype),
        PerBlock(tuple(weight.block_size)),
        _mapping(weight),
        act_quant_kwargs=weight.act_quant_kwargs,
        act_quant_scale=weight.act_quant_scale,
        act_quant_zero_point=weight.act_quant_zero_point,
        act_pre_scale=before,
        reduce_range=weight.reduce_range,
    )
    return nn.Parameter(fresh, requires_grad=False)


def _write_torchao_intx(module: Any, weight: Any, total: Tensor) -> Any:
    fresh = type(weight).from_hp(
        total.to(weight.dtype),
        weight.block_size,
        weight.target_dtype,
        mapping_type=_mapping(weight),
        activation_quantization=weight.activation_quantization,
    )
    return nn.Parameter(fresh, requires_grad=False)


def _write_torchao_float8(module: Any, weight: Any, total: Tensor) -> Any:
    from torchao.quantization import PerBlock

    fresh = type(weight).from_hp(
        total.to(weight.dtype),
        weight.qdata.dtype,
        PerBlock(tuple(weight.block_size)),
        mm_config=weight.mm_config,
        kernel_preference=weight.kernel_preference,
        act_quant_kwargs=weight.act_quant_kwargs,
    )
    return nn.Parameter(fresh, requires_grad=False)


def _mapping(weight: Any) -> Any:
    """A tensor does not keep how it was made: a symmetric one has no zero points but 0."""
    from torchao.quantization import MappingType

    symmetric = weight.zero_point is None or not weight.zero_point.any()
    return MappingType.SYMMETRIC if symmetric else MappingType.ASYMMETRIC


def _read_float8(module: Any, weight: Any) -> Tensor:
    scales = [name for name in (*module._parameters, *module._buffers) if "scale" in name]
    if scales:
        raise StateError(
            f"{type(module).__name__}: its weight is {weight.dtype} with scales ({scales[0]}), a quantisation that is "
            "not known here; use a method that does not read the weight, such as LoRA, unmerged, or dequantise it first"
        )
    return weight.detach().to(torch.float32)


def _write_float8(module: Any, weight: Any, total: Tensor) -> Any:
    if total.abs().max() > torch.finfo(weight.dtype).max:
        raise _beyond(weight, total)  # which torch would cut off, or make NaN, by version and device
    return nn.Parameter(total.to(weight.dtype), requires_grad=False)


_PLAIN_FLOAT8 = Storage(_read_float8, _write_float8)
_OWN = Storage(lambda module, weight: weight.detach().dequantize())
_STORAGES = {
    ("bitsandbytes", "Params4bit"): Storage(_read_4bit, _write_4bit),
    ("bitsandbytes", "Int8Params"): Storage(_read_8bit, _write_8bit),
    ("diffusers", "GGUFParameter"): Storage(_read_gguf, _write_gguf),
    ("torchao", "Int8Tensor"): Storage(_read_torchao, _write_torchao_int8),
    ("torchao", "IntxUnpackedToInt8Tensor"): Storage(_read_torchao, _write_torchao_intx),
    ("torchao", "Float8Tensor"): Storage(_read_torchao, _write_torchao_float8),
    ("torchao", "TorchAOBaseTensor"): Storage(_read_torchao),
}
"""Top package and name of the parameter's class, or of a base of it, to the row; so no library is imported here."""
