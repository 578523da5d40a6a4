import importlib

import pytest
import torch
import torch.nn.functional as F
from close import assert_close
from harness import check, check_shape, run, run_reference
from hypothesis import given, settings
from hypothesis import strategies as st

import pyfast
from pyfast.ops import linear_cross_entropy

OPTIONS = {
    "plain": {},
    "frozen": {"frozen": True},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "none_frozen": {"reduction": "none", "frozen": True, "z_loss": 0.3},
    "bias": {"bias": True},
    "lora": {"rank": 3, "frozen": True},
    "lora_dominates": {"rank": 3, "scaling": 8.0, "frozen": True},
    "weight": {"weight": True},
    "smoothing": {"label_smoothing": 0.1},
    "smoothing_dominates": {"label_smoothing": 1.0},
    "softcap": {"softcap": 0.8},
    "logit_scale": {"logit_scale": 0.25},
    "z_loss": {"z_loss": 10.0},
    "num_items": {"num_items_in_batch": 17, "z_loss": 0.1, "weight": True},
    "all": {
        **{"bias": True, "rank": 3, "scaling": 0.5, "weight": True, "label_smoothing": 0.3, "softcap": 2.0},
        **{"z_loss": 0.3, "logit_scale": 2.0, "ignore_index": 3},
    },
}
OPTIONS["all_sum"] = {**OPTIONS["all"], "reduction": "sum"}
OPTIONS["all_none"] = {**OPTIONS["all"], "reduction": "none"}
OPTIONS["all_frozen"] = {**OPTIONS["all"], "frozen": True}


def inputs(
    rows,
    features,
    classes,
    dtype=torch.float32,
    *,
    bias=False,
    rank=0,
    frozen=False,
    parameters=None,
    weight=False,
    ignored=0.3,
    ignore_index=-100,
    **options,
):
    """Hidden states, head, targets of which some are ignored, and the options; parameters: the dtype of the head."""
    rows = (rows,) if isinstance(rows, int) else rows
    parameters = parameters or dtype

    def tensor(*shape, dtype=parameters):
        return torch.randn(shape).to(dtype)

    x = tensor(*rows, features, dtype=dtype).requires_grad_()
    head = (tensor(classes, features) / features**0.5).requires_grad_(not frozen)
    target = torch.randint(classes, rows)
    target[torch.rand(rows) < ignored] = ignore_index
    if bias:
        options["linear_bias"] = tensor(classes).requires_grad_(not frozen)
    if rank:
        options["lora_A"] = (tensor(rank, features) / features**0.5).requires_grad_()
        options["lora_B"] = (tensor(classes, rank) / rank**0.5).requires_grad_()
    if weight:
        options["weight"] = torch.rand(classes, dtype=torch.float64 if dtype == torch.float64 else torch.float32) + 0.1
    return (x, head, target), {"ignore_index": ignore_index, **options}


def check_rule(args, options, kernel=("cpu", None), cotangents=None):
    """The error rule for the result and every gradient.

    A scalar loss of 16-bit logits is the sum of its rows' rounding errors, and how many of them cancel in PyTorch's one
    number is chance. There the rows are held to the rule, and the scalar to PyTorch's worst row error in every row.
    """
    if args[0].dtype == torch.float32 or options.get("reduction") == "none":
        return check(linear_cross_entropy, args, options, *kernel, cotangents)

    def without_value(*args, **options):
        loss = linear_cross_entropy(*args, **options)
        return loss - loss.detach()

    check(without_value, args, options, *kernel, cotangents)
    by_row = {k: v for k, v in options.items() if k != "num_items_in_batch"} | {"reduction": "none"}
    args, options, by_row = (
        [x.detach() if torch.is_tensor(x) else x for x in args],
        detached(options),
        detached(by_row),
    )
    (rows,), _, _ = run(linear_cross_entropy, args, by_row, *kernel)
    (loss,), _, _ = run(linear_cross_entropy, args, options, *kernel)
    (torch_rows,), _, _ = run(linear_cross_entropy, args, by_row, "torch")
    (true_rows,), _ = run_reference(linear_cross_entropy, args, by_row, [rows])
    (true_loss,), _ = run_reference(linear_cross_entropy, args, options, [loss])
    assert_close(rows, true_rows, torch_rows, "rows")
    bound = (
        2
        * (torch_rows - true_rows).abs().max()
        * (true_rows != 0).sum()
        * (true_loss / true_rows.sum()).nan_to_num(1).abs()
    )
    assert (loss - true_loss).abs() <= bound + 2**-24 * true_loss.abs()


def detached(options):
    return {k: v.detach() if torch.is_tensor(v) else v for k, v in options.items()}


def leaves(args, options):
    return [t for t in (*args, *options.values()) if torch.is_tensor(t) and t.requires_grad]


@pytest.mark.parametrize("name", OPTIONS)
def test_error_rule(kernel, dtype, name):
    check_rule(*inputs(60, 72, 601, dtype, **OPTIONS[name]), kernel)


@pytest.mark.parametrize("shape", [((), 3, 5), (1, 1, 1), ((2, 3), 17, 33), ((0, 3), 4, 5), ((2, 2, 5), 64, 257)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_shapes(kernel, shape, reduction):
    args, options = inputs(*shape, bias=True, rank=2, ignored=0.0, reduction=reduction)
    if args[2].numel() or reduction == "none":
        check_shape(linear_cross_entropy, args, options, *kernel)


@pytest.mark.parametrize("name", ["sum", "none", "softcap", "logit_scale", "z_loss", "num_items"])
@pytest.mark.parametrize("shape", [(900, 64, 601), (850, 32, 1), (800, 96, 1500), (750, 32, 512)])
def test_frozen_head(kernel, dtype, name, shape):
    """The head that most fine-tunes have: AMX serves it in one sweep over the weight, in blocks of 512 classes."""
    args, options = inputs(*shape, dtype, **{**OPTIONS[name], "frozen": True})
    check_rule(args, options, kernel)


def test_frozen_head_of_many_features(kernel):
    """So many that the sweep's sums for all rows would not stay in its memory budget: two groups of rows."""
    args, options = inputs(2100, 4096, 40, torch.bfloat16, frozen=True)
    check_rule(args, options, kernel)


@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_frozen_head_of_confident_rows(kernel, dtype, offset):
    """The target takes nearly all, so that its gradient is a small difference; or the largest logit comes late."""
    (x, head, target), _ = inputs(800, 64, 1200, dtype, frozen=True)
    head = head.float() * torch.linspace(0.1, 3, 1200)[:, None]
    head[target.clamp(min=0)] = x.detach().float() / 8
    head[:, 0] += offset
    args = ((x.detach() * 4).requires_grad_(), head.to(dtype), target)
    check_rule(args, {}, kernel)


@pytest.mark.parametrize("logits_bytes", [1, 40_000, 100_000])
def test_many_chunks(kernel, dtype, logits_bytes, monkeypatch):
    """Rows go through the buffer in several chunks, of equal and unequal length, with ignored rows between them."""
    monkeypatch.setattr(importlib.import_module("pyfast.ops.linear_cross_entropy"), "LOGITS_BYTES", logits_bytes)
    for options in ({"rank": 2, "frozen": True}, {"bias": True}, {"bias": True, "reduction": "none"}):
        args, options = inputs(90, 40, 601, dtype, **options)
        args[2][5:30] = -100
        check_rule(args, options, kernel)


@pytest.mark.parametrize(
    "x_dtype, parameters", [("bfloat16", "float32"), ("float16", "float32"), ("float32", "bfloat16")]
)
@pytest.mark.parametrize("name", ["all", "all_none", "plain"])
def test_mixed_dtypes(kernel, name, x_dtype, parameters):
    """fp32 adapters and heads beside lower-precision x: products in x's dtype, each gradient in its parameter's."""
    x_dtype, parameters = getattr(torch, x_dtype), getattr(torch, parameters)
    args, options = inputs(60, 72, 301, x_dtype, parameters=parameters, **OPTIONS[name])
    check_rule(args, options, kernel)


def test_trainable_parts(kernel):
    """Each parameter alone: what needs no gradient gets none, and the others get theirs."""
    (x, head, target), options = inputs(60, 72, 301, bias=True, rank=2)  # enough that PyTorch's error is no luck
    tensors = {"input": x, "linear_weight": head, **{k: v for k, v in options.items() if torch.is_tensor(v)}}
    for trained in tensors:
        given = {k: v.detach().requires_grad_(k == trained) for k, v in tensors.items()}
        check(linear_cross_entropy, [], {**options, **given, "target": target}, *kernel)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_row_counts(kernel, dtype, reduction):
    for rows in (5, 0):
        (x, head, target), options = inputs(rows, 6, 20, dtype, ignored=1.1, bias=True, rank=2, z_loss=0.1)
        options["reduction"] = reduction
        (loss,), gradients, _ = run(linear_cross_entropy, [x, head, target], options, *kernel)
        assert loss.isnan() if reduction == "mean" else loss.eq(0).all()
        assert len(gradients) == 5 and all(g.eq(0).all() for g in gradients)
    options.update(reduction="mean", num_items_in_batch=3)
    (loss,), gradients, _ = run(linear_cross_entropy, [x, head, target], options, *kernel)
    assert loss == 0 and all(g.eq(0).all() for g in gradients)


def test_ignored_rows_are_not_multiplied(kernel):
    (x, head, target), _ = inputs(9, 8, 50)
    x = torch.where((target == -100)[:, None], torch.nan, x.detach()).requires_grad_()
    (loss,), gradients, _ = run(linear_cross_entropy, [x, head, target], {}, *kernel)
    assert loss.isfinite() and all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("upstream", [4096.0, 1e-3])
def test_upstream_gradient(kernel, dtype, upstream):
    args, options = inputs(60, 72, 301, dtype, **OPTIONS["all"])
    check_rule(args, options, kernel, [torch.tensor(upstream)])


def test_any_strides(kernel, dtype):
    (x, head, target), options = inputs((4, 6), 10, 50, dtype, bias=True, rank=2)
    x = x.detach()[:, :-1].requires_grad_()  # as a causal language model shifts them
    head = head.detach().T.contiguous().T.requires_grad_()
    options["lora_B"] = torch.randn(2, 100).to(dtype)[:, ::2].T.requires_grad_()
    options["linear_bias"] = torch.randn(100).to(dtype)[::2].requires_grad_()
    check_rule([x, head, target[:, 1:]], options, kernel)


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_magnitudes(kernel, dtype, softcap):
    """Rows where one class takes all, and the exponentials of others, whose smoothing has a gradient, underflow."""
    (x, head, target), _ = inputs(60, 72, 301, dtype)
    options = {"label_smoothing": 0.1, "softcap": softcap}
    check_rule([(x.detach() * 20).requires_grad_(), head, target], options, kernel)


@pytest.mark.parametrize("name", ["all", "all_none"])
def test_backward_twice(dtype, name):
    args, options = inputs(8, 5, 33, dtype, **OPTIONS[name])
    loss = linear_cross_entropy(*args, **options).sum() * 3
    first = torch.autograd.grad(loss, leaves(args, options), retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(loss, leaves(args, options)), strict=True))


def test_no_grad_and_inference(dtype):
    args, options = inputs(8, 5, 33, dtype, bias=True, rank=2)
    with torch.no_grad():
        loss = linear_cross_entropy(*args, **options)
    assert not loss.requires_grad and loss.dtype == torch.float32
    assert torch.equal(loss, linear_cross_entropy(*args, **options).detach())


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_autocast(backend):
    """Products in the autocast dtype, gradients in the parameters' fp32."""
    args, options = inputs(8, 5, 33, bias=True, rank=2)
    low = [torch.Tensor.bfloat16(args[0].detach()).requires_grad_(), *args[1:]]
    with pyfast.use_backend(backend):
        with torch.autocast("cpu", torch.bfloat16):
            loss = linear_cross_entropy(*args, **options)
        gradients = torch.autograd.grad(loss, leaves(args, options))
        expected = linear_cross_entropy(*low, **options)
        expected_gradients = torch.autograd.grad(expected, leaves(low, options))
    assert torch.equal(loss, expected) and loss.dtype == torch.float32
    for gradient, like in zip(gradients, expected_gradients, strict=True):
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient, like.float(), rtol=0, atol=0)


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_drawn(data):
    def draw(*strategy):
        return data.draw(st.sampled_from(strategy))

    torch.manual_seed(data.draw(st.integers(0, 1000)))
    args, options = inputs(
        data.draw(st.lists(st.integers(0, 5), max_size=3).map(tuple)), draw(1, 7, 32), draw(1, 2, 15, 16, 90),
        bias=draw(False, True), rank=draw(0, 1, 4), frozen=draw(False, True), weight=draw(False, True),
        ignored=draw(0.0, 0.5), reduction=draw("mean", "sum", "none"), label_smoothing=draw(0.0, 0.2),
        softcap=draw(None, 2.0), z_loss=draw(0.0, 0.1), logit_scale=draw(1.0, 0.5),
    )  # fmt: skip
    if options["reduction"] == "mean" and (args[2] == -100).all():
        return  # NaN: test_no_row_counts
    check_shape(linear_cross_entropy, args, options)


def test_opcheck():
    (x, head, target), options = inputs(5, 6, 33, bias=True, rank=2, weight=True)
    bias, A, B = (options[k].detach() for k in ("linear_bias", "lora_A", "lora_B"))
    x, head = x.detach(), head.detach()
    op, numbers = torch.ops.pyfast_cpu.linear_cross_entropy.default, (0.5, -100, 0.1, 2.0, 0.5, 1000)
    torch.library.opcheck(op, (x, head, None, None, None, target, None, None, *numbers, [True] * 5))
    upstream = torch.rand(5, 2).double()
    torch.library.opcheck(op, (x, head, bias, A, B, target, options["weight"], upstream, *numbers, [True] * 5))
    torch.library.opcheck(op, (x, head, None, A, B, target, None, upstream, *numbers, [True, False, True, False, True]))


@pytest.mark.parametrize(
    "compiler, name", [("aot_eager", "all"), ("aot_eager", "all_none"), ("aot_eager", "frozen"), ("inductor", "frozen")]
)
def test_compile(compiler, name):
    args, options = inputs(6, 8, 33, **OPTIONS[name])
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend=compiler)
    eager, compiled = (run(op, args, options, backend="cpu") for op in (linear_cross_entropy, compiled))
    torch.testing.assert_close(compiled[:2], eager[:2], rtol=1e-6, atol=1e-7)


def test_compile_dynamic():
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows, classes in ((4, 20), (7, 31)):
        args, _ = inputs(rows, 8, classes)
        eager, dynamic = (run(op, args, backend="cpu") for op in (linear_cross_entropy, compiled))
        torch.testing.assert_close(dynamic[:2], eager[:2], rtol=1e-6, atol=1e-7)


def test_second_derivative_and_vmap_raise():
    (x, head, target), _ = inputs(4, 3, 9)
    for of in (x, head):
        (gradient,) = torch.autograd.grad(linear_cross_entropy(x, head, target), of, create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(gradient.sum(), of)
    with pytest.raises(RuntimeError, match="vmap"):
        torch.func.vmap(linear_cross_entropy, (0, None, 0))(x.detach()[None], head.detach(), target[None])


@pytest.mark.parametrize("name", OPTIONS)
def test_reference_gradient(name):
    (x, head, target), options = inputs(4, 3, 7, torch.float64, **OPTIONS[name])
    wanted = {k: v for k, v in options.items() if torch.is_tensor(v) and v.requires_grad}

    def loss(x, head, *tensors):
        return linear_cross_entropy(x, head, target, **{**options, **dict(zip(wanted, tensors, strict=True))})

    with pyfast.use_backend("reference"):
        assert torch.autograd.gradcheck(loss, (x, head, *wanted.values()))


@pytest.mark.parametrize("name", OPTIONS)
def test_torch_is_the_reference(name):
    args, options = inputs((3, 4), 5, 21, torch.float64, **OPTIONS[name])
    results = []
    for backend in ("reference", "torch"):
        with pyfast.use_backend(backend):
            loss = linear_cross_entropy(*args, **options)
        results.append((loss, *torch.autograd.grad(loss.sum(), leaves(args, options))))
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_follows_torch(backend, reduction):
    (x, head, target), options = inputs(9, 5, 21, reduction=reduction, label_smoothing=0.2, weight=True)
    with pyfast.use_backend(backend):
        for h, t in ((x, target), (x[0], target[0]), (x[:0], target[:0]), (x, target * 0 - 100)):
            loss, expected = linear_cross_entropy(h, head, t, **options), F.cross_entropy(h @ head.T, t, **options)
            torch.testing.assert_close(loss, expected, equal_nan=True)
            gradients = [torch.autograd.grad(y.sum(), (x, head)) for y in (loss, expected)]
            torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("backend", ["reference", "torch", "cpu"])
def test_num_items(backend):
    """As in Trainer: the parts of a batch, each divided by the whole's number of items, add up to the whole."""
    (x, head, target), _ = inputs(12, 5, 21, z_loss=0.1)
    items = (target != -100).sum()
    with pyfast.use_backend(backend):
        whole = linear_cross_entropy(x, head, target, z_loss=0.1)
        for n in (items, int(items)):
            parts = [
                linear_cross_entropy(x[i], head, target[i], z_loss=0.1, num_items_in_batch=n)
                for i in (slice(0, 3), slice(3, 12))
            ]
            torch.testing.assert_close(sum(parts), whole)
        for n in (items, 0, torch.tensor(0)):
            nothing = linear_cross_entropy(x, head, target * 0 - 100, z_loss=0.1, num_items_in_batch=n)
            gradients = torch.autograd.grad(nothing, (x, head))
            assert nothing == 0 and not any(g.any() for g in gradients)


def test_no_features(kernel):
    """K = 0: the logits are the bias."""
    bias, target = torch.randn(7, requires_grad=True), torch.tensor([0, 6, -100])
    args = (torch.randn(3, 0, requires_grad=True), torch.randn(7, 0, requires_grad=True), target)
    check(linear_cross_entropy, args, {"linear_bias": bias}, *kernel)


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"input": torch.randn(4, 6)}, ValueError, "linear_weight is float32 \\(5, 3\\) on cpu, expected \\(V, 6\\)"),
        ({"input": torch.tensor(1.0)}, ValueError, "input is float32 \\(\\)"),
        ({"linear_weight": torch.randn(0, 3)}, ValueError, "no classes"),
        ({"linear_weight": torch.randn(5, 3, device="meta")}, ValueError, "linear_weight is .* on meta"),
        ({"linear_weight": torch.ones(5, 3, dtype=torch.int8)}, TypeError, "linear_weight is int8"),
        ({"target": torch.zeros(2, 2, dtype=torch.long)}, ValueError, "target is int64 \\(2, 2\\)"),
        ({"target": torch.tensor([0, 1, 2, 5])}, ValueError, "out of range, the first 5"),
        ({"linear_bias": torch.randn(4)}, ValueError, "linear_bias is float32 \\(4,\\)"),
        ({"lora_A": torch.randn(2, 3)}, ValueError, "lora_A and lora_B go together"),
        ({"lora_A": torch.randn(2, 4), "lora_B": torch.randn(5, 2)}, ValueError, "lora_A is float32 \\(2, 4\\)"),
        ({"lora_A": torch.randn(0, 3), "lora_B": torch.randn(5, 0)}, ValueError, "r of 1 or more"),
        ({"lora_A": torch.randn(2, 3), "lora_B": torch.randn(5, 1)}, ValueError, "lora_B is .* expected \\(5, 2\\)"),
        ({"num_items_in_batch": 3, "reduction": "sum"}, ValueError, "num_items_in_batch replaces the divisor"),
        ({"num_items_in_batch": "3"}, TypeError, "num_items_in_batch is str"),
        ({"num_items_in_batch": -1}, ValueError, "num_items_in_batch is -1"),
        ({"num_items_in_batch": torch.tensor(-1)}, ValueError, "num_items_in_batch is -1"),
        ({"scaling": None}, TypeError, "scaling is None, expected a number"),
        ({"logit_scale": "a"}, TypeError, "logit_scale is 'a'"),
        ({"num_items_in_batch": torch.ones(2)}, ValueError, "num_items_in_batch is float32 \\(2,\\)"),
    ],
)
def test_bad_input(change, error, words):
    arguments = {
        "input": torch.randn(4, 3),
        "linear_weight": torch.randn(5, 3),
        "target": torch.tensor([0, 1, -100, 4]),
    }
    with pytest.raises(error, match=words):
        linear_cross_entropy(**{**arguments, **change})
