import pytest
import torch

import pyfast
from pyfast import philox

# Random123's published known answers for philox4x32-10 (kat_vectors): counter, key, output
KNOWN_ANSWERS = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize("counter, key, output", KNOWN_ANSWERS)
def test_known_answers(counter, key, output):
    assert [int(w) for w in philox.philox4x32([torch.tensor(c) for c in counter], key)] == output


def test_words_of_consecutive_indices():
    assert philox.words(torch.arange(4), 0).tolist() == KNOWN_ANSWERS[0][2]


@pytest.mark.parametrize("seed", [0, 1, -1, 0x299F31D0A4093822, 2**63 - 1])
@pytest.mark.parametrize("begin", [0, 1, 3, 2**34 - 5, 2**62 + 7])
def test_kernel_agrees(kernel, seed, begin):
    """The C++ factors are the torch mask's, from any index on, across 32-bit borders of the counter."""
    with pyfast.use_backend(*kernel[:1], arch=kernel[1]):
        factors = torch.ops.pyfast_cpu.dropout_factors(torch.tensor(seed), begin, 1003, 0.3)
    keep = philox.keep_mask(begin + torch.arange(1003), 0.3, seed)
    assert torch.equal(factors, torch.where(keep, torch.tensor(1 / (1 - 0.3)), 0.0))


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.999])
def test_rate(p):
    kept = philox.keep_mask(torch.arange(100_000), p, 5).float().mean().item()
    assert abs(kept - (1 - p)) < 5 * (p * (1 - p) / 100_000) ** 0.5 + 1e-9


def test_seed():
    torch.manual_seed(3)
    a = philox.seed_tensor("op", None, "cpu")
    assert a.dtype == torch.int64 and a.dim() == 0 and a != philox.seed_tensor("op", None, "cpu")
    torch.manual_seed(3)
    assert a == philox.seed_tensor("op", None, "cpu")
    assert philox.seed_tensor("op", 7, "cpu") == philox.seed_tensor("op", torch.tensor(7), "cpu") == 7
    for bad, error in ((1.5, TypeError), (True, TypeError), (torch.ones(2), TypeError), (2**70, ValueError)):
        with pytest.raises(error, match="op: seed is"):
            philox.seed_tensor("op", bad, "cpu")
    with pytest.raises(ValueError, match="dropout_p is 1"):
        philox.check_dropout("op", 1.0)


def test_opcheck():
    torch.library.opcheck(torch.ops.pyfast_cpu.dropout_factors.default, (torch.tensor(3), 0, 100, 0.5))
