"""Which tokens of a batch the layers compute: real ones only, and in the last layer those that the head reads.

A head that knows which positions it reads hands a `Tokens` to its layers. The first layer gathers the real tokens of
(B, S, hidden) into (1, tokens, hidden), and attention runs on ranges of tokens (attention_varlen). The last layer
attends to all of them, but computes the rest for what is read only, and puts that back, zeros elsewhere.
Leaving padding out is from Zeng et al., "Boosting Distributed Training Performance of the Unpadded BERT Model" (2022).
"""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from pyfast.hf import attention, layer
from pyfast.hf.families import Family
from pyfast.hf.swap import get, is_plain, swapped_as

_pad = nn.functional.pad


class Tokens:
    """The tokens of one batch; made anew for each step.

    real: (B, S) bool, False at padding. read: (B, S) bool, the positions whose result the head reads.
    packed: the boundaries of packed sequences, where the caller gave them.
    """

    def __init__(
        self,
        real: torch.Tensor,
        read: torch.Tensor,
        packed: attention.Packed | None,
        layers: list[nn.Module],
        causal: bool,
    ):
        self.real, self.read, self.packed, self.causal = real, read, packed, causal
        self.first, self.last = layers[0], layers[-1]
        self.chosen = False
        """whether the layers compute on less than all of (B, S); known after `enter`"""
        self.rotary = (None, None)

    def enter(self, x: torch.Tensor, mask: torch.Tensor | attention.Packed | None) -> torch.Tensor:
        """(B, S, hidden) -> what the first layer computes on: (1, tokens, hidden), or x where there is nothing to save.

        mask: what the attention was to get, as attention.mask makes it.
        """
        if isinstance(mask, torch.Tensor) and mask.dim() != 2:  # a pattern that ranges of tokens cannot say
            return x
        packed = mask if isinstance(mask, attention.Packed) else self.packed
        if packed is not None:
            bounds, longest = packed
        else:
            lengths = self.real.sum(-1, dtype=torch.int32)
            bounds, longest = _pad(lengths.cumsum(0, dtype=torch.int32), (1, 0)), int(lengths.max())
        self.index = self.real.flatten().nonzero().flatten()
        queried = self.read.flatten()[self.index]
        if self.causal:  # the op aligns queries with the last keys: all from a sequence's first that is read
            count = _pad(queried.cumsum(0), (1, 0))
            before = count[bounds[:-1].long()].repeat_interleave(bounds.diff(), output_size=len(queried))
            queried = count[1:] > before
        self.chosen = not (bool(queried.all()) and bool(self.real.all()))
        if not self.chosen:
            return x
        self.queries = queried.nonzero().flatten()
        query_bounds = _pad(queried.cumsum(0), (1, 0))[bounds.long()].to(torch.int32)
        self.ranges = {
            "cu_seq_lens_q": bounds,
            "cu_seq_lens_k": bounds,
            "max_length_q": longest,
            "max_length_k": longest,
        }
        self.last_ranges = {
            **self.ranges,
            "cu_seq_lens_q": query_bounds,
            "max_length_q": int(query_bounds.diff().max()),
            "queries": self.queries,
        }
        return self._gather(x)

    def arguments(self, module: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a layer that computes on (1, tokens, hidden)."""
        kwargs = {**kwargs, "attention_mask": None, **(self.last_ranges if module is self.last else self.ranges)}
        if kwargs.get("position_ids") is not None:
            kwargs["position_ids"] = self._gather(kwargs["position_ids"])
        given = kwargs.get("position_embeddings")
        if given is not None:
            if self.rotary[0] is not given:  # the layers share them
                self.rotary = given, tuple(self._gather(t) for t in given)
            kwargs["position_embeddings"] = self.rotary[1]
        return kwargs

    def leave(self, x: torch.Tensor) -> torch.Tensor:
        """What the last layer returns: (1, queries, hidden) -> (B, S, hidden)."""
        rows = x.new_zeros(self.real.numel(), x.shape[-1]).index_copy(0, self.index[self.queries], x[0])
        return rows.view(*self.real.shape, -1)

    def _gather(self, x):
        """(B or 1, S, ...) -> (1, tokens, ...)."""
        return x.expand(*self.real.shape, *x.shape[2:]).flatten(0, 1).index_select(0, self.index).unsqueeze(0)


def tokens(model: nn.Module, family: Family, kwargs: dict[str, Any], read: torch.Tensor) -> Tokens | None:
    """For the layers of `model`, called with `kwargs`, whose head reads the positions `read` (B, S) and no other.

    None where the layers must see the batch as it is: where more than the head sees hidden states or keeps them, where
    padding is read, where a gap in the mask would count in a window, and on a GPU, which would have to be waited for.
    """
    config, mask = model.config, kwargs.get("attention_mask")
    if torch.compiler.is_compiling() or read.device.type != "cpu":
        return None
    if any(kwargs.get(name) is not None for name in ("past_key_values", "encoder_hidden_states")):
        return None
    kept = ("output_attentions", "output_hidden_states", *(("use_cache",) if family.causal_lm else ()))
    if any(getattr(config, name, False) if kwargs.get(name) is None else kwargs[name] for name in kept):
        return None
    if mask is not None and (mask.dim() != 2 or mask.shape != read.shape):
        return None
    backbone = getattr(model, model.base_model_prefix)
    if not isinstance(backbone, PreTrainedModel):
        return None
    layers = list(get(backbone, family.layers))[: config.num_hidden_layers]
    if config._attn_implementation != attention.IMPLEMENTATION or not all(_follows(m, family) for m in layers):
        return None
    causal = get(layers[0], family.self_attention).is_causal
    if causal != (family.causal_lm is not None):  # an encoder set up as a decoder, which keeps a cache
        return None
    real = torch.ones_like(read) if mask is None else mask != 0
    pieces = real[:, 0] + (real[:, 1:] & ~real[:, :-1]).sum(-1)
    if bool((read & ~real).any()) or bool((pieces > 1).any()):
        return None
    packed = None
    if kwargs.get("cu_seq_lens_q") is not None:
        bounds = kwargs["cu_seq_lens_q"]
        ranges = bounds[0] == 0 and bounds[-1] == read.numel() and bool((bounds.diff() >= 0).all())
        if mask is not None or not ranges or not torch.equal(bounds, kwargs["cu_seq_lens_k"]):
            return None
        packed = attention.Packed(bounds, kwargs["max_length_q"])
    return Tokens(real, read, packed, layers, causal)


def _follows(module, family):
    """Whether the layer's generic forward runs, and nobody looks on."""
    self_attention = get(module, family.self_attention)
    return (
        swapped_as(module, layer.layer_forward)
        and swapped_as(self_attention, attention.attention_forward)
        and is_plain(module)
        and layer.is_served(module, family)
    )


def classification_forward(self, family: Family, stock, **kwargs):
    """The generic forward of a sequence classifier, whose head reads one token of each row."""
    if kwargs.get("labels") is not None and kwargs.get("use_cache") is None and family.causal_lm is not None:
        kwargs["use_cache"] = False  # a loss needs no cache
    read = _read_by_classifier(self, family, kwargs)
    chosen = None if read is None else tokens(self, family, kwargs, read)
    return stock.forward(self, **kwargs) if chosen is None else stock.forward(self, **kwargs, tokens=chosen)


def _read_by_classifier(model, family, kwargs):
    """(B, S), True at the first token of each row, or (causal models) at the last that is no padding."""
    ids = kwargs.get("input_ids")
    if ids is None:
        return None
    at = torch.zeros(len(ids), dtype=torch.long, device=ids.device)
    if family.causal_lm is not None:
        length, pad = ids.shape[1], model.config.pad_token_id
        numbers = torch.arange(length, device=ids.device)
        at += length - 1 if pad is None else (numbers * (ids != pad)).argmax(-1)
    return torch.zeros_like(ids, dtype=torch.bool).scatter_(1, at[:, None], True)
