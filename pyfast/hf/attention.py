"""Attention: the generic forward of every family, and the implementation "pyfast" in transformers' registries.

A mask is kept small where it can be: None, a (B, Sk) bool mask of padding, or the boundaries of packed sequences,
found once per step when transformers asks for the mask. Anything else is the (B, 1, Sq, Sk) mask that SDPA gets.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import EncoderDecoderCache
from transformers.masking_utils import sdpa_mask

from pyfast import ops
from pyfast.hf.families import FAMILIES, Family
from pyfast.hf.lora import linear, linears, seeds
from pyfast.hf.swap import get

IMPLEMENTATION = "pyfast"


class Packed(NamedTuple):
    """Sequences packed into a batch of B rows of S tokens, as ranges of its B·S tokens."""

    cu_seqlens: torch.Tensor
    max_seqlen: int


# ---- masks


def _padding(attention_mask: torch.Tensor | None, kv_length: int, kv_offset: int) -> torch.Tensor | None:
    """(B, kv_length), True where a key counts; None where all do."""
    if attention_mask is None:
        return None
    missing = kv_offset + kv_length - attention_mask.shape[-1]
    if missing > 0:
        attention_mask = nn.functional.pad(attention_mask, (0, missing))
    attention_mask = attention_mask[:, kv_offset : kv_offset + kv_length]
    # looking at the values would wait for a GPU
    readable = attention_mask.device.type == "cpu" and not torch.compiler.is_compiling()
    return None if readable and bool(attention_mask.all()) else attention_mask


def _packed(mask_function: Callable, batch: int, length: int, window: int | None, device) -> Packed | None:
    """The boundaries that a causal mask function draws between packed sequences; None where it is of another kind.

    A token begins a sequence where it does not see its neighbour. That the mask is then causal within sequences, and
    nothing else, is checked on pairs at the distances 1, 2, 4, ... in both directions.
    """
    rows = torch.arange(batch, device=device)[:, None]
    tokens = torch.arange(length, device=device)

    def sees(distance: int) -> torch.Tensor:
        later, earlier = tokens[distance:], tokens[: length - distance]
        backward = mask_function(rows, 0, later, earlier).expand(batch, -1)
        forward = mask_function(rows, 0, earlier, later).expand(batch, -1)
        return backward, forward

    begins = torch.ones(batch, length, dtype=torch.bool, device=device)
    begins[:, 1:] = ~sees(1)[0]
    sequence = begins.cumsum(-1)
    wrong = torch.zeros((), dtype=torch.bool, device=device)
    distance = 1
    while distance < length:
        backward, forward = sees(distance)
        same = sequence[:, distance:] == sequence[:, : length - distance]
        wrong = wrong | forward.any() | (backward != (same & (window is None or distance < window))).any()
        distance *= 2
    if bool(wrong):
        return None
    starts = begins.flatten().nonzero().flatten()
    cu_seqlens = nn.functional.pad(starts, (0, 1), value=batch * length).to(torch.int32)
    return Packed(cu_seqlens, int(cu_seqlens.diff().max()))


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable | None = None,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    config=None,
    device: torch.device | str = "cpu",
    **kwargs,
) -> torch.Tensor | Packed | None:
    """What transformers' mask functions return for the implementation "pyfast" (see masking_utils.sdpa_mask).

    For the families of families.py: None, (B, Sk) padding or Packed where that says all, and the causal pattern and
    the window are the attention's own. Otherwise, and for unknown families, (B, 1, Sq, Sk) as SDPA has it.
    """
    # the op aligns queries with the last keys; a static cache has more keys than that
    aligned = isinstance(q_offset, int) and q_offset + q_length == kv_offset + kv_length
    if config.model_type in FAMILIES and not use_vmap:
        if allow_is_bidirectional_skip or (allow_is_causal_skip and aligned):
            return _padding(attention_mask, kv_length, kv_offset)
        if attention_mask is None and aligned and q_length == kv_length and not torch.compiler.is_compiling():
            packed = _packed(mask_function, batch_size, q_length, local_size, device)
            if packed is not None:
                return packed
    return sdpa_mask(
        batch_size,
        q_length,
        kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=allow_is_causal_skip and aligned,
        allow_is_bidirectional_skip=allow_is_bidirectional_skip,
        use_vmap=use_vmap,
        device=device,
    )


def without_mask(model: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The model's arguments, so that no mask is made where none is needed: rows of one sequence, or the boundaries of
    packed ones given.

    transformers would look for boundaries in the position_ids, which waits for a GPU. What has four dimensions it hands
    on as it is, and `attend` takes a mask of no elements for none.
    """
    known = ("attention_mask",) if kwargs.get("cu_seq_lens_q") is not None else _SHAPING
    if any(kwargs.get(name) is not None for name in known) or model.config._attn_implementation != IMPLEMENTATION:
        return kwargs
    return {**kwargs, "attention_mask": torch.empty((0, 0, 0, 0), dtype=torch.bool)}


#: arguments of a model that may ask for more than the causal pattern
_SHAPING = ("attention_mask", "position_ids", "past_key_values", "encoder_hidden_states")


# ---- attention on heads


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attention_mask: torch.Tensor | Packed | None,
    *,
    causal: bool,
    scale: float | None,
    window: int | None,
    softcap: float | None,
    dropout_p: float,
    sinks: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    arguments: dict[str, Any],
) -> torch.Tensor:
    """q (B, H, Sq, D), k and v (B, Hkv, Sk, D) -> (B, Sq, H, D). `arguments`: what else the model passed."""
    if arguments.get("output_attentions"):
        raise ValueError(
            "output_attentions=True: the fused attention never holds the attention weights; call pyfast.unpatch(model)"
            " and model.set_attn_implementation('eager') to see them"
        )
    if arguments.get("cache") is not None:
        raise ValueError("a paged cache (continuous batching) is not served: call pyfast.unpatch(model) first")
    drawn = seeds(dropout_p, 1, q.device)
    common = {
        "scale": scale,
        "softcap": softcap,
        "sinks": sinks,
        "dropout_p": dropout_p,
        "seed": drawn and drawn[0],
    }
    window_size = (window - 1, 0) if causal and window is not None else None
    if arguments.get("cu_seq_lens_q") is not None:
        attention_mask = Packed(arguments["cu_seq_lens_q"], arguments["max_length_q"])
    if isinstance(attention_mask, Packed):
        if position_bias is not None:
            raise ValueError("packed sequences with a position bias are not served: call pyfast.unpatch(model) first")
        batch, heads, length, width = q.shape
        q, k, v = (t.transpose(1, 2).reshape(-1, t.shape[1], width) for t in (q, k, v))
        cu_seqlens_k = arguments.get("cu_seq_lens_k", attention_mask.cu_seqlens)
        max_seqlen_k = arguments.get("max_length_k", attention_mask.max_seqlen)
        out = ops.attention_varlen(
            q,
            k,
            v,
            attention_mask.cu_seqlens,
            cu_seqlens_k,
            attention_mask.max_seqlen,
            max_seqlen_k,
            causal=causal,
            window_size=window_size,
            **common,
        )
        return out.view(batch, length, heads, width)
    if attention_mask is not None and attention_mask.numel() == 0 and attention_mask.dim() == 4:
        attention_mask = None  # without_mask
    if attention_mask is not None and attention_mask.dim() == 4:
        # it holds the causal pattern and the window too
        causal, window_size = False, None
        if attention_mask.dtype == torch.bool:
            attention_mask = torch.zeros_like(attention_mask, dtype=q.dtype).masked_fill_(~attention_mask, -torch.inf)
        position_bias = attention_mask if position_bias is None else position_bias + attention_mask
        attention_mask = None
    out = ops.attention(
        q,
        k,
        v,
        causal=causal,
        window_size=window_size,
        attention_mask=attention_mask,
        attn_bias=position_bias,
        **common,
    )
    return out.transpose(1, 2)


#: what models pass to an attention function that does not change its result
_HARMLESS = frozenset(
    (
        "cache_position",
        "cu_seq_lens_k",
        "cu_seq_lens_q",
        "deterministic",
        "max_length_k",
        "max_length_q",
        "num_items_in_batch",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "seq_idx",
        "token_type_ids",
        "use_cache",
    )
)


def attention_interface(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | Packed | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """The implementation "pyfast" of transformers' AttentionInterface; for modules without a generic forward."""
    unknown = [name for name, value in kwargs.items() if value is not None and name not in {*_HARMLESS, "cache"}]
    if unknown:
        raise TypeError(
            f"the model passes {', '.join(unknown)} to its attention, which the implementation 'pyfast' does not know:"
            " call pyfast.unpatch(model), or patch it with ops that do not hold 'attention'"
        )
    width, value_width = key.shape[-1], value.shape[-1]
    if width != value_width:  # multi-head latent attention: zeros change neither scores nor the columns that are kept
        query, key = (nn.functional.pad(t, (0, max(0, value_width - width))) for t in (query, key))
        value = nn.functional.pad(value, (0, max(0, width - value_width)))
    out = attend(
        query,
        key,
        value,
        attention_mask,
        causal=getattr(module, "is_causal", True) if is_causal is None else is_causal,
        scale=width**-0.5 if scaling is None else scaling,
        window=sliding_window,
        softcap=softcap,
        dropout_p=dropout,
        sinks=s_aux,
        position_bias=position_bias,
        arguments=kwargs,
    )
    return out[..., :value_width], None


def register() -> None:
    """Makes "pyfast" known to transformers, which changes no model."""
    AttentionInterface.register(IMPLEMENTATION, attention_interface)
    AttentionMaskInterface.register(IMPLEMENTATION, mask)


# ---- the attention module


def attention_forward(self, family: Family, stock, hidden_states, **kwargs):
    """The generic forward of a self-attention module. queries: the tokens whose result is wanted, all without it."""
    queries = kwargs.pop("queries", None)
    past_key_values = kwargs.get("past_key_values")
    if kwargs.get("encoder_hidden_states") is not None or isinstance(past_key_values, EncoderDecoderCache):
        return stock.forward(self, hidden_states, **kwargs)
    config = self.config
    shape = hidden_states.shape[:-1]
    head_dim = get(self, family.head_dim)
    if len(family.qkv) == 1:
        heads = config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        joined = linear(get(self, family.qkv[0]), hidden_states)
        q, k, v = joined.split([heads * head_dim, kv_heads * head_dim, kv_heads * head_dim], dim=-1)
    else:
        q, k, v = linears([get(self, path) for path in family.qkv], hidden_states)
    q, k, v = (t.view(*shape, -1, head_dim) for t in (q, k, v))
    if family.qk_norm is not None and hasattr(self, family.qk_norm[0]):
        q, k = (get(self, path)(t) for path, t in zip(family.qk_norm, (q, k), strict=True))
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if family.rope is not None:
        q, k = ops.rope(q, k, *kwargs["position_embeddings"], interleaved=family.rope == "interleaved")
    if past_key_values is not None:
        k, v = past_key_values.update(k, v, self.layer_idx)
    if queries is not None:
        q = q.index_select(2, queries)
    dropout = get(self, family.attention_dropout)
    is_causal = kwargs.get("is_causal")
    out = attend(
        q,
        k,
        v,
        kwargs.get("attention_mask"),
        causal=self.is_causal if is_causal is None else is_causal,
        scale=self.scaling,
        window=get(self, family.window),
        softcap=get(self, family.attention_softcap),
        dropout_p=(getattr(dropout, "p", dropout)) if self.training else 0.0,
        arguments=kwargs,
    )
    out = out.flatten(2)
    if family.order == "post":  # the layer holds the output projection
        return out, None
    out = linear(get(self, family.out), out)
    if family.out_dropout is not None:
        out = get(self, family.out_dropout)(out)
    return out, None
