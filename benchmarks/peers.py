"""What the ops are compared with on a GPU: PyTorch's other ways, and the kernels of other projects, as rows of data.

A peer is a module and a call of it; the module is imported when the peer is first called, and one that is not installed
or fails is named with the reason. Each call was read against the source of these releases: Liger-Kernel 0.8.5,
cut-cross-entropy 25.1.1, QuACK 0.6.5 and 0.2.4 (which has no rope, and makes a frozen head's gradient too), Unsloth
2026.10.9, PEFT 0.21.2, torch 2.11 and 2.13 (flash-attn: its README).
"""

import contextlib
import functools
import importlib
import importlib.util
import sys
import types
from collections.abc import Callable
from importlib import metadata
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

SCALING = 2.0  # of every adapter

#: the distributions whose versions stand beside the results, the libraries of PyTorch's kernels among them
PACKAGES = (
    "liger-kernel",
    "cut-cross-entropy",
    "quack-kernels",
    "unsloth",
    "unsloth_zoo",
    "flash-attn",
    "peft",
    "triton",
    "nvidia-cublas",
    "nvidia-cudnn-cu13",
)


class Peer(NamedTuple):
    """module: imported for it. call(module, *inputs): its result. prepare(module, *inputs): the inputs as `call` takes
    them, where they are not the case's own; not timed. checked: whether it gives what the op gives."""

    module: str
    call: Callable
    prepare: Callable | None = None
    checked: bool = True


def load(name: str):
    """The module of a peer."""
    if name.startswith("unsloth"):
        _open_unsloth()
    return importlib.import_module(name)


def versions() -> dict[str, str]:
    """Of the peers that are installed."""
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


@functools.cache
def _open_unsloth() -> None:
    """Makes Unsloth's kernels importable alone: its packages without what their __init__ does, which patches this
    process and needs trl, bitsandbytes and datasets. The kernels' own modules need none of it."""
    for name in ("unsloth", "unsloth.kernels", "unsloth_zoo", "unsloth_zoo.temporary_patches"):
        parent, _, child = name.rpartition(".")
        if parent:
            folders = [f"{folder}/{child}" for folder in sys.modules[parent].__path__]
        else:
            spec = importlib.util.find_spec(name)
            if spec is None:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
            folders = list(spec.submodule_search_locations)
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = folders
    found = importlib.import_module("unsloth_zoo.device_type")
    sys.modules["unsloth_zoo"].DEVICE_TYPE = found.DEVICE_TYPE


def compiled(function: Callable) -> Peer:
    """PyTorch's composite under torch.compile, for the shapes that it sees."""
    compile_once = functools.cache(lambda: torch.compile(function, dynamic=False))
    return Peer("torch", lambda m, *inputs: compile_once()(*inputs))


# ---- attention
def _sdpa(backend: SDPBackend) -> Peer:
    def call(m, q, k, v):
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])

    return Peer("torch", call)


_FLEX = "torch.nn.attention.flex_attention"


@functools.cache
def _compiled_flex(flex_attention):
    return torch.compile(flex_attention, dynamic=False)


def _causal(batch, head, query, key):
    return query >= key


def _flex_inputs(m, q, k, v):
    length = q.shape[2]
    return q, k, v, m.create_block_mask(_causal, None, None, length, length, device=q.device)


def _flex(m, q, k, v, block_mask):
    return _compiled_flex(m.flex_attention)(q, k, v, block_mask=block_mask, enable_gqa=q.shape[1] != k.shape[1])


def _longest(m, q, k, v, cu_seqlens):
    """The longest sequence as a number, which a model knows without asking the GPU."""
    return q, k, v, cu_seqlens.to(torch.int32), int(cu_seqlens.diff().max())


# ---- losses
_LIGER, _UNSLOTH = "liger_kernel.transformers.functional", "unsloth.kernels"


def _torch_linear_cross_entropy(m, x, w, t):
    if not hasattr(F, "linear_cross_entropy"):
        raise NotImplementedError(f"torch {torch.__version__} has no F.linear_cross_entropy (2.13 has)")
    return F.linear_cross_entropy(x, w, t, options=torch.nn.LinearCrossEntropyOptions())


def _unsloth_linear_cross_entropy(m, x, w, t):
    # n_items: without it the mean is over the rows, those that do not count among them
    items = (t != -100).sum()
    return m.unsloth_fused_ce_loss(None, x[None], w, None, t[None], n_items=items, shift_labels=False)


# ---- rope
def rope(q, k, cos, sin):
    """As transformers writes it."""

    def turn(x):
        low, high = x.chunk(2, -1)
        return x * cos[:, None] + torch.cat((-high, low), -1) * sin[:, None]

    return turn(q), turn(k)


def _quack_rope(m, q, k, cos, sin):
    """QuACK takes (B, S, H, D), and half of the angles."""
    half = cos.shape[-1] // 2
    cos, sin = cos[0, :, :half], sin[0, :, :half]
    return tuple(m.apply_rotary_emb(x.transpose(1, 2), cos, sin).transpose(1, 2) for x in (q, k))


# ---- LoRA: inputs are x, then weight, A and B of each projection
def projections(weights) -> list[tuple]:
    return [weights[i : i + 3] for i in range(0, len(weights), 3)]


def _frozen(m, x, *weights):
    """Each frozen weight with an input of its own, so that no gradients are summed."""
    frozen = weights[::3]
    inputs = (x.detach() if w.shape[1] == x.shape[1] else x.new_empty(len(x), w.shape[1]).normal_() for w in frozen)
    return *(one.requires_grad_() for one in inputs), *frozen


def _products(m, *inputs):
    """What LoRA should cost: the frozen weights' products, and in backward those by the input."""
    count = len(inputs) // 2
    return tuple(F.linear(x, w) for x, w in zip(inputs[:count], inputs[count:], strict=True))


FROZEN = {"frozen GEMMs": Peer("torch", _products, _frozen, checked=False)}


def _counted(m, x, w, t):
    """The rows that count, and the head."""
    return x.detach()[t != -100].requires_grad_(), w


def _peft_layers(adapter_dtype):
    """PEFT's own layers with these weights, the adapters in this dtype (PEFT's default is fp32): inputs are x, the
    adapters, which get the gradients, and the layers."""

    def prepare(m, x, *weights):
        layers, parameters = [], [x]
        for weight, a, b in projections(weights):
            model = torch.nn.Sequential(torch.nn.Linear(*weight.shape[::-1], bias=False, device="meta"))
            model[0].weight = torch.nn.Parameter(weight, requires_grad=False)
            rank = a.shape[0]
            config = m.LoraConfig(r=rank, lora_alpha=SCALING * rank, target_modules=["0"])
            layer = m.inject_adapter_in_model(config, model)[0]
            for linear, tensor in ((layer.lora_A["default"], a), (layer.lora_B["default"], b)):
                linear.weight = torch.nn.Parameter(tensor.detach().to(adapter_dtype))
                parameters.append(linear.weight)
            layers.append(layer)
        return *parameters, layers

    return prepare


def _peft_mlp(m, x, *rest):
    gate, up, down = rest[-1]
    return down(F.silu(gate(x)) * up(x))


def _peft(call: Callable) -> dict[str, Peer]:
    return {
        "peft": Peer("peft", call, _peft_layers(torch.float32)),
        "peft, bf16 adapters": Peer("peft", call, _peft_layers(torch.bfloat16)),
    }


def _quantized(weights) -> list:
    """Unsloth's arguments of each projection: weight, its quantisation, A, B, scaling."""
    return [argument for w, a, b in projections(weights) for argument in (w, None, a, b, SCALING)]


def _unsloth_mlp(m, x, *weights):
    kernels = (m.swiglu_fg_kernel, m.swiglu_DWf_DW_dfg_kernel)
    return m.LoRA_MLP.apply(x[None], *_quantized(weights), *kernels, True)[0]


#: op -> peer -> how it is called with the inputs of that op's cases
PEERS: dict[str, dict[str, Peer]] = {
    "attention": {
        "sdpa flash": _sdpa(SDPBackend.FLASH_ATTENTION),
        "sdpa cudnn": _sdpa(SDPBackend.CUDNN_ATTENTION),
        "sdpa efficient": _sdpa(SDPBackend.EFFICIENT_ATTENTION),
        "flex": Peer(_FLEX, _flex, _flex_inputs),
        "flash-attn": Peer(
            "flash_attn",
            lambda m, q, k, v: m.flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), causal=True).transpose(1, 2),
        ),
    },
    "attention_varlen": {
        "torch varlen": Peer(
            "torch.nn.attention.varlen",
            lambda m, q, k, v, cu, longest: m.varlen_attn(q, k, v, cu, cu, longest, longest, window_size=(-1, 0)),
            _longest,
        ),
        "flash-attn": Peer(
            "flash_attn",
            lambda m, q, k, v, cu, n: m.flash_attn_varlen_func(q, k, v, cu, cu, n, n, causal=True),
            _longest,
        ),
    },
    "cross_entropy": {
        "compile": compiled(lambda x, t: F.cross_entropy(x.float(), t)),
        "liger": Peer(_LIGER, lambda m, x, t: m.liger_cross_entropy(x, t)),
        "quack": Peer("quack", lambda m, x, t: m.cross_entropy(x, t)),
        "unsloth": Peer(f"{_UNSLOTH}.cross_entropy_loss", lambda m, x, t: m.fast_cross_entropy_loss(x[None], t[None])),
    },
    "linear_cross_entropy": {
        "two GEMMs": Peer("torch", _products, _counted, checked=False),
        "compile": compiled(lambda x, w, t: F.cross_entropy(F.linear(x, w).float(), t)),
        "torch linear_cross_entropy": Peer("torch", _torch_linear_cross_entropy),
        "liger": Peer(_LIGER, lambda m, x, w, t: m.liger_fused_linear_cross_entropy(x, w, t)),
        "cut-cross-entropy": Peer("cut_cross_entropy", lambda m, x, w, t: m.linear_cross_entropy(x, w, t)),
        # tuned=True would try dozens of tiles at the first call
        "quack": Peer(
            "quack.linear_cross_entropy", lambda m, x, w, t: m.chunked_linear_cross_entropy(x, w, t, tuned=False)
        ),
        "unsloth": Peer("unsloth_zoo.fused_losses", _unsloth_linear_cross_entropy),
    },
    "rms_norm": {
        "compile": compiled(lambda x, w: F.rms_norm(x, x.shape[-1:], w, 1e-6)),
        "liger": Peer(_LIGER, lambda m, x, w: m.liger_rms_norm(x, w, 1e-6, in_place=False)),
        "quack": Peer("quack", lambda m, x, w: m.rmsnorm(x, w, eps=1e-6)),
        "unsloth": Peer(f"{_UNSLOTH}.rms_layernorm", lambda m, x, w: m.Fast_RMS_Layernorm.apply(x, w, 1e-6, False)),
    },
    "layer_norm": {
        "compile": compiled(lambda x, w, b: F.layer_norm(x, x.shape[-1:], w, b, 1e-6)),
        "liger": Peer(_LIGER, lambda m, x, w, b: m.liger_layer_norm(x, w, b, 1e-6)),
        "unsloth": Peer(f"{_UNSLOTH}.layernorm", lambda m, x, w, b: m.Fast_Layernorm.apply(x, w, b, 1e-6)),
    },
    "rope": {
        "compile": compiled(rope),
        "liger": Peer(_LIGER, lambda m, q, k, cos, sin: m.liger_rope(q, k, cos, sin)),
        "quack": Peer("quack.rotary", _quack_rope),
        "unsloth": Peer(f"{_UNSLOTH}.rope_embedding", lambda m, q, k, cos, sin: m.fast_rope_embedding(q, k, cos, sin)),
    },
    "swiglu": {
        "compile": compiled(lambda gate, up: F.silu(gate) * up),
        "liger": Peer(_LIGER, lambda m, gate, up: m.liger_swiglu(gate, up)),
    },
    "geglu": {
        "compile": compiled(lambda gate, up: F.gelu(gate, approximate="tanh") * up),
        "liger": Peer(_LIGER, lambda m, gate, up: m.liger_geglu(gate, up)),
    },
    "gelu_bias": {"compile": compiled(lambda x, bias: F.gelu(x + bias))},
    "lora_linear": {
        **FROZEN,
        **_peft(lambda m, x, *rest: rest[-1][0](x)),
        "unsloth": Peer(
            f"{_UNSLOTH}.fast_lora", lambda m, x, *weights: m.LoRA_W.apply(x[None], *_quantized(weights))[0]
        ),
    },
    "lora_linears": {
        **FROZEN,
        **_peft(lambda m, x, *rest: tuple(layer(x) for layer in rest[-1])),
        "unsloth": Peer(
            f"{_UNSLOTH}.fast_lora",
            lambda m, x, *weights: tuple(y[0] for y in m.LoRA_QKV.apply(x[None], *_quantized(weights), True)),
        ),
    },
    "lora_mlp": {
        **FROZEN,
        **_peft(_peft_mlp),
        "unsloth": Peer(f"{_UNSLOTH}.fast_lora", _unsloth_mlp),
    },
}
