"""How each family of tools writes a method's tensors: the inverse of `meaning.py`."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from imgadapt.formats import of_peft
from imgadapt.formats.ends import LYCORIS, PEFT, XLABS
from imgadapt.formats.fusing import Unfusable, written_out
from imgadapt.formats.part import Part

Spelled = dict[str, Tensor]
"""End -> tensor."""
Spell = Callable[[Part, int], Spelled]
"""(part, axes of the layer's weight) -> what is written. Raises Unfusable where the family has no word for it."""

_LYCORIS = {tensor: end for end, tensor in LYCORIS.items()}
_PEFT = {tensor: end for end, tensor in PEFT.items()}


def _ends(t: Mapping[str, Tensor], names: Mapping[str, str]) -> Spelled:
    return {names[name]: tensor for name, tensor in t.items()}


def _with_alpha(spelled: Spelled, alpha: float | None) -> Spelled:
    return spelled if alpha is None else {**spelled, "alpha": torch.tensor(alpha)}


def _whole_kernel(part: Part) -> tuple[Any, dict[str, Tensor]]:
    """LoRA without a Tucker core: it is multiplied into down, which changes nothing but the size."""
    method: Any = part.method
    t = dict(part.tensors)
    if "mid" in t:
        core, down = t.pop("mid"), t["down"]
        product = torch.einsum("rs...,si->ri...", core.float(), down.flatten(1).float())
        t["down"], method = held(product, down.dtype), replace(method, tucker=False)
    return method, t


def held(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in `dtype` where that rounds nothing off, else as it is."""
    narrow = exact.to(dtype)
    return narrow if torch.equal(narrow.to(exact.dtype), exact) else exact


def _times(tensor: Tensor, scale: float) -> Tensor:
    return held(tensor.to(torch.promote_types(tensor.dtype, torch.float32)) * scale, tensor.dtype)


def _without_alpha(part: Part, tool: str) -> tuple[Tensor, Tensor]:
    """(down, up) of LoRA for a tool that knows no alpha: its scale is in up."""
    method: Any = part.method
    if method.name != "lora" or method.bias:
        raise _no(method, tool)
    method, t = _whole_kernel(part)
    return t["down"], _times(t["up"], method.scale)


def _no(method: Any, tool: str, *, dense: bool | None = None) -> Unfusable:
    inner = f" over {method.inner.name} with a magnitude for each {method.axis}" if method.name == "dora" else ""
    core = " with a Tucker core" if getattr(method, "tucker", False) else ""
    return Unfusable(
        f"{tool} has no word for {method.name}{inner}{core}", dense=written_out(method) if dense is None else dense
    )


def lycoris(part: Part, axes: int) -> Spelled:
    """kohya, LyCORIS, OneTrainer, ComfyUI: LyCORIS' methods, rotations of the outputs only."""
    method: Any = part.method
    if not in_lycoris(method):
        raise _no(method, "LyCORIS")
    return _LYCORIS_METHODS[method.name](method, dict(part.tensors), axes)


def in_lycoris(method: Any) -> bool:
    """Whether LyCORIS has the method, with whatever settings."""
    return method.name in _LYCORIS_METHODS and getattr(method, "inner", method).name in _LYCORIS_METHODS


def _lycoris_lora(method: Any, t: dict[str, Tensor], axes: int) -> Spelled:
    bias = {"diff_b": t.pop("bias") * method.scale} if "bias" in t else {}
    return _with_alpha(_ends({**t, **bias}, _LYCORIS), method.file_alpha)


def _lycoris_dora(method: Any, t: dict[str, Tensor], axes: int) -> Spelled:
    magnitude = t.pop("magnitude")
    inner = _LYCORIS_METHODS[method.inner.name](method.inner, t, axes)
    shape = (-1, *(1 for _ in range(axes - 1))) if method.axis == "output" else (1, -1, *(1 for _ in range(axes - 2)))
    return {**inner, "dora_scale": magnitude.reshape(shape)}


def _lycoris_lokr(method: Any, t: dict[str, Tensor], axes: int) -> Spelled:
    return _with_alpha(_ends(t, _LYCORIS), 1.0 if method.rank is None else method.file_alpha)


def _lycoris_rotation(method: Any, t: dict[str, Tensor], axes: int) -> Spelled:
    if method.side == "input" or getattr(method, "neumann", 0):
        raise _no(method, "LyCORIS", dense=False)
    blocks = t.pop("blocks") if "blocks" in t else t.pop("stages")
    return _with_alpha({"oft_blocks": blocks, **t}, method.constraint or 0.0)


def _lycoris_ia3(method: Any, t: dict[str, Tensor], axes: int) -> Spelled:
    if method.bias:
        raise Unfusable("peft's IA3 of outputs multiplies the bias, too, and LyCORIS' does not", dense=False)
    vector = t["vector"] - 1 if method.absolute else t["vector"]
    on_input = method.axis == "input"
    shape = (1, -1, *(1 for _ in range(axes - 2))) if axes > 2 else (-1,)
    return {"weight": vector.reshape(shape), "on_input": torch.tensor(int(on_input))}


def _lycoris_full(method: Any, t: dict[str, Tensor], axes: int) -> Spelled:
    if method.absolute:
        raise _no(method, "LyCORIS", dense=False)
    return _ends(t, _LYCORIS)


_LYCORIS_METHODS: dict[str, Callable[[Any, dict[str, Tensor], int], Spelled]] = {
    "lora": _lycoris_lora,
    "loha": lambda method, t, axes: _with_alpha(_ends(t, _LYCORIS), method.file_alpha),
    "lokr": _lycoris_lokr,
    "dora": _lycoris_dora,
    "oft": _lycoris_rotation,
    "boft": _lycoris_rotation,
    "glora": lambda method, t, axes: _with_alpha(_ends(t, _LYCORIS), method.file_alpha),
    "ia3": _lycoris_ia3,
    "full": _lycoris_full,
    "norm": _lycoris_full,
}


_ROTATIONS_OF_PEFT = {
    "oft": 'oft(side="input"), not rescaled',
    "boft": 'boft(side="input", rescaled=True), without a constraint',
}


def peft(part: Part, axes: int) -> Spelled:
    """peft: no Tucker LoRA, DoRA over LoRA for each output, rotations of the inputs; alpha is in the config."""
    method: Any = part.method
    if method.peft is not None:
        return of_peft.spelled(part)
    t = dict(part.tensors)
    inner = getattr(method, "inner", method)
    if method.name in ("lora", "dora"):
        if method.name == "lora":
            inner, t = _whole_kernel(part)
        if inner.name != "lora" or inner.tucker or getattr(method, "axis", "output") == "input":
            raise _no(method, "peft")
        bias = {"lora_B.bias": t.pop("bias")} if "bias" in t else {}
        if "magnitude" in t:
            shape = (1, -1, *(1 for _ in range(axes - 2))) if axes > 2 else (-1,)
            t["magnitude_out"] = t.pop("magnitude").reshape(shape)
        return {**_ends(t, {**_PEFT, "magnitude_out": "lora_magnitude_vector"}), **bias}
    if method.name in ("loha", "lokr"):
        return _ends(t, _LYCORIS)
    if method.name == "oft" and method.side == "input" and not method.rescaled:
        return _ends(t, _PEFT)
    if method.name == "boft" and method.side == "input" and method.constraint is None:
        rescale = t.get("rescale")
        if rescale is None:
            raise _other_rotation(method)
        return {"boft_R": t["stages"], "boft_s": rescale.reshape((1, -1) if axes > 2 else (-1, 1))}
    if method.name == "ia3" and method.axis == "output" and not (method.bias and "diff_b" not in t):
        raise Unfusable(
            'peft\'s IA3 of outputs multiplies the bias, too, as only what peft trained does; ia3(axis="input") can be '
            "written",
            dense=False,
        )
    if method.name == "ia3":
        vector = t["vector"] if method.absolute else t["vector"] + 1
        ones = tuple(1 for _ in range(axes - 2))
        shape = (1, -1, *ones) if axes > 2 or method.axis == "input" else (-1, 1)
        return {"ia3_l": vector.reshape(shape)}
    raise _other_rotation(method) if method.name in _ROTATIONS_OF_PEFT else _no(method, "peft")


def _other_rotation(method: Any) -> Unfusable:
    own = _ROTATIONS_OF_PEFT[method.name]
    return Unfusable(f"peft has no word for {method.name} of this kind; what it has is {own}", dense=False)


def lora_only(part: Part, axes: int) -> Spelled:
    """diffusers: peft's LoRA (its DoRA too), nothing else."""
    if part.method.name not in ("lora", "dora"):
        raise _no(part.method, "diffusers")
    return peft(part, axes)


def toolkit(part: Part, axes: int) -> Spelled:
    """ai-toolkit, BFL, fal: LoRA with peft's ends and no config, so alpha = rank; LoKr with LyCORIS' ends."""
    method: Any = part.method
    if method.name == "lokr":
        return _lycoris_lokr(method, dict(part.tensors), axes)
    if method.name in ("full", "norm") and not method.absolute:
        names = {"diff": "diff", "diff_b": "diff_b", "w_norm": "diff", "b_norm": "diff_b"}
        return _ends(part.tensors, names)
    down, up = _without_alpha(part, "this format")
    return {"lora_A.weight": down, "lora_B.weight": up}


def xlabs(part: Part, axes: int) -> Spelled:
    """XLabs': LoRA, alpha = rank."""
    down, up = _without_alpha(part, "XLabs' format")
    return {"down": down, "up": up}


def xlabs_key(stem: str, end: str) -> str:
    """`double_blocks.0.img_attn.qkv` -> `double_blocks.0.processor.qkv_lora1.down.weight`."""
    for spelled, meant in XLABS.items():
        if meant.tensor == end and stem.endswith(meant.tail):
            return f"{stem.removesuffix(meant.tail)}.{spelled}"
    raise Unfusable("XLabs' format has the attention of double blocks only", dense=False)


_EMBEDDINGS = ("token_embedding", "position_embedding", "shared", "embed_tokens", "style_embedder")


def peft_key(stem: str, end: str) -> str:
    """peft spells LoRA on embeddings otherwise."""
    if stem.rpartition(".")[2] in _EMBEDDINGS:
        end = {"lora_A.weight": "lora_embedding_A", "lora_B.weight": "lora_embedding_B"}.get(end, end)
    return f"{stem}.{end}"


def legacy_key(stem: str, end: str) -> str:
    """diffusers called text encoders' layers by another name."""
    return f"{stem}.{end.replace('lora.', 'lora_linear_layer.') if stem.startswith('text_encoder') else end}"


def plain_key(stem: str, end: str) -> str:
    return f"{stem}.{end}"


def legacy(part: Part, axes: int) -> Spelled:
    """diffusers before peft: LoRA, alpha = rank."""
    down, up = _without_alpha(part, "diffusers' older format")
    return {"lora.down.weight": down, "lora.up.weight": up}


def kohya(part: Part, axes: int) -> Spelled:
    """sd-scripts' own networks: LoRA."""
    method: Any = part.method
    if method.name != "lora" or method.bias:
        raise _no(method, "kohya's networks.lora")
    return lycoris(Part(*_whole_kernel(part)), axes)


def rotations(part: Part, axes: int) -> Spelled:
    """sd-scripts' networks.oft: alpha is the limit, and 0 is none at all; so one that binds nothing stands for none."""
    method: Any = part.method
    if method.name != "oft" or method.side == "input" or method.rescaled:
        raise _no(method, "kohya's networks.oft")
    spelled = lycoris(part, axes)
    return spelled if method.constraint is not None else {**spelled, "alpha": torch.tensor(1e4)}


def own(part: Part, axes: int) -> Spelled:
    """imgadapt's: every tensor under our name."""
    return dict(part.tensors)
