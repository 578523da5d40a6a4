"""The Triton kernels behind the public ops: chosen only where they should be, and understood by torch.compile."""

import calls
import pytest
import torch
from calls import seed, x
from harness import run
from torch.utils._pytree import tree_map_only

import pyfast
from pyfast import dispatch
from pyfast.ops import swiglu

up, bias, rstd = torch.randn(5, 33), torch.randn(33), torch.rand(5)
heads, angles = torch.randn(2, 4, 7, 20), torch.randn(2, 7, 18)
w, a, b = torch.randn(2, 20, 33), torch.randn(2, 3, 33), torch.randn(2, 20, 3)
projections = ([*w], [*a], [*b], [2.0, 0.5], [bias[:20], None], 0.3, [seed, seed])
down = torch.randn(33, 20), torch.randn(5, 20), torch.randn(33, 5)
mlp = ([*w, down[0]], [*a, down[1]], [*b, down[2]], [2.0, 0.5, 1.0], [None] * 3, 0.0, [None] * 3)
rows, head, row_target = torch.randn(7, 33), torch.randn(20, 33), torch.tensor([3, -100, 19, 0, 7, -100, 2])
hidden = [torch.randn(7, 20), torch.randn(7, 20)]

#: schema -> arguments of a few calls
CALLS = calls.CALLS | {
    "gated": [(x, up, "silu"), (up, up, "gelu")],
    "gated_backward": [(up, x, up, "gelu_tanh"), (up, up, up, "relu")],
    "activate": [(x, bias, "gelu")],
    "activate_backward": [(up, x, bias, "gelu", True), (up, x, bias, "gelu", False)],
    "norm": [(x, None, None, None, 1e-5, 0.5, False), (x, bias, torch.randn(5, 33), up, 1e-5, 0.0, True)],
    "norm_backward": [
        (up, None, x, torch.empty(0), rstd, bias, None, 0.5, False, True, False),
        (up, x, x, rstd, rstd, torch.randn(5, 33), bias, 0.0, True, True, True),
    ],
    "dequantize": [(torch.randint(256, (40, 1), dtype=torch.uint8), torch.rand(5), [0.5] * 16, 1, 80, 1, 16, x.dtype)],
    "dropout": [(x, seed, 0.3)],
    "linear_cross_entropy": [
        (rows, head, bias[:20], a[0], head[:, :3], row_target, None, *upstream, 1.0, -100, 0.1, None, 2.0, 400, needs)
        for upstream, needs in (([None], [False] * 5), ([torch.rand(7, 2, dtype=torch.float64)], [True] * 5))
    ],
    "lora_linears": [(rows, *projections)],
    "lora_linears_backward": [
        (hidden, rows, torch.randn(7, 6), *projections, [True] * 8 + [False]),
        (hidden, None, None, *projections, [True] + [False] * 8),
    ],
    "lora_mlp": [(rows, *mlp, "silu")],
    "lora_mlp_backward": [
        (rows, rows, hidden, torch.randn(7, 6), torch.randn(7, 5), *mlp, "gelu", [True] + [True, True, True, False] * 3)
    ],
    "rope": [
        (heads, angles, angles, False, False),
        (heads.transpose(1, 2), angles[:1, :4], angles[:1, :4], True, True),
    ],
}


def test_every_launcher_has_calls(kernel):
    from pyfast.kernels import launch

    assert CALLS.keys() == launch.launchers().keys()


@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name, kernel):
    """Schema, fake, and no input changed or aliased."""
    for call in CALLS[name]:
        call = tree_map_only(torch.Tensor, lambda t: t.to(torch.get_default_device()), call)
        torch.library.opcheck(getattr(torch.ops.pyfast_triton, name).default, call)


def test_never_chosen_on_a_cpu():
    for op, row in dispatch.TABLE.items():
        assert "triton" not in row["cpu"]
        assert dispatch.choose(op, torch.randn(3)) != "triton"


def test_refuses_what_it_does_not_serve(kernel):
    with pyfast.use_backend("triton"), pytest.raises(ValueError, match="kernels serve float32, bfloat16 and float16"):
        swiglu(torch.randn(3, dtype=torch.float64), torch.randn(3, dtype=torch.float64))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic, kernel):
    """fullgraph=True traces through the kernels' fakes."""
    compiled = torch.compile(lambda a, b: swiglu(a, b), fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (4, 7):
        args = [torch.randn(rows, 33, requires_grad=True) for _ in range(2)]
        eager = run(swiglu, args, backend="triton")
        torch.testing.assert_close(run(compiled, args, backend="triton")[:2], eager[:2], rtol=0, atol=0)
