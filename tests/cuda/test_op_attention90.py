"""Attention in 16 bits on sm_90a, where it has kernels of its own: the tests of test_attention.py that reach them."""

import pytest
import torch
from harness import check, run
from test_attention import (  # noqa: F401
    CASES,
    VARLEN_CASES,
    attention,
    attention_varlen,
    inputs,
    test_deterministic_and_replayed,
    test_nan_passes,
    test_no_sequence,
    test_one_key,
    test_padding_is_never_read,
    test_varlen_rows_of_no_sequence,
    varlen_inputs,
)

from pyfast import emulator


@pytest.fixture
def arch():
    return "sm_90a"


@pytest.fixture(params=[torch.bfloat16, torch.float16], ids=lambda d: str(d).removeprefix("torch."))
def dtype(request):
    return request.param


def served(cases):
    return [name for name, case in cases.items() if not {"softcap", "mask", "bias", "dropout_p"} & set(case[-1])]


@pytest.mark.parametrize("case", [*served(CASES), "everything"])
def test_error_rule(kernel, dtype, case):
    args, options = inputs(case, dtype)
    check(attention, args, options, *kernel)


@pytest.mark.parametrize("case", served(VARLEN_CASES))
def test_varlen_error_rule(kernel, dtype, case):
    args, options = varlen_inputs(case, dtype)
    check(attention_varlen, args, options, *kernel)


def test_heads_of_joined_projections(kernel, dtype):
    """(B, S, H, D) memory with other columns beside it, a batch that is expanded, and rows that begin anywhere: the
    last two are not for TMA."""
    wide = torch.randn(2, 150, 3, 4, 72).to(dtype)
    for q, k, v in (
        (x.transpose(1, 2)[..., :64] for x in wide.unbind(2)),
        (x[:1].expand(2, -1, -1, -1).transpose(1, 2)[..., :40] for x in wide.unbind(2)),
        (x.transpose(1, 2)[..., 1:41] for x in wide.unbind(2)),
    ):
        check(lambda q, k, v: attention(q, k, v, causal=True), [q, k, v], {}, *kernel)


#: more keys than the ring holds, blocks of 192 queries (D <= 64) and of 128 that are not whole
SEVERAL_TILES = {
    "causal": ((1, 2, 1, 150, 330, 128), {"causal": True}),
    "causal-narrow": ((1, 1, 1, 210, 410, 64), {"causal": True}),
    "many-keys": ((1, 1, 1, 20, 700, 128), {"sinks": 1.0, "return_lse": True}),
    "many-keys-narrow": ((1, 1, 1, 20, 900, 40), {"scale": 0.3}),
    "fewer-keys": ((1, 1, 1, 280, 150, 96), {"causal": True, "return_lse": True}),
    "window": ((1, 1, 1, 140, 400, 72), {"window_size": (150, 40)}),
    "window-narrow": ((1, 1, 1, 280, 360, 32), {"window_size": (60, 90), "return_lse": True}),
}


@pytest.mark.parametrize("case", SEVERAL_TILES)
def test_several_tiles(kernel, dtype, case):
    args, options = inputs(SEVERAL_TILES[case], dtype)
    check(attention, args, options, *kernel)


VARLEN = {
    "causal": ([200, 0, 130, 5], [300, 7, 0, 260], (2, 1, 128), {"causal": True}),
    "narrow": ([210, 1, 40], [400, 0, 290], (2, 2, 64), {"window_size": (180, 30), "sinks": 0.0}),
}


@pytest.mark.parametrize("case", VARLEN)
def test_varlen_several_tiles(kernel, dtype, case):
    args, options = varlen_inputs(VARLEN[case], dtype)
    check(attention_varlen, args, options, *kernel)


@pytest.mark.parametrize("dim", [64, 128])
def test_varlen_neighbours_are_never_read(kernel, dtype, dim):
    """TMA brings the rows of the next sequence with a sequence's last: not even their NaN is seen."""
    args, _ = varlen_inputs(([150, 220], [200, 170], (2, 1, dim), {}), dtype)
    expected = run(attention_varlen, args, {}, *kernel)
    with torch.no_grad():
        for x, first in ((args[0], 150), (args[1], 200), (args[2], 200)):
            x[first:] = torch.nan
    actual = run(attention_varlen, args, {}, *kernel)
    for whole, other, first in zip(actual[0] + actual[1], expected[0] + expected[1], (150, 150, 200, 200), strict=True):
        assert torch.equal(whole[:first], other[:first]) and whole[first:].isnan().all()


@pytest.mark.parametrize("dim", [64, 128])
def test_same_bits(kernel, dtype, dim):
    """Whatever the order of threads, and however late copies and products come."""
    args, options = inputs(((1, 1, 1, 200, 520, dim), {"causal": True}), dtype)
    results = []
    for seed, order in enumerate(("forward", "reverse", "random", "random", "random")):
        with emulator.emulating(order, seed=seed, lazy=seed % 2 == 0):
            results.append(run(attention, args, options, *kernel))
    for outputs, gradients, _ in results[1:]:
        assert all(map(torch.equal, outputs + gradients, results[0][0] + results[0][1]))
