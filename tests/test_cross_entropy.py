import pytest
import torch
import torch.nn.functional as F
from harness import check, check_shape, run
from hypothesis import given, settings
from hypothesis import strategies as st

import pyfast
from pyfast.ops import cross_entropy
from pyfast.ops.checks import values_known

OPTIONS = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "ignored": {"ignore_index": 3},
    "weight": {"weight": True},
    "smoothing": {"label_smoothing": 0.1},
    "smoothing_alone": {"label_smoothing": 1.0},
    "softcap": {"softcap": 2.0},
    "z_loss": {"z_loss": 10.0},
    "z_loss_none": {"z_loss": 0.1, "reduction": "none"},
    "all": {"weight": True, "label_smoothing": 0.3, "softcap": 3.0, "z_loss": 0.3, "ignore_index": 3},
    "all_sum": {"weight": True, "label_smoothing": 0.3, "softcap": 3.0, "z_loss": 0.3, "reduction": "sum"},
    "all_none": {"weight": True, "label_smoothing": 0.3, "softcap": 3.0, "z_loss": 0.3, "reduction": "none"},
}


def inputs(rows, classes, dtype=torch.float32, scale=2.0, ignored=0.3, ignore_index=-100, **options):
    """Logits, targets of which some are ignored, and the options, with class weights made where asked for."""
    logits = (torch.randn(rows, classes) * scale).to(dtype).requires_grad_()
    target = torch.randint(classes, (rows,))
    target[torch.rand(rows) < ignored] = ignore_index
    if options.get("weight") is True:
        options["weight"] = torch.rand(classes, dtype=torch.float64 if dtype == torch.float64 else torch.float32) + 0.1
    return (logits, target), {"ignore_index": ignore_index, **options}


@pytest.mark.parametrize("name", OPTIONS)
def test_error_rule(kernel, dtype, name):
    check(cross_entropy, *inputs(24, 1061, dtype, **OPTIONS[name]), *kernel)


@pytest.mark.parametrize("rows, classes", [(1, 1), (3, 2), (5, 16), (2, 17), (0, 7), (3, 2048), (2, 32003)])
def test_shapes(kernel, dtype, rows, classes):
    check(cross_entropy, *inputs(rows, classes, dtype, ignored=0.0, label_smoothing=0.1), *kernel)


@pytest.mark.parametrize("scale", [1e-3, 30.0, 300.0])
def test_magnitudes(kernel, dtype, scale):
    """Nearly uniform rows, rows where one class takes all, and a large offset that all logits share."""
    args, options = inputs(24, 1061, dtype, scale)
    check(cross_entropy, args, options, *kernel)
    offset = (args[0].detach() + 1000).requires_grad_()
    check(cross_entropy, (offset, args[1]), {**options, "label_smoothing": 0.1}, *kernel)


@pytest.mark.parametrize("name", ["plain", "smoothing", "softcap", "z_loss"])
def test_upstream_gradient(kernel, dtype, name):
    """A loss scaler's factor: fp16 gradients must not be rounded before it reaches them."""
    args, options = inputs(24, 1061, dtype, **OPTIONS[name])
    check(cross_entropy, args, options, *kernel, cotangents=[torch.tensor(4096.0)])


def test_largest_logit_moves(kernel, dtype):
    """The online softmax meets its largest logit in the first, a middle and the last of many steps."""
    logits = torch.randn(4, 5000)
    for row, column in enumerate((0, 2500, 4999)):
        logits[row, column] = 12.0
    logits[3] = torch.linspace(-20, 20, 5000)
    check(cross_entropy, [logits.to(dtype).requires_grad_(), torch.tensor([1, 2500, 3, 4000])], {}, *kernel)


def test_infinite_and_nan(kernel, dtype):
    """-inf masks a class, as in torch; rows with a NaN or +inf are NaN and leave the others alone."""
    logits = torch.randn(7, 1100)
    logits[1, 30:] = -torch.inf
    logits[2, :1050] = -torch.inf
    logits[3, 1070] = torch.nan
    logits[4, 5] = torch.inf
    logits[5] = -torch.inf
    logits[6] -= 1000
    logits[6, :1050] = -torch.inf
    logits = logits[[0, 1, 2, 6, 3, 4, 5]]
    logits = logits.to(dtype).requires_grad_()
    target = torch.tensor([3, 4, 1060, 1061, 5, 6, 7])
    (loss,), (gradient,), _ = run(cross_entropy, [logits, target], {"reduction": "none"}, *kernel)
    expected = F.cross_entropy(logits.double(), target, reduction="none")
    torch.testing.assert_close(loss, expected.float(), equal_nan=True)
    assert loss[:4].isfinite().all() and loss[4:].isnan().all()
    assert gradient[:4].isfinite().all() and gradient[1, 30:].eq(0).all() and gradient[3, :1050].eq(0).all()


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_masked_class_and_label_smoothing(kernel, dtype, softcap):
    """Smoothing asks for a masked class too: the loss is infinite, as in torch, unless softcap makes it finite."""
    logits = torch.randn(3, 1100)
    logits[1, 30:] = -torch.inf
    args = [logits.to(dtype).requires_grad_(), torch.tensor([3, 4, 5])]
    options = {"reduction": "none", "label_smoothing": 0.1, "softcap": softcap}
    (loss,), (gradient,), _ = run(cross_entropy, args, options, *kernel)
    (expected,), (expected_gradient,), _ = run(cross_entropy, args, options, "reference")
    assert loss[1].isinf() == (softcap is None)
    torch.testing.assert_close(loss, expected)
    tolerance = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    torch.testing.assert_close(gradient, expected_gradient, rtol=tolerance, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_row_counts(kernel, dtype, reduction):
    for rows in (5, 0):
        logits = torch.randn(rows, 20).to(dtype).requires_grad_()
        args = [logits, torch.full((rows,), -100)]
        options = {"reduction": reduction, "z_loss": 0.1, "label_smoothing": 0.1}
        (loss,), (gradient,), _ = run(cross_entropy, args, options, *kernel)
        assert loss.isnan() if reduction == "mean" else loss.eq(0).all()
        assert gradient.shape == logits.shape and gradient.eq(0).all()


def test_not_contiguous(kernel, dtype):
    """A slice of a padded vocabulary, a transposed matrix, and a target with gaps."""
    (logits, target), options = inputs(24, 70, dtype)
    sliced = logits.detach()[::2, 3:64].requires_grad_()
    transposed = logits.detach().T.requires_grad_()
    for x, t in ((sliced, target[::2].clamp(max=60)), (transposed, torch.randint(24, (140,))[::2])):
        check(cross_entropy, [x, t], options, *kernel)


def test_one_row_without_batch(kernel, dtype):
    (logits, target), _ = inputs(1, 33, dtype, ignored=0)
    for reduction in ("mean", "none"):
        check(cross_entropy, [logits.detach()[0].requires_grad_(), target[0]], {"reduction": reduction}, *kernel)


def test_double_class_weights(kernel):
    args, options = inputs(8, 33, weight=True)
    options["weight"] = options["weight"].double()
    check(cross_entropy, args, options, *kernel)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_backward_twice(dtype, reduction):
    (logits, target), _ = inputs(8, 33, dtype)
    loss = cross_entropy(logits, target, reduction=reduction).sum() * 3
    first = torch.autograd.grad(loss, logits, retain_graph=True)
    assert torch.equal(first[0], torch.autograd.grad(loss, logits)[0])


def test_backward_after_the_gradient_was_changed():
    """A gradient that may be wanted again is not handed out itself: its receiver writes to it."""
    (logits, target), _ = inputs(8, 33, torch.float32)
    loss = cross_entropy(logits, target)
    loss.backward(retain_graph=True)
    first = logits.grad.clone()
    for _ in range(2):
        logits.grad.zero_()
        loss.backward(retain_graph=True)
        assert torch.equal(logits.grad, first)


def test_no_gradient_is_made_where_none_is_needed(dtype):
    (logits, target), _ = inputs(8, 33, dtype)
    with torch.no_grad():
        loss = cross_entropy(logits, target)
    assert not loss.requires_grad and loss.dtype == torch.float32
    assert torch.equal(loss, cross_entropy(logits.detach(), target))
    assert torch.equal(loss, cross_entropy(logits, target).detach())


def test_autocast_does_not_cast():
    (logits, target), _ = inputs(8, 33)
    with torch.autocast("cpu", torch.bfloat16):
        loss = cross_entropy(logits, target)
    assert torch.equal(loss, cross_entropy(logits, target))


@given(st.integers(0, 9), st.integers(1, 90), st.floats(0, 1), st.booleans(), st.sampled_from(["mean", "sum", "none"]))
@settings(max_examples=30, deadline=None)
def test_drawn(rows, classes, ignored, weight, reduction):
    options = {"reduction": reduction, "weight": weight or None, "z_loss": 0.1, "label_smoothing": 0.2}
    args, options = inputs(rows, classes, ignored=ignored, **options)
    if reduction == "mean" and (args[1] == -100).all():
        return  # NaN: test_no_row_counts
    check_shape(cross_entropy, args, options)


@pytest.mark.parametrize("name", OPTIONS)
def test_reference_gradient(name):
    args, options = inputs(4, 7, torch.float64, **OPTIONS[name])
    with pyfast.use_backend("reference"):
        assert torch.autograd.gradcheck(lambda x: cross_entropy(x, args[1], **options), args[0])


@pytest.mark.parametrize("name", OPTIONS)
def test_torch_is_the_reference(name):
    (logits, target), options = inputs(9, 21, torch.float64, **OPTIONS[name])
    results = []
    for backend in ("reference", "torch"):
        with pyfast.use_backend(backend):
            loss = cross_entropy(logits, target, **options)
        results.append((loss, *torch.autograd.grad(loss.sum(), logits)))
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_follows_torch(backend, reduction, label_smoothing):
    (logits, target), options = inputs(9, 21, reduction=reduction, label_smoothing=label_smoothing, weight=True)
    with pyfast.use_backend(backend):
        for x, t in ((logits, target), (logits[0], target[0]), (logits[:0], target[:0]), (logits, target * 0 - 100)):
            loss, expected = cross_entropy(x, t, **options), F.cross_entropy(x, t, **options)
            torch.testing.assert_close(loss, expected, equal_nan=True)
            gradients = [torch.autograd.grad(y.sum(), logits)[0] for y in (loss, expected)]
            torch.testing.assert_close(*gradients)


def test_opcheck():
    (logits, target), options = inputs(5, 33, weight=True)
    for upstream, softcap in ((None, None), (torch.rand(5, 2).double(), 2.0)):
        arguments = (logits.detach(), target, options["weight"], upstream, -100, 0.1, softcap)
        torch.library.opcheck(torch.ops.pyfast_cpu.cross_entropy.default, arguments)


@pytest.mark.parametrize(
    "compiler, name", [("aot_eager", "all"), ("aot_eager", "none"), ("aot_eager", "plain"), ("inductor", "plain")]
)
def test_compile(compiler, name):
    args, options = inputs(6, 33, **OPTIONS[name])
    compiled = torch.compile(cross_entropy, fullgraph=True, backend=compiler)
    eager, compiled = (run(op, args, options, backend="cpu") for op in (cross_entropy, compiled))
    torch.testing.assert_close(compiled[:2], eager[:2], rtol=1e-6, atol=1e-7)


def test_compile_dynamic():
    compiled = torch.compile(cross_entropy, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows, classes in ((4, 20), (7, 31)):
        args, _ = inputs(rows, classes)
        eager, dynamic = (run(op, args, backend="cpu") for op in (cross_entropy, compiled))
        torch.testing.assert_close(dynamic[:2], eager[:2], rtol=1e-6, atol=1e-7)


def test_kernel_checks_targets_by_itself():
    """Compiled, the targets' values are not known to Python."""
    compiled = torch.compile(cross_entropy, fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match="target 33 is out of range"):
        compiled(torch.randn(2, 33), torch.tensor([0, 33]))


def test_second_derivative_and_vmap_raise():
    (logits, target), _ = inputs(4, 9)
    (gradient,) = torch.autograd.grad(cross_entropy(logits, target), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(gradient.sum(), logits)
    with pytest.raises(RuntimeError, match="vmap"):
        torch.func.vmap(cross_entropy)(logits.detach()[None], target[None])


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"input": torch.randn(2, 3, 5)}, ValueError, "input is float32 \\(2, 3, 5\\)"),
        ({"input": torch.ones(4, 5, dtype=torch.long)}, TypeError, "input is int64"),
        ({"input": torch.randn(4, 0)}, ValueError, "no classes"),
        ({"target": [1, 2]}, TypeError, "target is list"),
        ({"target": torch.tensor([1, 2])}, ValueError, "target is int64 \\(2,\\) on cpu, expected \\(4,\\)"),
        ({"target": torch.rand(4, 5)}, TypeError, "class probabilities are not served"),
        ({"target": torch.zeros(4, dtype=torch.int32)}, TypeError, "target is int32"),
        ({"target": torch.zeros(4, dtype=torch.long, device="meta")}, ValueError, "on meta"),
        ({"target": torch.tensor([0, 5, -1, 1])}, ValueError, "2 values out of range, the first 5: expected 0 to 4"),
        ({"weight": torch.rand(4)}, ValueError, "weight is float32 \\(4,\\)"),
        ({"weight": torch.rand(5, requires_grad=True)}, ValueError, "weight requires grad"),
        ({"weight": torch.rand(5, device="meta")}, ValueError, "weight is .* on meta"),
        ({"reduction": "avg"}, ValueError, "reduction is 'avg'"),
        ({"ignore_index": 0.5}, TypeError, "ignore_index is 0.5"),
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing is 1.5"),
        ({"softcap": 0.0}, ValueError, "softcap is 0.0"),
        ({"z_loss": -1.0}, ValueError, "z_loss is -1.0"),
        ({"z_loss": None}, TypeError, "z_loss is None, expected a number"),
        ({"label_smoothing": "a"}, TypeError, "label_smoothing is 'a'"),
        ({"softcap": float("inf")}, ValueError, "softcap is inf"),
        ({"ignore_index": 2**70}, ValueError, "ignore_index is 1180591620717411303424"),
    ],
)
def test_bad_input(change, error, words):
    with pytest.raises(error, match=words):
        cross_entropy(**{"input": torch.randn(4, 5), "target": torch.tensor([0, 1, -100, 4]), **change})


def test_checks_look_at_values_on_any_device():
    """The kernels' own answer on a GPU is tested in tests/gpu."""
    on_cpu, elsewhere = torch.empty(1), torch.empty(1, device="meta")
    assert values_known(on_cpu) and not values_known(elsewhere)
    with pyfast.checks():
        with pyfast.checks():
            pass
        assert values_known(elsewhere)
    assert not values_known(elsewhere)
