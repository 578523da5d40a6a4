"""dropout: elements of hidden states at random (Srivastava et al. 2014), from a seed that replays them."""

import torch

from pyfast import dispatch, philox, reference
from pyfast.ops.autograd import first_order
from pyfast.ops.checks import check_floating


def dropout(x: torch.Tensor, p: float, *, seed: int | torch.Tensor | None = None) -> torch.Tensor:
    """x with each element dropped with probability p, the others scaled by 1 / (1 - p).

    x: (...), floating. p: in [0, 1). seed: int, 0-dim int64 tensor, or None: drawn from torch's default generator;
    which elements are dropped is a function of it and of their index alone, the same on every backend.
    Returns (...) in x's dtype, contiguous. Saves the seed for backward, no mask.
    Raises TypeError for a non-floating x or a wrong seed, ValueError for a p outside [0, 1).
    """
    check_floating("dropout", x=x)
    philox.check_dropout("dropout", p)
    seed = philox.seed_tensor("dropout", seed, x.device)
    backend = dispatch.choose("dropout", x)
    if backend == "reference":
        return reference.dropout(x, p, seed=seed)
    if backend == "torch":
        return philox.dropout(x, p, seed)
    return _Dropout.apply(x, seed, p, backend)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, seed, p, backend):
        ctx.p, ctx.backend = p, backend
        ctx.save_for_backward(seed)
        return dispatch.kernels(backend).dropout(x, seed, p)

    @staticmethod
    @first_order
    def backward(ctx, dy):
        (seed,) = ctx.saved_tensors
        return dispatch.kernels(ctx.backend).dropout(dy, seed, ctx.p), None, None, None
