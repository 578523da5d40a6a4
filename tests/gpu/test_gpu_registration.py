"""The kernels as torch sees them on a GPU: schemas, torch.compile, no synchronisation, CUDA graphs."""

import pytest
import torch
from harness import run
from test_registration import *  # noqa: F403

import pyfast
from pyfast import dispatch, ops
from pyfast.ops import LoraWeights


def leaf(*shape):
    return torch.randn(shape, dtype=torch.float16, requires_grad=True)


def projection(n, k):
    return LoraWeights(leaf(n, k).detach(), leaf(4, k), leaf(n, 4), 2.0)


def head_loss(x, weight, target):
    return ops.linear_cross_entropy(x, weight, target, z_loss=1e-3)


#: op -> (function, its arguments)
STEPS = {
    "attention": (
        lambda q, k, v: ops.attention(q, k, v, causal=True, dropout_p=0.1, seed=torch.zeros((), dtype=torch.long)),
        lambda: [leaf(2, 4, 33, 32), leaf(2, 2, 33, 32), leaf(2, 2, 33, 32)],
    ),
    "attention_varlen": (
        lambda q, k, v, cu: ops.attention_varlen(q, k, v, cu, cu, 20, 20, causal=True),
        lambda: [leaf(40, 4, 32), leaf(40, 2, 32), leaf(40, 2, 32), torch.tensor([0, 20, 20, 37], dtype=torch.int32)],
    ),
    "cross_entropy": (ops.cross_entropy, lambda: [leaf(17, 301), torch.arange(17)]),
    "linear_cross_entropy": (head_loss, lambda: [leaf(17, 64), leaf(301, 64), torch.arange(17)]),
    "swiglu": (ops.swiglu, lambda: [leaf(17, 64), leaf(17, 64)]),
    "gelu_bias": (ops.gelu_bias, lambda: [leaf(17, 64), leaf(64)]),
    "rms_norm": (lambda x, w: ops.rms_norm(x, w, 1e-6), lambda: [leaf(17, 64), leaf(64)]),
    "rope": (
        ops.rope,
        lambda: [leaf(2, 4, 33, 32), leaf(2, 2, 33, 32), leaf(1, 33, 32).detach(), leaf(1, 33, 32).detach()],
    ),
    "lora_linears": (ops.lora_linears, lambda: [leaf(17, 64), [projection(32, 64), projection(48, 64)]]),
    "lora_mlp": (ops.lora_mlp, lambda: [leaf(17, 64), projection(48, 64), projection(48, 64), projection(32, 48)]),
}


@pytest.fixture(params=STEPS)
def name(request, kernel):
    """Of an op that the backend has kernels for."""
    if kernel[0] not in dispatch.TABLE[request.param]["cuda"]:
        pytest.skip(f"{kernel[0]} has no kernel for {request.param}")
    return request.param


def step(op, arguments):
    """Forward and backward; the results."""
    outputs = op(*arguments)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    tensors = [t for a in arguments for t in torch.utils._pytree.tree_leaves(a) if isinstance(t, torch.Tensor)]
    return outputs, torch.autograd.grad(
        outputs, [t for t in tensors if t.requires_grad], [*map(torch.ones_like, outputs)]
    )


def test_nothing_waits_for_the_gpu(name, kernel):
    """So that the host runs ahead of the GPU, and a step can be captured."""
    op, arguments = STEPS[name]
    with pyfast.use_backend(kernel[0]):
        arguments = arguments()
        step(op, arguments)  # compiles
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(op, arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_captured(name, kernel):
    """A CUDA graph of a step gives the step's results for new inputs."""
    op, arguments = STEPS[name]
    with pyfast.use_backend(kernel[0]):
        arguments = arguments()
        x = arguments[0]
        step(op, arguments)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step(op, arguments)
        with torch.no_grad():
            x.copy_(torch.randn_like(x))
        graph.replay()
        torch.testing.assert_close(captured, step(op, arguments), rtol=0, atol=0)


def test_compiled(name, kernel):
    """fullgraph=True traces through every op; forward and backward are eager's."""
    torch._dynamo.reset()
    op, arguments = STEPS[name]
    arguments = arguments()
    compiled = torch.compile(lambda *a: op(*a), fullgraph=True, backend="aot_eager")
    eager = run(op, arguments, backend=kernel[0])
    torch.testing.assert_close(run(compiled, arguments, backend=kernel[0])[:2], eager[:2], rtol=0, atol=0)


def test_bad_values(kernel):
    """They raise under `pyfast.checks()`; otherwise a bad target makes its row NaN, and nothing outside is read."""
    x, target, q = torch.randn(3, 33), torch.tensor([1, 33, 2]), torch.randn(10, 2, 16)
    cu_seqlens = torch.tensor([0, 4, 1 << 20], dtype=torch.int32)
    with pyfast.use_backend(kernel[0]):
        assert ops.cross_entropy(x, target, reduction="none").isnan().tolist() == [False, True, False]
        assert ops.attention_varlen(q, q, q, cu_seqlens, cu_seqlens, 6, 6).isfinite().all()
        with pyfast.checks():
            with pytest.raises(ValueError, match="target has 1 values out of range, the first 33"):
                ops.cross_entropy(x, target)
            with pytest.raises(ValueError, match="cu_seqlens_q ends at 1048576"):
                ops.attention_varlen(q, q, q, cu_seqlens, cu_seqlens, 6, 6)
