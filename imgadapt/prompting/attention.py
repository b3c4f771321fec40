"""CrossAttention: learned tokens in one cross-attention of diffusers, by hooks, whatever its processor."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from imgadapt.errors import StateError
from imgadapt.prompting.attached import Attached, spread_over
from imgadapt.prompting.kind import Tensors
from imgadapt.slot import Strength


class Stack(Protocol):
    """The adapters of a denoiser."""

    def acting(self) -> Sequence[Attached]:
        """Those that are there; none while disabled."""
        ...


class CrossAttention:
    """The hooks of one cross-attention.

    Its context gets a row for each token: prompt tuning's are the tokens, prefix tuning's are empty and to_k's and
    to_v's answers to them replaced. So whatever a processor does with lengths and masks, it does with those rows too.
    A strength s is log(s) in the attention's mask: exp(q k + log s) = s exp(q k). Gated prompts come in before to_out.

    module: diffusers' Attention. Adapters may come onto its projections and go; hooks follow to what stands there.
    """

    def __init__(self, name: str, module: nn.Module, stack: Stack) -> None:
        self.name, self._stack = name, stack
        self._own = module.register_forward_pre_hook(self._before, with_kwargs=True)
        self._inside: dict[str, tuple[nn.Module, Any]] = {}
        self._rows: list[tuple[int, Tensors]] = []  # (tokens, what is known of them) of this call
        self._length = 0
        self._unanswered: set[str] = set()
        self._gated: list[tuple[Tensors, Strength, str]] = []
        self._query: Tensor | None = None
        self._module: Any = module

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_rows": [], "_gated": [], "_query": None}  # of a graph, which is not copied

    def remove(self) -> None:
        self._own.remove()
        self._unhook()

    def _unhook(self) -> None:
        for _, handle in self._inside.values():
            handle.remove()
        self._inside = {}

    def _before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._rows, self._gated, self._unanswered, self._query = [], [], set(), None
        given = kwargs.get("encoder_hidden_states", args[1] if len(args) > 1 else None)
        here = [(one, one.strength(self.name)) for one in self._stack.acting()]
        here = [(one, s) for one, s in here if isinstance(s, Tensor) or s != 0]
        if given is None or not here:
            self._unhook()
            return None
        if getattr(module, "fused_projections", False):
            raise StateError(f"{self.name}: its projections are fused; unfuse_qkv_projections() first")
        context = given[0] if isinstance(given, tuple) else given  # IP-Adapter's pictures stand beside it
        self._gated = [(one.read(self.name, context), s, one.name) for one, s in here if not one.kind.appended]
        added = [(one, s) for one, s in here if one.kind.appended]
        self._rows = [(one.kind.tokens, one.read(self.name, context)) for one, _ in added]
        self._length = context.shape[1]
        keyed = any("keys" in t for _, t in self._rows)
        self._unanswered = {"to_k", "to_v"} if keyed else set()
        self._hook(module, keyed=keyed)
        if not added:
            return None
        longer = torch.cat([context, *(_context(n, t, context) for n, t in self._rows)], 1)
        whole: Any = (longer, *given[1:]) if isinstance(given, tuple) else longer
        mask = kwargs.get("attention_mask", args[2] if len(args) > 2 else None)
        mask = self._mask(mask, added, context, int(module.heads))
        changed = {**kwargs, "encoder_hidden_states": whole, **({} if mask is None else {"attention_mask": mask})}
        return args[:1], changed

    def _hook(self, module: Any, *, keyed: bool) -> None:
        """Put hooks on the projections that stand there now, where they are wanted."""
        wanted: dict[str, tuple[nn.Module, Callable[..., Any], bool]] = {}
        if keyed:
            wanted |= {"to_k": (module.to_k, self._keys, False), "to_v": (module.to_v, self._values, False)}
        if self._gated:
            wanted |= {"to_q": (module.to_q, self._asked, False), "to_out": (module.to_out[0], self._answer, True)}
        if {key: at for key, (at, *_) in wanted.items()} == {key: at for key, (at, _) in self._inside.items()}:
            return
        self._unhook()
        for key, (at, call, first) in wanted.items():
            self._inside[key] = at, at.register_forward_pre_hook(call) if first else at.register_forward_hook(call)

    def _mask(
        self, mask: Any, added: Sequence[tuple[Attached, Strength]], context: Tensor, heads: int
    ) -> Tensor | None:
        """The attention's mask, a bias of logits, with columns for the tokens; None where there is none and all
        strengths are 1.
        """
        if mask is None and not any(isinstance(s, Tensor) or s != 1 for _, s in added):
            return None
        batch = len(context)
        if mask is None:
            mask = context.new_zeros(batch, 1, self._length)
        if mask.shape[-1] != self._length or len(mask) not in (batch, batch * heads):
            raise StateError(
                f"{self.name}: its mask is {tuple(mask.shape)} for {batch} texts of {self._length} tokens; wanted one "
                "number for each token, so that learned ones can be added"
            )
        columns: list[Tensor] = []
        for one, s in added:
            each = spread_over(s, batch, one.name) if isinstance(s, Tensor) else torch.full((batch,), s)
            each = each.double().log().to(mask.device, mask.dtype).repeat_interleave(len(mask) // batch)
            columns.append(each.reshape(-1, *(1 for _ in mask.shape[1:])).expand(*mask.shape[:-1], one.kind.tokens))
        return torch.cat([mask, *columns], -1)

    def _keys(self, _: nn.Module, __: Any, out: Tensor) -> Tensor | None:
        return self._answered("to_k", "keys", out)

    def _values(self, _: nn.Module, __: Any, out: Tensor) -> Tensor | None:
        return self._answered("to_v", "values", out)

    def _answered(self, projection: str, name: str, out: Tensor) -> Tensor | None:
        """What a projection makes of the context, with what was learnt in the place of empty rows."""
        if projection not in self._unanswered:
            return None
        self._unanswered.discard(projection)
        pieces, place = [out[:, : self._length]], self._length
        for n, t in self._rows:
            pieces.append(t[name].to(out.dtype).expand(len(out), -1, -1) if name in t else out[:, place : place + n])
            place += n
        return torch.cat(pieces, 1)

    def _asked(self, _: nn.Module, __: Any, out: Tensor) -> None:
        if self._gated:
            self._query = out

    def _answer(self, _: nn.Module, args: tuple[Any, ...]) -> Any:
        """What goes into to_out, and the gated prompts."""
        if self._query is None:
            return None
        x, attention = args[0], self._module
        asked = self._heads(self._query, attention.norm_q)
        self._query, gated, self._gated = None, self._gated, []
        for t, s, name in gated:
            prompt = t["prompt"].expand(len(x), -1, -1)
            keys = self._heads(attention.to_k(prompt), attention.norm_k)
            values = self._heads(attention.to_v(prompt), None)
            seen = F.scaled_dot_product_attention(asked, keys, values.to(keys.dtype), scale=attention.scale)
            gate = t["gate"].tanh()[None, :, None, None]
            if isinstance(s, Tensor):
                gate = gate * spread_over(s, len(x), name).to(gate)[:, None, None, None]
            else:
                gate = gate * s
            x = x + (seen * gate).transpose(1, 2).reshape(x.shape).to(x.dtype)
        return (x, *args[1:])

    def _heads(self, x: Tensor, norm: Any) -> Tensor:
        """(batch, heads, n, inner / heads) of (batch, n, inner)."""
        split = x.view(len(x), -1, self._module.heads, x.shape[-1] // self._module.heads).transpose(1, 2)
        return split if norm is None else norm(split)


def _context(count: int, t: Tensors, context: Tensor) -> Tensor:
    """Rows of the context for tokens: themselves, or empty ones whose keys and values are known."""
    if "tokens" in t:
        return t["tokens"].expand(len(context), -1, -1)
    return context.new_zeros(len(context), count, context.shape[2])
