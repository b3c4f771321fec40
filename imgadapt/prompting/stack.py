"""Stack: the learned prompts of one denoiser, and the verbs that act on them."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from imgadapt import targets as where
from imgadapt.arch import canonical
from imgadapt.errors import FormatError, ShapeError, StateError, TargetError, first_few
from imgadapt.prompting import places
from imgadapt.prompting.attached import Attached, check_strength
from imgadapt.prompting.attention import CrossAttention
from imgadapt.prompting.kind import Place, Prompting, Prompts, Tensors
from imgadapt.slot import Strength
from imgadapt.targets import Targets

_HELD = "_imgadapt_prompts"


class Stack:
    """All learned prompts of a denoiser, in the order they came, and the hooks through which they act.

    It stands in the denoiser's `__dict__`, beside its modules: the state dict does not know it.
    """

    def __init__(self, reads: places.Reads) -> None:
        self.reads, self.enabled = reads, True
        self.attached: list[Attached] = []
        self._hooks = [reads.denoiser.register_forward_pre_hook(self._before, with_kwargs=True)]
        self._attentions = [CrossAttention(name, module, self) for name, (module, _) in reads.attentions.items()]

    @property
    def joint(self) -> bool:
        """Whether text and picture attend together."""
        return not self.reads.attentions

    def acting(self) -> Sequence[Attached]:
        return self.attached if self.enabled else ()

    def remove(self) -> None:
        for hook in (*self._hooks, *self._attentions):
            hook.remove()

    def _before(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Once a forward: make the tokens; of a joint transformer, put them after the text's."""
        for one in self.acting():
            one.prepare()
        if not self.joint:
            return None
        here = [one for one in self.acting() if one.strength(self.reads.component) != 0]
        if not here:
            return None
        if kwargs.get("encoder_hidden_states") is None:
            raise StateError(
                f"{self.reads.component}: wanted encoder_hidden_states by name, to put learned tokens there"
            )
        context = kwargs["encoder_hidden_states"]
        rows = [one.read(self.reads.component, context)["tokens"].expand(len(context), -1, -1) for one in here]
        changed = {**kwargs, "encoder_hidden_states": torch.cat([context, *rows], 1)}
        if (ids := kwargs.get("txt_ids")) is not None:  # Flux: a text's tokens are all at place 0
            changed["txt_ids"] = torch.cat(
                [ids, ids[..., :1, :].repeat_interleave(sum(r.shape[1] for r in rows), -2)], -2
            )
        return args, changed


def of(parts: Mapping[str, nn.Module]) -> Stack | None:
    """The stack of a model's denoiser; None if nothing is attached."""
    return next((part.__dict__[_HELD] for part in parts.values() if _HELD in part.__dict__), None)


def names(parts: Mapping[str, nn.Module]) -> list[str]:
    """Adapters that brought a learned prompt."""
    stack = of(parts)
    return [one.name for one in stack.attached] if stack else []


def attached(parts: Mapping[str, nn.Module], name: str) -> Attached | None:
    """One of them."""
    stack = of(parts)
    return next((one for one in stack.attached if one.name == name), None) if stack else None


def readers(parts: Mapping[str, nn.Module], kind: Prompting | Prompts, targets: Targets | None = None) -> list[str]:
    """Names of the attentions that will read a prompt: what strengths are told by.

    Raises:
        TargetError: this model cannot read such a prompt; targets match nothing, or are not for it.
    """
    found, kind_of = places.find(parts), kind.kind if isinstance(kind, Prompts) else kind
    if not found.attentions:
        if not kind_of.joint:
            raise TargetError(
                f"{kind_of.name} is for cross-attention, and in {type(found.denoiser).__name__} text and picture "
                "attend together; prompt_tuning and p_tuning are for it, too"
            )
        every = [found.component]
    elif isinstance(kind, Prompts) and not kind_of.shared:
        every = [name for name in found.attentions if canonical(name) in kind.tensors]
    else:
        every = list(found.attentions)
    if targets is None:
        return every
    if kind_of.shared:
        raise TargetError(
            f"{kind_of.name} has the same tokens everywhere; a mapping as weight= says where they are read"
        )
    chosen = [name for name in every if where.matches(name, targets)]
    if not chosen or where.idle(targets, every):
        raise TargetError(f"no cross-attention matches targets={targets!r}; there are: {first_few(every)}")
    return chosen


def add(
    parts: Mapping[str, nn.Module],
    prompt: Prompting | Prompts,
    name: str,
    strengths: Mapping[str, Strength],
    *,
    learns: bool,
) -> None:
    """Put a fresh or a trained prompt on the attentions that `strengths` names (see `readers`).

    Raises:
        ShapeError: a tensor does not fit; TargetError: the file is for places that this model does not have.
        FormatError: a tensor is not finite. ConfigError: a strength that it cannot act at.
    """
    found = places.find(parts)
    kind = prompt.kind if isinstance(prompt, Prompts) else prompt
    joint = not found.attentions
    for strength in strengths.values():
        check_strength(kind, joint, strength)
    at = {found.component: found.whole} if kind.shared else {n: found.attentions[n][1] for n in strengths}
    if isinstance(prompt, Prompts):
        tensors = _of_file(prompt, at, {canonical(n) for n in found.attentions} | {found.component})
    else:
        tensors = {key: kind.init(place) for key, place in at.items()}
    device = next(found.denoiser.parameters()).device
    if device.type != "meta":
        tensors = {key: {n: t.to(device) for n, t in own.items()} for key, own in tensors.items()}
    one = Attached(name, kind, at, tensors, joint=joint, learns=learns)
    one.strengths = dict(strengths)
    stack = of(parts)
    if stack is None:
        stack = Stack(found)
        found.denoiser.__dict__[_HELD] = stack
    stack.attached.append(one)


def _of_file(prompt: Prompts, at: Mapping[str, Place], known: Collection[str]) -> dict[str, Tensors]:
    if strange := [key for key in prompt.tensors if key not in known]:
        raise TargetError(
            f"{len(strange)} of the {len(prompt.tensors)} places of the file's {prompt.kind.name} are not in this "
            f"model ({first_few(strange)}); is it for another base?"
        )
    found: dict[str, Tensors] = {}
    for key, place in at.items():
        own = prompt.tensors.get(canonical(key), {})
        if wrong := prompt.kind.fits(own, place):
            raise ShapeError(f"{key}: {wrong}; is the file for another base?")
        for name, tensor in own.items():
            if not tensor.is_floating_point() or not torch.isfinite(tensor.float()).all():
                raise FormatError(f"{key}: {name} is not of finite numbers; the training that made it diverged")
        found[key] = own
    return found


def remove(parts: Mapping[str, nn.Module], gone: Collection[str]) -> None:
    """Take prompts off; with the last, the denoiser is as it was."""
    stack = of(parts)
    if stack is None:
        return
    stack.attached = [one for one in stack.attached if one.name not in gone]
    if not stack.attached:
        stack.remove()
        del stack.reads.denoiser.__dict__[_HELD]


def collected(parts: Mapping[str, nn.Module], name: str) -> Prompts | None:
    """A prompt as it is now; its tensors are copies, on the CPU."""
    one = attached(parts, name)
    with torch.no_grad():
        return None if one is None else Prompts(one.kind, {canonical(key): one.whole(key) for key in one.parameters})


def learning(parts: Mapping[str, nn.Module], name: str) -> list[tuple[str, str, nn.Parameter]]:
    """(place, tensor's name, parameter) of what training changes."""
    one = attached(parts, name)
    return [] if one is None else [(key, n, p) for key, own in one.parameters.items() for n, p in own.items()]


def size(one: Attached, key: str) -> float:
    """Frobenius norm of what attention reads at a place."""
    with torch.no_grad():
        own = one.whole(key)
        made = [own[name] for name in one.kind.shapes(one.places[key])]
        return float(torch.stack([t.double().square().sum() for t in made]).sum().sqrt())
