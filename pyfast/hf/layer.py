"""The decoder (or encoder) layer: norms joined with the residual additions before them, around attention and MLP."""

from torch import nn

from pyfast.hf.families import Family
from pyfast.hf.lora import linear
from pyfast.hf.mlp import mlp
from pyfast.hf.norm import add_norm
from pyfast.hf.swap import get, is_plain


def refusal(module: nn.Module, family: Family) -> str | None:
    """Why the generic forward cannot stand for this layer's own, or None."""
    if getattr(module, "chunk_size_feed_forward", 0):
        return "chunk_size_feed_forward is set"
    return None


def is_served(module: nn.Module, family: Family) -> bool:
    """Whether the generic forward may pass over the modules that it does not call."""
    return all(is_plain(get(module, path)) for path in family.bypassed)


def layer_forward(self, family: Family, stock, hidden_states, **kwargs):
    """The generic forward of a layer: (B, S, hidden) -> (B, S, hidden)."""
    tokens = kwargs.pop("tokens", None)
    if kwargs.get("encoder_hidden_states") is not None or not is_served(self, family):
        return stock.forward(self, hidden_states, **kwargs)
    kwargs.pop("encoder_hidden_states", None)
    kwargs.pop("encoder_attention_mask", None)
    run = _post if family.order == "post" else _pre
    if tokens is None:
        return run(self, family, hidden_states, kwargs)
    if self is tokens.first:
        hidden_states = tokens.enter(hidden_states, kwargs.get("attention_mask"))
    if tokens.chosen:
        kwargs = tokens.arguments(self, kwargs)
    hidden_states = run(self, family, hidden_states, kwargs)
    return tokens.leave(hidden_states) if tokens.chosen and self is tokens.last else hidden_states


def _branch(layer, family, which, y):
    """What happens to the result of the attention (0) or the MLP (1) before it joins the residual."""
    if family.branch_norms is not None:
        y = get(layer, family.branch_norms[which])(y)
    if family.branch_dropouts is not None:
        y = get(layer, family.branch_dropouts[which])(y)
    if family.residual_multiplier is not None:
        y = y * get(layer, family.residual_multiplier)
    return y


def _queried(x, kwargs):
    """The tokens of x that a last layer goes on with after the attention; tokens.py."""
    queries = kwargs.get("queries")
    return x if queries is None else x.index_select(1, queries)


def _pre(layer, family, x, kwargs):
    normed = get(layer, family.attention_norm)(x)
    y, _ = get(layer, family.self_attention)(hidden_states=normed, **kwargs)
    y = _branch(layer, family, 0, y)
    x = _queried(x, kwargs)
    if family.order == "parallel":
        normed = _queried(normed, kwargs)
        return x + y + _branch(layer, family, 1, get(layer, family.feed_forward)(normed))
    normed, x = add_norm(get(layer, family.mlp_norm), y, x)
    return x + _branch(layer, family, 1, get(layer, family.feed_forward)(normed))


def _post(layer, family, x, kwargs):
    y, _ = get(layer, family.self_attention)(hidden_states=x, **kwargs)
    y = _branch(layer, family, 0, linear(get(layer, family.out), y))
    x, _ = add_norm(get(layer, family.attention_norm), y, _queried(x, kwargs))
    y = _branch(layer, family, 1, mlp(layer, family, x))
    x, _ = add_norm(get(layer, family.mlp_norm), y, x)
    return x
