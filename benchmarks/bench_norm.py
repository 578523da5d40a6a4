"""rms_norm, layer_norm: bytes are x read and y written forward; x and dy read and dx written backward.

With residual: the sum is written too, and its gradient read.
"""

import torch.nn.functional as F

from pyfast import ops

from .harness import on_rows
from .machine import elements_beyond_cache

SHAPES = ((64, 768), (2048, 768), (elements_beyond_cache() // 4096, 4096))


def rms_norm(x, weight):
    return F.rms_norm(x, x.shape[-1:], weight, 1e-6)


def rms_norm_residual(x, weight, residual):
    total = x + residual
    return rms_norm(total, weight), total


def layer_norm(x, weight, bias):
    return F.layer_norm(x, x.shape[-1:], weight, bias, 1e-6)


#: as `on_rows` takes them
OPS = (
    ("rms_norm", lambda x, w: ops.rms_norm(x, w, 1e-6), rms_norm, "xv", 5),
    ("rms_norm with residual", lambda x, w, r: ops.rms_norm(x, w, 1e-6, residual=r), rms_norm_residual, "xvx", 8),
    ("layer_norm", lambda x, w, b: ops.layer_norm(x, w, b, 1e-6), layer_norm, "xvv", 5),
)


def cases():
    return on_rows(SHAPES, OPS)
