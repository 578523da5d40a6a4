"""What the ops' autograd.Functions share."""

import functools

import torch


class _NoSecondDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gradient, *inputs):
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            "PyFast's kernels have no second derivative: run the op under pyfast.use_backend('torch') if you need one"
        )


def first_order(backward):
    """Decorates an autograd.Function's backward: differentiating its result again raises one clear error.

    (torch's once_differentiable lets a second derivative pass as zero where the incoming gradient is a constant.)
    """

    @functools.wraps(backward)
    def wrapper(ctx, *gradients):
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return backward(ctx, *gradients)
        with torch.no_grad():
            results = backward(ctx, *gradients)
        results = results if isinstance(results, tuple) else (results,)
        inputs = [x for x in (*ctx.saved_tensors, *gradients) if x is not None and x.requires_grad]
        inputs.append(torch.empty(0, requires_grad=True))
        return tuple(None if r is None else _NoSecondDerivative.apply(r, *inputs) for r in results)

    return wrapper


def anchor(*tensors: torch.Tensor | None) -> torch.Tensor:
    """An empty tensor that hangs on the graph of those that require grad.

    An op that saves its gradients instead of its inputs saves this too: through it a second derivative finds its way
    to the inputs, and raises, without the inputs being kept.
    """
    return torch.cat([t[:0].reshape(-1) for t in tensors if t is not None and t.requires_grad])


def distinct(*arguments):
    """arguments, a tensor that comes again as a view of itself: torch.compile wants every argument of an
    autograd.Function to be another tensor."""
    if not torch.compiler.is_compiling():
        return arguments
    return tuple(
        a.view_as(a) if isinstance(a, torch.Tensor) and any(a is b for b in arguments[:i]) else a
        for i, a in enumerate(arguments)
    )


#: asked once: torch.compile of torch 2.11 cannot look into the question
_HAVE_AUTOCAST = frozenset(d for d in ("cpu", "cuda", "xpu", "mps", "hpu") if torch.amp.is_autocast_available(d))


def autocast(*tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """Under torch.autocast, the tensors in its dtype (matrix ops cast; norms and losses do not); otherwise as they are.

    fp64 stays, as in torch's own autocast.
    """
    device = next(t for t in tensors if t is not None).device.type
    if device not in _HAVE_AUTOCAST or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors
    )
