import torch
from test_cross_entropy import *  # noqa: F403
from test_cross_entropy import check, cross_entropy, inputs, pytest

from pyfast import emulator


def test_target_out_of_range_is_nan(kernel):
    """A GPU's targets are not checked on the host: a bad one makes its own row NaN, and nothing is read outside."""
    target = torch.tensor([0, 33, -1, 32, -(2**40)])
    loss, _, dinput = torch.ops.pyfast_cuda.cross_entropy(
        torch.randn(5, 33), target, torch.rand(33), torch.ones(5, 2, dtype=torch.float64), -100, 0.1, None
    )
    for result in (loss, dinput):
        assert result.isnan().reshape(5, -1).any(1).equal(torch.tensor([False, True, True, False, True]))


@pytest.mark.parametrize("offset", range(8))
def test_rows_that_begin_anywhere(kernel, offset):
    """Every distance of a row from a multiple of 16 bytes, alike for input and gradient, and not."""
    for classes in (65, 72):
        (logits, target), options = inputs(9, classes, torch.bfloat16, label_smoothing=0.2)
        wide = torch.randn(9, classes + 16).bfloat16()
        wide[:, offset : offset + classes] = logits.detach()
        for x in (wide[:, offset : offset + classes], logits.detach()):
            check(cross_entropy, [x.requires_grad_(), target], options, *kernel)


@pytest.mark.parametrize("arch", emulator.ARCHITECTURES)
@pytest.mark.parametrize("name", ["plain", "all"])
def test_long_rows(kernel, dtype, arch, name):
    """Rows that fit in no block's shared memory: clusters of blocks on sm_90, a second reading before."""
    args, options = inputs(3, 150_003, dtype, ignored=0.3, **OPTIONS[name])  # noqa: F405
    with emulator.emulating("random", arch=arch):
        check(cross_entropy, args, options, *kernel)
