"""The public ops. Each is differentiable and runs on the backend that pyfast.dispatch chooses."""

from pyfast.ops import schemas  # noqa: F401  registers the kernels' schemas before any op is called
from pyfast.ops.activation import geglu, gelu_bias, swiglu
from pyfast.ops.attention import attention, attention_varlen
from pyfast.ops.cross_entropy import cross_entropy
from pyfast.ops.dropout import dropout
from pyfast.ops.linear_cross_entropy import linear_cross_entropy
from pyfast.ops.lora import LoraWeights, lora_linear, lora_linears, lora_mlp
from pyfast.ops.norm import layer_norm, rms_norm
from pyfast.ops.rope import rope
from pyfast.quantized import QuantizedWeight

__all__ = [
    "LoraWeights",
    "QuantizedWeight",
    "attention",
    "attention_varlen",
    "cross_entropy",
    "dropout",
    "geglu",
    "gelu_bias",
    "layer_norm",
    "linear_cross_entropy",
    "lora_linear",
    "lora_linears",
    "lora_mlp",
    "rms_norm",
    "rope",
    "swiglu",
]
