"""What the tensors that a file has for one layer mean: the method, and its tensors as the method has them."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from imgadapt.errors import FormatError
from imgadapt.formats import of_peft
from imgadapt.methods import BOFT, IA3, OFT, DoRA, Full, GLoRA, LoHa, LoKr, LoRA, Method, Norm
from imgadapt.methods.rotation import block_size

Made = tuple[Method, dict[str, Tensor]]


@dataclass(frozen=True)
class Note:
    """What is known of a layer beyond its tensors.

    dialect: the format's name. config: what a peft config says of this layer, `alpha` and `r` among it.
    shape: of the layer's weight, if an architecture lists it. beside: what the file has for all layers.
    """

    dialect: str = ""
    config: Mapping[str, Any] = field(default_factory=dict[str, Any])
    shape: tuple[int, ...] | None = None
    beside: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])

    @property
    def alpha(self) -> float | None:
        """Of a peft config; peft's own default is 8, and diffusers' rank where there is no config."""
        value = self.config.get("alpha")
        return None if value is None else float(value)


def meaning(t: Mapping[str, Tensor], note: Note) -> Made:
    """The method and its tensors.

    Raises:
        FormatError: the tensors are no whole adapter, or what they say cannot be known from them.
        ConfigError, ShapeError: what they say cannot be.
    """
    own = dict(t)
    if (kind := of_peft.kind_of(own.keys(), note.config)) is not None:
        return checked(of_peft.meant(kind, own, note.beside, note.config, note.shape))
    if empty := [name for name, tensor in own.items() if not tensor.numel()]:
        raise FormatError(f"{', '.join(empty)} is empty")
    alpha = note.alpha
    if "alpha" in own:  # it is not peft's, which scales by a rank of its own
        alpha, note = _alpha(own.pop("alpha")), replace(note, config={**note.config, "r": None})
    if any(name.startswith("tlora_") for name in own):
        raise FormatError(
            "T-LoRA changes the weight by P L Q less what P L Q was at the start, which its files do not have; "
            "merge it with the tool that trained it, and extract a LoRA of the difference"
        )
    if own.keys() & {"magnitude", "magnitude_out"}:
        return checked(_dora(own, alpha, note))
    for needed, optional, make in _ROWS:
        if needed <= own.keys() <= needed | optional:
            return checked(make(own, alpha, note))
    have = ", ".join(sorted(own)) or "only alpha"
    raise FormatError(f"it has {have}, which is no whole adapter: it lost a tensor, or has one too many")


def checked(made: Made) -> Made:
    """The same. Raises FormatError: it has integers, whose meaning (a quantisation, by what?) the file does not say."""
    if whole := [name for name, tensor in made[1].items() if not tensor.is_floating_point()]:
        raise FormatError(f"{', '.join(whole)} is {made[1][whole[0]].dtype}, wanted floating-point numbers")
    return made


def _alpha(tensor: Tensor) -> float | None:
    value = tensor.to(torch.float64).item() if tensor.numel() == 1 else math.nan
    if not value >= 0:
        said = tensor.item() if tensor.numel() == 1 else f"of shape {tuple(tensor.shape)}"
        raise FormatError(f"alpha is {said}, wanted one number, 0 or more")
    return value  # infinity is ai-toolkit's 9,999,999,999 in fp16, which a LoKr of full factors does not read


def _scaled(alpha: float | None) -> float | None:
    """alpha where it is one over the rank: 0 means the rank, as sd-scripts reads it."""
    if alpha == math.inf:
        raise FormatError("alpha is infinite, wanted a finite number")
    return alpha or None


def _stabilised(method: Any, note: Note) -> Any:
    return replace(method, rank_stabilised=True) if note.config.get("use_rslora") is True else method


def _lora(t: dict[str, Tensor], alpha: float | None, note: Note) -> Made:
    down, up = t["down"], t["up"]
    if "mid" not in t and down.ndim > 2 and up.ndim == 2:  # LyCORIS' DyLoRA
        t["up"] = up.reshape(*up.shape, *(1 for _ in down.shape[2:]))
    elif up.ndim > 2 and down.ndim == 2 and math.prod(up.shape[2:]) == 1:
        t["down"] = down.reshape(*down.shape, *(1 for _ in up.shape[2:]))
    method = _stabilised(LoRA.infer({k: v for k, v in t.items() if k in ("down", "up", "mid")}, _scaled(alpha)), note)
    if "lora_bias" in t:
        t["bias"] = t.pop("lora_bias")
    if "diff_b" in t:  # a difference of its own, which alpha does not scale
        t["bias"] = t.pop("diff_b").float() / method.scale
    return (replace(method, bias=True) if "bias" in t else method), t


def _embedding(t: dict[str, Tensor], alpha: float | None, note: Note) -> Made:
    """peft's: (rank, entries) and (width, rank), unlike what its linear layers have by no more than the names."""
    return _lora({"down": t["embedding_down"], "up": t["embedding_up"]}, alpha, note)


def _dora(t: dict[str, Tensor], alpha: float | None, note: Note) -> Made:
    """LyCORIS' magnitude is (out, 1, ...), or (1, in, ...) for each input; peft's and ai-toolkit's is the former."""
    of_outputs = "magnitude_out" in t
    magnitude = t.pop("magnitude_out") if of_outputs else t.pop("magnitude")
    inner, tensors = meaning({**t, **({} if alpha is None else {"alpha": torch.tensor(alpha)})}, note)
    shape = tuple(magnitude.shape)
    on_input = not of_outputs and len(shape) > 1 and shape[0] == 1 and math.prod(shape) > 1
    return DoRA(inner, "input" if on_input else "output"), {**tensors, "magnitude": magnitude.reshape(-1)}


def _loha(t: dict[str, Tensor], alpha: float | None, note: Note) -> Made:
    for name in ("up_1", "up_2", "down_1", "down_2"):
        t[name] = t[name].flatten(1) if t[name].ndim > 2 else t[name]  # OneTrainer's convolutions are 4-D
    return _stabilised(LoHa.infer(t, _scaled(alpha)), note), t


def _lokr(t: dict[str, Tensor], alpha: float | None, note: Note) -> Made:
    full = not t.keys() & {"w1_b", "w2_b"}
    method = LoKr.infer(t, None if full else _scaled(alpha))
    if full and alpha and note.config.get("r"):  # peft scales full factors, too
        rank = float(note.config["r"])
        t["w1"] = t["w1"] * (alpha / (math.sqrt(rank) if note.config.get("use_rslora") is True else rank))
    return (method if full else _stabilised(method, note)), t


def _blocks(t: dict[str, Tensor], alpha: float | None, note: Note) -> Made:
    """LyCORIS' and kohya's rotations: alpha is the constraint."""
    blocks = t.pop("blocks")
    if note.dialect == "kohya-oft" and alpha == 0:  # there it is a limit of 0: no rotation at all
        blocks, alpha = torch.zeros_like(blocks), None
    constraint = _scaled(alpha)
    if blocks.ndim == 4:
        made = {"stages": blocks, **t}
        return BOFT.infer(made, constraint), made
    made = {"blocks": blocks, **t}
    return OFT.infer(made, constraint), made


def _packed(t: dict[str, Tensor], alpha: float | None, note: Note) -> Made:
    """peft's and OneTrainer's rotations of inputs. OneTrainer's are always polynomials of 5 terms, those of
    convolutions turn the other way round, and scaled ones are divided by 2 sqrt(b - 1) (its OFTModule).
    """
    packed = t["packed"]
    size = block_size(packed.shape[-1]) if packed.ndim == 2 else 0
    if "scaled" in t and bool(t["scaled"]):
        packed = packed / (2 * math.sqrt(max(1, size - 1)))
    if note.config:
        neumann = int(note.config.get("num_cayley_neumann_terms", 5)) if note.config.get("use_cayley_neumann") else 0
        limit = float(note.config.get("eps", 6e-5)) if note.config.get("coft") else None
        shared = bool(note.config.get("block_share", False))
    else:
        neumann, limit, shared = 5, None, len(packed) == 1
        if note.shape is not None and len(note.shape) > 2:
            packed = -packed
    method = OFT.infer({"packed": packed}, None)
    return replace(method, neumann=neumann, constraint=limit, shared=shared), {"packed": packed}


def _butterfly(t: dict[str, Tensor], alpha: float | None, note: Note) -> Made:
    """peft's: it turns inputs, and has a factor for each output, (out, 1) or (1, out) on convolutions."""
    made = {"stages": t["stages"]}
    if "boft_s" in t:
        ones = 2 if note.shape is None else len(note.shape)
        made["rescale"] = t["boft_s"].reshape(-1, *(1 for _ in range(ones - 1)))
    return replace(BOFT.infer(made, None), side="input"), made


def _ia3_of_peft(t: dict[str, Tensor], alpha: float | None, note: Note) -> Made:
    """(out, 1) or, on the input, (1, in); of convolutions (1, channels, 1, 1), where the config says which."""
    vector = t["ia3_l"]
    on_input = vector.ndim == 2 and vector.shape[0] == 1 and vector.numel() > 1
    if vector.ndim > 2:
        on_input = bool(note.config.get("feedforward", False))
    # it multiplies the bias, too: `attach` knows that, and makes diff_b
    return IA3("input" if on_input else "output", absolute=True, bias=not on_input), {"vector": vector.reshape(-1)}


def _ia3(t: dict[str, Tensor], alpha: float | None, note: Note) -> Made:
    vector = t["vector"]
    if vector.numel() != max(vector.shape, default=0):
        raise FormatError(f"its weight is {tuple(vector.shape)}: a model's own, or that of no adapter known here")
    on_input = "on_input" in t and bool(t["on_input"])
    return IA3("input" if on_input else "output"), {"vector": vector.reshape(-1)}


def _glora(t: dict[str, Tensor], alpha: float | None, note: Note) -> Made:
    return GLoRA.infer(t, _scaled(alpha)), t


def _full(t: dict[str, Tensor], alpha: float | None, note: Note) -> Made:
    if t["diff"].ndim == 1:  # a norm's
        renamed = {"w_norm": t["diff"], **({"b_norm": t["diff_b"]} if "diff_b" in t else {})}
        return Norm.infer(renamed, None), renamed
    return Full.infer(t, None), t


def _norm(t: dict[str, Tensor], alpha: float | None, note: Note) -> Made:
    return Norm.infer(t, None), t


def _set(t: dict[str, Tensor], alpha: float | None, note: Note) -> Made:
    """Weights that are put in the place of the base's (BFL's control norms; ComfyUI's `set_weight`)."""
    weight = t.get("set_norm", t.get("set_weight"))
    assert weight is not None
    if weight.ndim == 0:
        raise FormatError("it sets a weight to one number")
    if weight.ndim == 1:
        return Norm(bias=False, absolute=True), {"w_norm": weight}
    return Full(bias=False, absolute=True), {"diff": weight}


_Row = tuple[set[str], set[str], Callable[[dict[str, Tensor], float | None, Note], Made]]
_ROWS: tuple[_Row, ...] = (  # tensors that must be there, that may be, and what they are
    ({"down", "up"}, {"mid", "lora_bias", "diff_b"}, _lora),
    ({"embedding_down", "embedding_up"}, set(), _embedding),
    ({"up_1", "down_1", "up_2", "down_2"}, {"core_1", "core_2"}, _loha),
    *(
        (first | second, set[str](), _lokr)
        for first in ({"w1"}, {"w1_a", "w1_b"})
        for second in ({"w2"}, {"w2_a", "w2_b"}, {"w2_a", "w2_b", "t2"})
    ),
    ({"blocks"}, {"rescale"}, _blocks),
    ({"packed"}, {"scaled"}, _packed),
    ({"stages"}, {"boft_s"}, _butterfly),
    ({"a1", "a2", "b1", "b2"}, set(), _glora),
    ({"ia3_l"}, set(), _ia3_of_peft),
    ({"vector"}, {"on_input"}, _ia3),
    ({"diff"}, {"diff_b"}, _full),
    ({"w_norm"}, {"b_norm"}, _norm),
    ({"set_norm"}, set(), _set),
    ({"set_weight"}, set(), _set),
)
