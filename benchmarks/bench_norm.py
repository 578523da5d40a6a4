"""rms_norm, layer_norm: bytes are x read and y written forward; x and dy read and dx written backward."""

from functools import partial

import torch
import torch.nn.functional as F

from pyfast import ops

from .bench_activation import DTYPES
from .harness import Case

SHAPES = ((64, 768), (2048, 768), (8192, 4096))


def cases():
    for name, dtype in DTYPES.items():
        for rows, width in SHAPES:
            size = rows * width * dtype.itemsize

            def inputs(vectors, rows=rows, width=width, dtype=dtype):
                shapes = ((rows, width), *[(width,)] * vectors)
                return tuple(torch.randn(shape).to(dtype).requires_grad_() for shape in shapes)

            label = f"{name} {rows} × {width}"
            rms = {
                "pyfast": lambda x, w: ops.rms_norm(x, w, 1e-6),
                "torch": lambda x, w: F.rms_norm(x, x.shape[-1:], w, 1e-6),
            }
            yield Case("rms_norm", label, partial(inputs, 1), rms, bytes=5 * size)
            layer = {
                "pyfast": lambda x, w, b: ops.layer_norm(x, w, b, 1e-6),
                "torch": lambda x, w, b: F.layer_norm(x, x.shape[-1:], w, b, 1e-6),
            }
            # torch sums the gradient of a bf16 weight in bf16: it is torch that is off by 3 %
            yield Case("layer_norm", label, partial(inputs, 2), layer, bytes=5 * size, tolerance=5e-2)
