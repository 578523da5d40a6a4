"""What each model family calls its parts: one row per family, and nothing but names.

The generic forwards (attention.py, mlp.py, norm.py, layer.py, loss.py) read everything that differs between families
from here. A new family that is built from the same parts needs one more row.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """One row. The defaults are Llama's. Names are attribute paths from the module that uses them."""

    model_type: str
    """config.model_type"""
    name: str
    """what its classes' names begin with; stands for {} below"""

    # classes whose instances are swapped; None: there is none
    layer: str = "{}DecoderLayer"
    attention: str = "{}Attention"
    mlp: str | None = "{}MLP"
    norm: str = "{}RMSNorm"
    causal_lm: str | None = "{}ForCausalLM"
    classifier: str = "{}ForSequenceClassification"

    layers: str = "layers"
    """the list of layers in the base model"""

    # norm
    norm_op: str = "rms_norm"
    norm_eps: str = "variance_epsilon"
    norm_weight_offset: float = 0.0

    # attention
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    """three projections, or one that holds all three"""
    out: str | None = "o_proj"
    head_dim: str = "head_dim"
    qk_norm: tuple[str, str] | None = None
    rope: str | None = "half"
    """ "half" (rotate the halves), "interleaved" (rotate neighbours) or None"""
    attention_dropout: str = "attention_dropout"
    """a probability or a Dropout module"""
    window: str | None = None
    """how many keys a query sees, itself included"""
    attention_softcap: str | None = None
    out_dropout: str | None = None

    # mlp
    gate_up: tuple[str, ...] = ("gate_proj", "up_proj")
    """gate and up, or one projection that holds both (joined_gate_up), or up alone for a plain MLP"""
    joined_gate_up: bool = False
    down: str = "down_proj"
    activation: str = "act_fn"
    mlp_dropout: str | None = None

    # layer
    order: str = "pre"
    """where the norms stand. "pre": x + f(norm(x)); "parallel": x + attention(norm(x)) + mlp(norm(x));
    "post": norm(x + f(x)), with the attention's output projection and the MLP held by the layer"""
    self_attention: str = "self_attn"
    feed_forward: str | None = "mlp"
    """the MLP module; None: the MLP's projections hang on the layer itself"""
    attention_norm: str = "input_layernorm"
    mlp_norm: str | None = "post_attention_layernorm"
    branch_norms: tuple[str, str] | None = None
    """norms of the attention's and the MLP's result, before it joins the residual"""
    branch_dropouts: tuple[str, str] | None = None
    residual_multiplier: str | None = None
    bypassed: tuple[str, ...] = ()
    """modules inside the layer that its generic forward does not call: one with a hook brings the stock forward back"""

    # causal language model
    lm_head: str = "lm_head"
    logit_scale: str | None = None
    logit_divisor: str | None = None
    logit_softcap: str | None = None
    output: str = "CausalLMOutputWithPast"

    def class_name(self, kind: str) -> str | None:
        pattern = getattr(self, kind)
        return pattern and pattern.format(self.name)


_BERT = {
    "layer": "{}Layer",
    "layers": "encoder.layer",
    "attention": "{}SelfAttention",
    "mlp": None,
    "norm": "LayerNorm",
    "causal_lm": None,
    "norm_op": "layer_norm",
    "norm_eps": "eps",
    "qkv": ("query", "key", "value"),
    "out": "attention.output.dense",
    "head_dim": "attention_head_size",
    "rope": None,
    "attention_dropout": "dropout",
    "gate_up": ("intermediate.dense",),
    "down": "output.dense",
    "activation": "intermediate.intermediate_act_fn",
    "order": "post",
    "self_attention": "attention.self",
    "feed_forward": None,
    "attention_norm": "attention.output.LayerNorm",
    "mlp_norm": "output.LayerNorm",
    "branch_dropouts": ("attention.output.dropout", "output.dropout"),
    "bypassed": ("attention", "attention.output", "intermediate", "output"),
}

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family("llama", "Llama"),
        Family("mistral", "Mistral", window="config.sliding_window"),
        Family("qwen2", "Qwen2", window="sliding_window"),
        Family("qwen3", "Qwen3", window="sliding_window", qk_norm=("q_norm", "k_norm")),
        Family(
            "phi3",
            "Phi3",
            qkv=("qkv_proj",),
            gate_up=("gate_up_proj",),
            joined_gate_up=True,
            activation="activation_fn",
            window="config.sliding_window",
            branch_dropouts=("resid_attn_dropout", "resid_mlp_dropout"),
        ),
        Family("granite", "Granite", residual_multiplier="residual_multiplier", logit_divisor="config.logits_scaling"),
        Family(
            "cohere",
            "Cohere",
            norm="{}LayerNorm",
            norm_op="layer_norm",
            qk_norm=("q_norm", "k_norm"),
            rope="interleaved",
            order="parallel",
            mlp_norm=None,
            logit_scale="logit_scale",
        ),
        Family(
            "gemma2",
            "Gemma2",
            norm_eps="eps",
            norm_weight_offset=1.0,
            window="sliding_window",
            attention_softcap="attn_logit_softcapping",
            mlp_norm="pre_feedforward_layernorm",
            branch_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
            logit_softcap="config.final_logit_softcapping",
        ),
        Family(
            "gpt2",
            "GPT2",
            layer="{}Block",
            layers="h",
            norm="LayerNorm",
            causal_lm="{}LMHeadModel",
            norm_op="layer_norm",
            norm_eps="eps",
            qkv=("c_attn",),
            out="c_proj",
            rope=None,
            attention_dropout="attn_dropout",
            out_dropout="resid_dropout",
            gate_up=("c_fc",),
            down="c_proj",
            activation="act",
            mlp_dropout="dropout",
            self_attention="attn",
            attention_norm="ln_1",
            mlp_norm="ln_2",
            output="CausalLMOutputWithCrossAttentions",
        ),
        Family("bert", "Bert", **_BERT),
        Family("roberta", "Roberta", **_BERT),
    )
}
