import torch
from bad_targets import test_linear_cross_entropy_target_out_of_range  # noqa: F401
from harness import run
from test_linear_cross_entropy import *  # noqa: F403
from test_linear_cross_entropy import OPTIONS, check, check_rule, inputs, linear_cross_entropy, pytest

from pyfast import emulator


@pytest.mark.parametrize("name", ["plain", "lora", "all"])
@pytest.mark.parametrize("features", [136, 200])
def test_several_tiles(kernel, dtype, name, features):
    """In every direction, the last of them not whole; long enough for the narrow products' sums to be split."""
    args, options = inputs(300, features, 700, dtype, **OPTIONS[name])
    check_rule(args, options, kernel)


def test_transposed_head(kernel, dtype):
    """Its columns are what is contiguous, and aligned: the products take them as tiles' rows."""
    (x, head, target), options = inputs(150, 72, 304, dtype, bias=True, rank=8)
    head = head.detach().T.contiguous().T.requires_grad_()
    for name in ("lora_A", "lora_B"):
        options[name] = options[name].detach().T.contiguous().T.requires_grad_()
    check_rule([x, head, target], options, kernel)


def test_same_bits(kernel):
    """Whatever the order of threads."""
    args, options = inputs(90, 72, 301, torch.bfloat16, **OPTIONS["all"])
    with emulator.emulating("random", seed=5):
        outputs, gradients, _ = run(linear_cross_entropy, args, options, *kernel)
    again, gradients_again, _ = run(linear_cross_entropy, args, options, *kernel)
    assert all(map(torch.equal, outputs + gradients, again + gradients_again))


def test_head_within_another_matrix(kernel):
    """Rows a multiple of 16 bytes apart that begin between two."""
    (x, _, target), _ = inputs(60, 72, 301, torch.bfloat16)
    wide = (torch.randn(301, 80) / 8).bfloat16().requires_grad_()

    def of_columns(x, wide, target):  # within the op: a copy of such columns would be contiguous
        return linear_cross_entropy(x, wide[:, 1:73], target, reduction="none")

    check(of_columns, [x, wide, target], {}, *kernel)


#: (rows, classes, options): more rows that count than a tile of 256 has; an adapter that TMA can copy, and one that it
#: cannot; so many classes that dx's sums are split, into parts that are not all as long, one with the adapter's steps
HOPPER = {
    "plain": (400, 304, {}),
    "frozen": (90, 304, {"frozen": True, "ignored": 0.6}),
    "lora": (90, 304, {"rank": 8, "scaling": 4.0, "frozen": True}),
    "all": (90, 304, {**OPTIONS["all"], "rank": 16}),
    "rank_of_3": (90, 304, {"rank": 3}),
    "split": (70, 1112, {"rank": 72, "frozen": True, "ignored": 0.3}),
}


@pytest.mark.parametrize("name", HOPPER)
def test_hopper(kernel, name):
    """sm_90a: TMA, mbarriers and wgmma, in tiles of 256 rows and 128 classes, and in depth more steps than stages."""
    rows, classes, options = HOPPER[name]
    for lazy, dtype in ((True, torch.bfloat16), (False, torch.float16)):
        args, given = inputs(rows, 264 if rows > 256 else 136, classes, dtype, **options)
        with emulator.emulating("random", lazy=lazy, arch="sm_90a"):
            check_rule(args, given, kernel)


def test_hopper_without_gradients(kernel):
    (x, head, target), _ = inputs(20, 33, 304, torch.bfloat16)
    args = (x.detach(), torch.nn.functional.pad(head.detach(), (0, 7))[:, :33], target)
    with emulator.emulating(arch="sm_90a"):
        check_rule(args, {}, kernel)
