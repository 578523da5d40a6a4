import torch
from bad_targets import test_cross_entropy_target_out_of_range  # noqa: F401
from test_cross_entropy import *  # noqa: F403
from test_cross_entropy import check, cross_entropy, inputs, pytest

from pyfast import dispatch, emulator


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("offset", range(8))
def test_rows_that_begin_anywhere(kernel, offset, label_smoothing):
    """Every distance of a row from a multiple of 16 bytes, alike for input and gradient, and not: by the kernel itself,
    since the harness copies its inputs, and their alignment is lost."""
    for classes, width in ((65, 81), (72, 88), (72, 73)):
        wide = torch.randn(9, width + 8).bfloat16()
        target, upstream = torch.randint(classes, (9,)), torch.rand(9, 2, dtype=torch.float64)
        sliced = wide[:, offset : offset + classes]
        copied = torch.empty(9 * classes + 8, dtype=torch.bfloat16)[8:].view(9, classes).copy_(sliced)
        options = (target, None, upstream, -100, label_smoothing, None)
        results = [dispatch.kernels(kernel[0]).cross_entropy(x, *options) for x in (sliced, copied)]
        for a, b in zip(*results, strict=True):
            # sums begin elsewhere in a row: a rounding or two of each result's own dtype
            torch.testing.assert_close(a, b, rtol=2**-7 if a.dtype == torch.bfloat16 else 1e-6, atol=1e-6)
        check(cross_entropy, [copied.requires_grad_(), target], {"label_smoothing": label_smoothing}, *kernel)


@pytest.mark.parametrize("arch", emulator.ARCHITECTURES)
@pytest.mark.parametrize("name", ["plain", "all"])
def test_long_rows(kernel, dtype, arch, name):
    """Rows that fit in no block's shared memory: clusters of blocks on sm_90, a second reading before."""
    args, options = inputs(3, 150_003, dtype, ignored=0.3, **OPTIONS[name])  # noqa: F405
    with emulator.emulating("random", arch=arch):
        check(cross_entropy, args, options, *kernel)


def test_blocks_of_a_cluster_in_any_order(kernel):
    """The same bits, however far one block runs ahead of another: it waits where others read its memory."""
    x, target, upstream = torch.randn(4, 140_000).bfloat16(), torch.arange(4), torch.ones(4, 2, dtype=torch.float64)
    results = []
    for seed in range(4):
        with emulator.emulating("random", seed=seed, arch="sm_90a"):
            results.append(dispatch.kernels(kernel[0]).cross_entropy(x, target, None, upstream, -100, 0.0, None))
    for result in results[1:]:
        for a, b in zip(result, results[0], strict=True):
            assert torch.equal(a, b)
