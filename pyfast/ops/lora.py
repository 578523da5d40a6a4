"""lora_linear, lora_linears, lora_mlp: frozen linear layers with low-rank adapters (Hu et al. 2021, "LoRA"; the layer
is PEFT's)."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from pyfast import dispatch, philox, reference
from pyfast.ops.autograd import autocast, distinct, first_order
from pyfast.ops.checks import beside, check_floating, check_number, check_parameter, describe, like
from pyfast.quantized import FP8_TILE, NF4_LEVELS, QuantizedWeight, dequantize


class LoraWeights(NamedTuple):
    """One projection, y = x weight^T + bias + scaling (x lora_A^T) lora_B^T.

    weight: (N, K) in x's dtype, any strides, or a QuantizedWeight.
    lora_A: (r, K), lora_B: (N, r), both None for a projection without an adapter. bias: (N,) or None.
    Adapter and bias are in x's dtype or fp32.
    """

    weight: torch.Tensor | QuantizedWeight
    lora_A: torch.Tensor | None = None
    lora_B: torch.Tensor | None = None
    scaling: float = 1.0
    bias: torch.Tensor | None = None


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor | QuantizedWeight,
    lora_A: torch.Tensor | None = None,
    lora_B: torch.Tensor | None = None,
    scaling: float = 1.0,
    *,
    bias: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | torch.Tensor | None = None,
) -> torch.Tensor:
    """y = x weight^T + bias + scaling (dropout(x) lora_A^T) lora_B^T.

    x: (..., K), floating. Returns (..., N) in x's dtype; accumulated in fp32.
    weight: (N, K) in x's dtype, any strides, or a QuantizedWeight. lora_A: (r, K) and lora_B: (N, r), or None both.
    bias: (N,). Adapter and bias may be fp32 beside a lower-precision x: products run in x's dtype, each gradient has
    its parameter's dtype. The gradients of weight and bias are computed only where they require one.
    dropout_p: probability in [0, 1) with which an element of x is dropped before lora_A; which ones is a function of
    seed (int, 0-dim int64 tensor, or None: drawn from torch's default generator) and the element's index alone.
    Under autocast, x and weight are cast to its dtype.
    Saves x, x lora_A^T (r columns) and the parameters for backward, nothing else.
    Raises ValueError for shapes that do not fit, r = 0, or differing devices; TypeError for wrong types and dtypes.
    """
    projection = LoraWeights(weight, lora_A, lora_B, scaling, bias)
    return _linears("lora_linear", x, {"": projection}, dropout_p, [seed])[0]


def lora_linears(
    x: torch.Tensor,
    projections: Sequence[LoraWeights],
    *,
    dropout_p: float = 0.0,
    seeds: Sequence[int | torch.Tensor | None] | None = None,
) -> tuple[torch.Tensor, ...]:
    """lora_linear for several projections of one x (q, k and v; gate and up) as one node.

    x: (..., K). projections: LoraWeights, each with its own N and r. seeds: one per projection, see lora_linear; each
    projection has a dropout mask of its own. Returns a tuple of (..., N). x is read once for all adapters and its
    gradient is summed in place. Raises as lora_linear does.
    """
    if not isinstance(projections, Sequence) or not projections:
        raise ValueError("lora_linears: projections is empty or no sequence, expected one LoraWeights or more")
    named = {f"projections[{i}].": p for i, p in enumerate(projections)}
    return _linears("lora_linears", x, named, dropout_p, seeds)


def lora_mlp(
    x: torch.Tensor,
    gate: LoraWeights | None,
    up: LoraWeights,
    down: LoraWeights,
    *,
    activation: str = "silu",
    dropout_p: float = 0.0,
    seeds: Sequence[int | torch.Tensor | None] | None = None,
) -> torch.Tensor:
    """down(activation(gate(x)) * up(x)), or down(activation(up(x))) where gate is None.

    x: (..., K). gate, up: LoraWeights of (I, K); down: of (N, I). Returns (..., N).
    activation: "silu", "gelu" (erf), "gelu_tanh" or "relu".
    seeds: for gate, up, down, or for up, down without a gate; see lora_linear.
    Saves x, gate(x), up(x) and the adapters' inner products for backward; the activation product is recomputed.
    Raises as lora_linear does, and ValueError for an unknown activation.
    """
    op = "lora_mlp"
    if activation not in tuple(reference.ACTIVATIONS):
        raise ValueError(f"{op}: activation is {activation!r}, expected one of {', '.join(reference.ACTIVATIONS)}")
    x = _autocast_input(op, x)
    named = {"up.": up} if gate is None else {"gate.": gate, "up.": up}
    first = [_check(op, prefix, p, x, x.shape[-1]) for prefix, p in named.items()]
    width = first[0].weight.shape[0]
    if first[-1].weight.shape[0] != width:
        raise ValueError(
            f"{op}: up.weight has shape {tuple(first[-1].weight.shape)}, expected the {width} rows of gate.weight"
        )
    down = _check(op, "down.", down, x, width)
    seeds = _seeds(op, seeds, len(first) + 1, dropout_p, x.device)
    backend = dispatch.choose(op, x)
    if backend == "reference":
        gate = first[0] if gate is not None else None
        return reference.lora_mlp(x, gate, first[-1], down, activation=activation, dropout_p=dropout_p, seeds=seeds)
    if backend == "torch":
        hidden = _torch_linears(x, first, dropout_p, seeds[:-1])
        a = _TORCH_ACTIVATIONS[activation](hidden[0])
        return _torch_linears(a if gate is None else a * hidden[1], [down], dropout_p, seeds[-1:])[0]
    return _Mlp.apply(*_flat(backend, x, [*first, down], dropout_p, seeds, activation))


def _linears(op, x, named, dropout_p, seeds):
    """lora_linears with the caller's name and a prefix for each projection's arguments in messages."""
    x = _autocast_input(op, x)
    projections = [_check(op, prefix, p, x, x.shape[-1]) for prefix, p in named.items()]
    seeds = _seeds(op, seeds, len(projections), dropout_p, x.device)
    plain = dropout_p == 0 and not any(isinstance(p.weight, QuantizedWeight) for p in projections)
    size = x.numel() * sum(p.weight.shape[0] for p in projections) if plain else None
    backend = dispatch.choose(op, x, size)
    if backend == "reference":
        return reference.lora_linears(x, projections, dropout_p=dropout_p, seeds=seeds)
    if backend == "torch":
        return _torch_linears(x, projections, dropout_p, seeds)
    return _Linears.apply(*_flat(backend, x, projections, dropout_p, seeds))


def _autocast_input(op, x):
    check_floating(op, x=x)
    if x.dim() == 0:
        raise ValueError(f"{op}: x is {describe(x)}, expected (..., K)")
    return autocast(x)[0]


def _check(op, prefix, p, x, k) -> LoraWeights:
    """The projection of an input with k columns and x's dtype and device, checked, its weight cast under autocast."""
    if not isinstance(p, LoraWeights):
        raise TypeError(f"{op}: {prefix.rstrip('.')} is {type(p).__name__}, expected LoraWeights")
    if _fits(p, x, k):
        return p
    weight, lora_A, lora_B, scaling, bias = p
    if not isinstance(weight, QuantizedWeight):
        check_floating(op, **{f"{prefix}weight": weight})
    if weight.device != x.device:
        raise ValueError(f"{op}: {prefix}weight is on {weight.device}, expected x's device, {x.device}")
    if not isinstance(weight, QuantizedWeight):
        (weight,) = autocast(weight)
        if weight.dtype != x.dtype:
            raise TypeError(f"{op}: {prefix}weight is {describe(weight)}, expected x's dtype, {x.dtype}")
    if len(weight.shape) != 2 or weight.shape[1] != k:
        raise ValueError(
            f"{op}: {prefix}weight has shape {tuple(weight.shape)}, expected (N, {k}) for an input with {k} columns"
        )
    n = weight.shape[0]
    if (lora_A is None) != (lora_B is None):
        raise ValueError(f"{op}: {prefix}lora_A and {prefix}lora_B must both be given, or neither")
    expected = {}
    if lora_A is not None:
        check_floating(op, **{f"{prefix}lora_A": lora_A, f"{prefix}lora_B": lora_B})
        rank = lora_A.shape[0] if lora_A.dim() == 2 else 1
        if rank == 0:
            raise ValueError(f"{op}: {prefix}lora_A has rank r = 0, expected r >= 1 (or None for no adapter)")
        expected = {f"{prefix}lora_A": (lora_A, (rank, k), "(r, K)"), f"{prefix}lora_B": (lora_B, (n, rank), "(N, r)")}
    if bias is not None:
        expected[f"{prefix}bias"] = (bias, (n,), "(N,)")
    check_parameter(op, x, **{name: tensor for name, (tensor, _, _) in expected.items()})
    for name, (tensor, shape, letters) in expected.items():
        if tensor.shape != shape:
            raise ValueError(f"{op}: {name} is {describe(tensor)}, expected {letters} = {shape}")
    check_number(op, **{f"{prefix}scaling": scaling})
    return LoraWeights(weight, lora_A, lora_B, float(scaling), bias)


def _fits(p, x, k) -> bool:
    """Whether nothing is wrong with a projection and nothing is to be cast: asked at each call, so kept short."""
    weight, lora_A, lora_B, scaling, bias = p
    if isinstance(weight, QuantizedWeight) or not like(weight, x) or weight.dim() != 2 or type(scaling) is not float:
        return False
    n, columns = weight.shape
    if columns != k or not (bias is None or (beside(bias, x) and bias.shape == (n,))):
        return False
    if lora_A is None or lora_B is None:
        return lora_A is lora_B
    if not (beside(lora_A, x) and beside(lora_B, x)):
        return False
    return lora_B.dim() == 2 and lora_B.shape[1] > 0 and lora_A.shape == (lora_B.shape[1], k) and lora_B.shape[0] == n


def _seeds(op, seeds, count, dropout_p, device):
    """A seed tensor per projection, or None for each where nothing is dropped."""
    philox.check_dropout(op, dropout_p)
    if seeds is None:
        seeds = [None] * count
    if not isinstance(seeds, Sequence) or len(seeds) != count:
        raise ValueError(f"{op}: seeds is {seeds!r}, expected a sequence of {count}, one per projection")
    if dropout_p == 0:
        return [None] * count
    return [philox.seed_tensor(op, seed, device) for seed in seeds]


# ---- backend "torch"
_TORCH_ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


def _torch_linears(x, projections, dropout_p, seeds):
    """PyTorch's own ops, as PEFT composes them, in x's dtype."""
    results = []
    for (weight, lora_A, lora_B, scaling, bias), seed in zip(projections, seeds, strict=True):
        if isinstance(weight, QuantizedWeight):
            weight = dequantize(weight, x.dtype)
        y = F.linear(x, weight, None if bias is None else bias.to(x.dtype))
        if lora_A is not None:
            h = F.linear(philox.dropout(x, dropout_p, seed), lora_A.to(x.dtype))
            y = y + F.linear(h, lora_B.to(x.dtype)) * scaling
        results.append(y)
    return tuple(results)


# ---- kernels
class _Spec(NamedTuple):
    """What a node knows besides its tensors."""

    backend: str
    dropout_p: float
    scaling: tuple[float, ...]
    quantized: tuple[tuple | None, ...]  # format, shape and blocksize of each QuantizedWeight
    activation: str | None


def _flat(backend, x, projections, dropout_p, seeds, activation=None):
    """A spec, x and the projections' tensors by kind: all weights, their scales, lora_A, lora_B, biases, seeds."""
    quantized = [p.weight if isinstance(p.weight, QuantizedWeight) else None for p in projections]
    spec = _Spec(
        backend,
        float(dropout_p),
        tuple(p.scaling for p in projections),
        tuple(q and (q.format, q.shape, q.blocksize) for q in quantized),
        activation,
    )
    weights = [p.weight if q is None else q.data for p, q in zip(projections, quantized, strict=True)]
    scales = [q and q.scale for q in quantized]
    columns = zip(*((p.lora_A, p.lora_B, p.bias) for p in projections), strict=True)
    tensors = [*weights, *scales, *(tensor for column in columns for tensor in column), *seeds]
    return spec, *distinct(x, *tensors)


def _kernel_arguments(spec, dtype, tensors, left_out=()):
    """weight, lora_A, lora_B, scaling, bias, dropout_p, seed as the kernels take them; the quantised weights of the
    projections that are left out with no columns."""
    count = len(spec.scaling)
    weights, _, lora_A, lora_B, bias, seeds = (list(tensors[i * count : (i + 1) * count]) for i in range(6))
    for i, weight in _quantized(spec, tensors).items():
        if i in left_out:
            weights[i] = weight.data.new_empty((weight.shape[0], 0), dtype=dtype)
        else:
            weights[i] = _dequantize(spec.backend, weight, dtype)
    return weights, lora_A, lora_B, list(spec.scaling), bias, spec.dropout_p, seeds


def _quantized(spec, tensors):
    """The quantised weights by projection."""
    data, scales = tensors, tensors[len(spec.scaling) :]
    return {
        i: QuantizedWeight(meta[0], data[i], scales[i], *meta[1:])
        for i, meta in enumerate(spec.quantized)
        if meta is not None
    }


#: backend -> how many rows at most its quantized_linear takes, which multiplies with codes in 16 bits
_FEW_ROWS = {"cuda": 32, "emulator": 32}


def _linears_forward(spec, rows, tensors):
    """The results and h of lora_linears. Where rows are few, quantised weights are not written out."""
    kernels, quantized = dispatch.kernels(spec.backend), {}
    if rows.dtype != torch.float32 and rows.shape[1] > 0 and rows.shape[0] <= _FEW_ROWS.get(spec.backend, 0):
        quantized = _quantized(spec, tensors)
    results, h = kernels.lora_linears(rows, *_kernel_arguments(spec, rows.dtype, tensors, quantized))
    results = [
        kernels.quantized_linear(rows, y, *_codes(quantized[i])) if i in quantized else y for i, y in enumerate(results)
    ]
    return results, h


_INT8_LEVELS = tuple(float(code if code < 128 else code - 256) for code in range(256))
_FP8_LEVELS = {
    dtype: tuple(torch.arange(256, dtype=torch.uint8).view(dtype).float().tolist())
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2)
}


def _codes(weight):
    """codes, scale, levels, n, k, block_rows and block_columns as the kernels take them."""
    (n, k), data = weight.shape, weight.data.contiguous()
    if weight.format == "nf4":  # blocks run on from row to row: one long row
        shape, block, levels = (1, n * k), (1, weight.blocksize), NF4_LEVELS
    elif weight.format == "int8":
        shape, block, levels = (n, k), (1, k), _INT8_LEVELS
    else:
        tile = (n, k) if weight.scale.dim() == 0 else (FP8_TILE, FP8_TILE)
        shape, block, levels = (n, k), tile, _FP8_LEVELS[data.dtype]
    return data.view(torch.uint8), weight.scale.float().contiguous(), levels, *shape, *block


def _dequantize(backend, weight, dtype):
    return dispatch.kernels(backend).dequantize(*_codes(weight), dtype).view(weight.shape)


def _rows(x):
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).contiguous()


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(ctx, spec, x, *tensors):
        rows = _rows(x)
        results, h = _linears_forward(spec, rows, tensors)
        ctx.spec, ctx.leading = spec, x.shape[:-1]
        projections = range(len(spec.scaling))
        x_needed, h_needed = _needed(ctx, projections)
        ctx.save_for_backward(rows if x_needed else None, h if h_needed else None, *tensors)
        return tuple(y.view(*ctx.leading, y.shape[-1]) for y in results)

    @staticmethod
    @first_order
    def backward(ctx, *dy):
        x, h, *tensors = ctx.saved_tensors
        dy, wanted = [_rows(d) for d in dy], _wanted(ctx)
        arguments = _kernel_arguments(ctx.spec, dy[0].dtype, tensors)
        found = dispatch.kernels(ctx.spec.backend).lora_linears_backward(dy, x, h, *arguments, wanted)
        return _gradients(ctx, wanted, found)


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, spec, x, *tensors):
        rows, arguments = _rows(x), _kernel_arguments(spec, x.dtype, tensors)
        y, hidden, h, h_down = dispatch.kernels(spec.backend).lora_mlp(rows, *arguments, spec.activation)
        ctx.spec, ctx.leading, ctx.hidden = spec, x.shape[:-1], len(hidden)
        x_needed, h_needed = _needed(ctx, range(len(hidden)))
        _, h_down_needed = _needed(ctx, [len(hidden)])
        saved = (rows if x_needed else None, h if h_needed else None, h_down if h_down_needed else None)
        ctx.save_for_backward(*saved, *hidden, *tensors)
        return y.view(*ctx.leading, y.shape[-1])

    @staticmethod
    @first_order
    def backward(ctx, dy):
        x, h, h_down, *tensors = ctx.saved_tensors
        hidden, tensors = tensors[: ctx.hidden], tensors[ctx.hidden :]
        wanted = _wanted(ctx)
        arguments = _kernel_arguments(ctx.spec, dy.dtype, tensors)
        found = dispatch.kernels(ctx.spec.backend).lora_mlp_backward(
            _rows(dy), x, hidden, h, h_down, *arguments, ctx.spec.activation, wanted
        )
        return _gradients(ctx, wanted, found)


_WEIGHT, _SCALE, _LORA_A, _LORA_B, _BIAS, _SEED = range(6)  # the kinds of a projection's tensors, in _flat's order


def _needs(ctx, projection, kind):
    return ctx.needs_input_grad[2 + kind * len(ctx.spec.scaling) + projection]


def _needed(ctx, projections):
    """Whether the backward of these projections needs their input (for weight and lora_A) and h (for lora_B)."""
    x = any(_needs(ctx, i, kind) for i in projections for kind in (_WEIGHT, _LORA_A))
    return x, any(_needs(ctx, i, _LORA_B) for i in projections)


def _wanted(ctx):
    """Which gradients the backward kernels shall compute, in their order."""
    kinds = (_WEIGHT, _LORA_A, _LORA_B, _BIAS)
    return [ctx.needs_input_grad[1], *(_needs(ctx, i, kind) for i in range(len(ctx.spec.scaling)) for kind in kinds)]


def _gradients(ctx, wanted, found):
    """The kernels' gradients in the order of the node's inputs, None for those that were not wanted."""
    found = iter(found)
    dx, *rest = (next(found) if w else None for w in wanted)
    weight, lora_A, lora_B, bias = (rest[i::4] for i in range(4))
    nothing = [None] * len(weight)
    dx = None if dx is None else dx.view(*ctx.leading, dx.shape[-1])
    return None, dx, *weight, *nothing, *lora_A, *lora_B, *bias, *nothing
