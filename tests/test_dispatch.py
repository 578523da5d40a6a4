"""The choice of a backend by a call's size."""

import pytest
import torch
from close import assert_close

import pyfast
from pyfast import dispatch, ops
from pyfast.quantized import QuantizedWeight

SMALL = dispatch.SMALL  # as it is outside of tests: conftest.py empties it


def draw(*shape, grad=True):
    return torch.randn(shape).requires_grad_(grad)


def layer_norm(x, weight, bias, residual=None):
    return ops.layer_norm(x, weight, bias, 1e-5, residual=residual)


def attention(q, k, v, **options):
    with torch.no_grad():
        return ops.attention(q, k, v, causal=True, **options)


def losses(rows):
    return draw(rows, 40), torch.randint(40, (rows,))


def heads(rows):
    """One query and a number of keys; the size is 2 * 2 * 8 times that."""
    return tuple(draw(1, 2, length, 8) for length in (1, rows, rows))


#: op -> function, inputs of a number of rows, what a row adds to the size, options with which the kernels serve it
#: whatever the size
CASES = {
    "swiglu": (ops.swiglu, lambda rows: (draw(rows, 8), draw(rows, 8)), 8, []),
    "layer_norm": (
        layer_norm,
        lambda rows: (draw(rows, 8), draw(8), draw(8)),
        8,
        [lambda rows: {"residual": draw(rows, 8)}],
    ),
    "cross_entropy": (
        ops.cross_entropy,
        losses,
        40,
        [lambda rows: {"softcap": 5.0}, lambda rows: {"z_loss": 0.1}, lambda rows: {"weight": torch.rand(40)}],
    ),
    "linear_cross_entropy": (
        ops.linear_cross_entropy,
        lambda rows: (draw(rows, 8), draw(40, 8), torch.randint(40, (rows,))),
        8 * 40,
        [
            lambda rows: {"softcap": 5.0},
            lambda rows: {"z_loss": 0.1},
            lambda rows: {"linear_bias": draw(40)},
            lambda rows: {"lora_A": draw(2, 8), "lora_B": draw(40, 2)},
            lambda rows: {"num_items_in_batch": 3},
        ],
    ),
    "lora_linear": (
        ops.lora_linear,
        lambda rows: (draw(rows, 8), draw(6, 8), draw(2, 8), draw(6, 2)),
        8 * 6,
        [lambda rows: {"dropout_p": 0.1}],
    ),
    "attention": (
        attention,
        heads,
        2 * 2 * 8,
        [
            lambda rows: {"window_size": (2, 0)},
            lambda rows: {"softcap": 5.0},
            lambda rows: {"dropout_p": 0.1},
            lambda rows: {"attention_mask": torch.ones(1, rows, dtype=torch.bool)},
            lambda rows: {"sinks": draw(2)},
            lambda rows: {"return_lse": True},
        ],
    ),
}


@pytest.fixture(autouse=True)
def needs_kernels():
    if dispatch.unavailable("cpu"):
        pytest.skip(dispatch.unavailable("cpu"))


@pytest.fixture
def chosen(monkeypatch):
    """The backends chosen, in order; below size 100 calls are small."""
    found, choose = [], dispatch.choose
    monkeypatch.setattr(dispatch, "SMALL", {op: {"cpu": {torch.float32: 100}} for op in CASES})

    def recorded(*arguments):
        found.append(choose(*arguments))
        return found[-1]

    monkeypatch.setattr(dispatch, "choose", recorded)
    return found


def test_every_row_is_tested():
    assert set(SMALL) == set(CASES)
    for op, devices in SMALL.items():
        for device, sizes in devices.items():
            assert dispatch.TABLE[op][device][0] != "torch" and all(size > 0 for size in sizes.values())


@pytest.mark.parametrize("op", CASES)
def test_size_decides(op, chosen, monkeypatch):
    """The largest small call and the one after it; another dtype, use_backend and an empty table."""
    function, inputs, per_row, _ = CASES[op]
    rows = 100 // per_row + 1
    monkeypatch.setitem(dispatch.SMALL, op, {"cpu": {torch.float32: rows * per_row}})
    function(*inputs(rows - 1) if rows > 1 else inputs(rows)), function(*inputs(rows))
    assert chosen == ["torch" if rows > 1 else "cpu", "cpu"]
    monkeypatch.setitem(dispatch.SMALL, op, {"cpu": {torch.float32: rows * per_row + 1}})
    function(*inputs(rows))
    assert chosen.pop() == "torch"
    with pyfast.use_backend("cpu"):
        function(*inputs(rows))
    assert chosen.pop() == "cpu"
    half = [x.bfloat16() if x.is_floating_point() else x for x in inputs(rows)]
    function(*half)
    assert chosen.pop() == "cpu"


@pytest.mark.parametrize(("op", "option"), [(op, i) for op, case in CASES.items() for i in range(len(case[3]))])
def test_options_that_only_kernels_serve(op, option, chosen):
    function, inputs, _, options = CASES[op]
    function(*inputs(1), **options[option](1))
    assert chosen == ["cpu"]


def test_what_pytorch_serves_otherwise(chosen):
    """Rows that do not count (their NaN must not spread), vectors per head, quantized weights, gradients of a query."""
    ops.cross_entropy(draw(2, 40), torch.tensor([-100, 3]))
    ops.cross_entropy(draw(2, 40), torch.tensor([1, 3]), ignore_index=3)
    ops.linear_cross_entropy(draw(2, 2), draw(20, 2), torch.tensor([-100, 3]))
    ops.layer_norm(draw(2, 3, 8), draw(3, 8), None, 1e-5)
    ops.lora_linear(draw(1, 8), QuantizedWeight.quantize(draw(8, 8, grad=False), "int8"))
    ops.attention(*heads(3), causal=True)
    assert chosen == ["cpu"] * 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", CASES)
def test_small_results_are_right(op, dtype, monkeypatch):
    """Result and gradients, in the dtypes of the real table, are those of the reference."""
    monkeypatch.setattr(dispatch, "SMALL", SMALL)
    function, inputs, *_ = CASES[op]
    given = [x.to(dtype) if x.is_floating_point() else x for x in inputs(3)]

    def results(backend, *given):
        given = [x.detach().requires_grad_(x.is_floating_point()) for x in given]
        with pyfast.use_backend(backend):
            y = function(*given)
        if not y.requires_grad:
            return [y]
        cotangent = torch.linspace(1, 2, y.numel()).view(y.shape).to(y.dtype)
        return [y, *torch.autograd.grad(y, [x for x in given if x.requires_grad], cotangent)]

    plain = function(*given)
    exact = results("reference", *(x.double() if x.is_floating_point() else x for x in given))
    assert_close(plain, exact[0], results("torch", *given)[0], op)
    for found, truth in zip(results("torch", *given), exact, strict=True):
        rounding = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
        assert (found.double() - truth).abs().max() <= rounding * truth.abs().max()


@pytest.mark.parametrize("op", CASES)
def test_a_compiled_graph_has_the_kernels(op, monkeypatch):
    """No graph break, one graph for all sizes, and the kernel in it: Python is gone there."""
    monkeypatch.setattr(dispatch, "SMALL", {op: {"cpu": {torch.float32: 100}}})
    function, inputs, *_ = CASES[op]
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=backend)
    for rows in (3, 4, 50):
        given = inputs(rows)
        with pyfast.use_backend("cpu"):
            expected = function(*given)
        torch.testing.assert_close(compiled(*given), expected)
    (graph,) = graphs
    modules = (m for m in graph.modules() if isinstance(m, torch.fx.GraphModule))
    assert any("pyfast_cpu" in str(node.target) for module in modules for node in module.graph.nodes)


def test_second_derivative_of_a_small_call(chosen):
    """PyTorch serves it, and so it has one."""
    x = draw(1, 40)
    (dx,) = torch.autograd.grad(ops.cross_entropy(x, torch.tensor([3])), x, create_graph=True)
    assert chosen == ["torch"] and torch.autograd.grad(dx.square().sum(), x)[0].abs().max() > 0


def test_a_measured_architecture_has_a_row_of_its_own(monkeypatch):
    """Other architectures keep that of all GPUs."""
    monkeypatch.setitem(dispatch.TABLE["swiglu"], "sm_90", ("triton", "torch"))
    monkeypatch.setattr(dispatch, "MEASURED", {"sm_90"})
    a, b, cpu = torch.device("cuda", 0), torch.device("cuda", 1), torch.device("cpu")
    monkeypatch.setattr(dispatch, "_architectures", {a: "sm_90", b: "sm_80"})
    assert dispatch.row("swiglu", a) == ("triton", "torch")
    assert dispatch.row("swiglu", b) == dispatch.TABLE["swiglu"]["cuda"]
    assert dispatch.row("geglu", a) == dispatch.TABLE["geglu"]["cuda"]
    assert dispatch.row("swiglu", cpu) == dispatch.TABLE["swiglu"]["cpu"]
