"""rms_norm, layer_norm: bytes are x read and y written forward; x and dy read and dx written backward.

With residual: the sum is written too, and its gradient read.
"""

import torch
import torch.nn.functional as F

from pyfast import ops

from .harness import DTYPES, Case, compiled
from .machine import elements_beyond_cache
from .roofline import clones

SHAPES = ((64, 768), (2048, 768), (elements_beyond_cache() // 4096, 4096))


def rms_norm(x, weight):
    return F.rms_norm(x, x.shape[-1:], weight, 1e-6)


def rms_norm_residual(x, weight, residual):
    total = x + residual
    return rms_norm(total, weight), total


def layer_norm(x, weight, bias):
    return F.layer_norm(x, x.shape[-1:], weight, bias, 1e-6)


#: op, PyFast's function, torch's, the other inputs (vectors, or x's shape), tensors of x's size moved
OPS = (
    ("rms_norm", lambda x, w: ops.rms_norm(x, w, 1e-6), rms_norm, "v", 5),
    ("rms_norm with residual", lambda x, w, r: ops.rms_norm(x, w, 1e-6, residual=r), rms_norm_residual, "vx", 8),
    ("layer_norm", lambda x, w, b: ops.layer_norm(x, w, b, 1e-6), layer_norm, "vv", 5),
)


def cases():
    for name, dtype in DTYPES.items():
        for rows, width in SHAPES:
            for op, ours, torchs, others, moved in OPS:

                def inputs(rows=rows, width=width, dtype=dtype, others=others):
                    shapes = [(rows, width), *({"v": (width,), "x": (rows, width)}[kind] for kind in others)]
                    return tuple(torch.randn(shape).to(dtype).requires_grad_() for shape in shapes)

                yield Case(
                    op,
                    f"{name} {rows} × {width}",
                    inputs,
                    {"pyfast": ours, "torch": torchs, "compile": compiled(torchs)},
                    dtype,
                    {"clone": lambda x, *_, moved=moved: clones(moved / 2, x)},
                    bytes=moved * rows * width * dtype.itemsize,
                )
