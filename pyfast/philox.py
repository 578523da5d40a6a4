"""Philox4x32-10 in torch: dropout as a function of (seed, logical element index), the same on every backend.

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3". csrc/common/philox.h is the same in C++.
"""

import numbers

import torch

_WORD = 0xFFFFFFFF


def philox4x32(counter: tuple, key: tuple) -> tuple[torch.Tensor, ...]:
    """The 4 output words of counter (4 words) and key (2 words); words are int64 tensors (or ints) in [0, 2^32)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # int64 products wrap, which leaves the 64 bits of the unsigned product
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = ((p1 >> 32) & _WORD) ^ c1 ^ k0, p1 & _WORD, ((p0 >> 32) & _WORD) ^ c3 ^ k1, p0 & _WORD
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


def words(index: torch.Tensor, seed: int | torch.Tensor) -> torch.Tensor:
    """The random word, int64 in [0, 2^32), of each logical element index (int64, any shape)."""
    block, zero = index >> 2, torch.zeros_like(index)
    four = philox4x32((block & _WORD, (block >> 32) & _WORD, zero, zero), (seed & _WORD, (seed >> 32) & _WORD))
    return torch.stack(four, -1).gather(-1, (index & 3)[..., None])[..., 0]


def keep_mask(index: torch.Tensor, p: float, seed: int | torch.Tensor) -> torch.Tensor:
    """True where dropout with probability p keeps the logical element index (int64, any shape)."""
    return words(index, seed) >= int(p * 2**32)


def dropout(x: torch.Tensor, p: float, seed: int | torch.Tensor) -> torch.Tensor:
    """x with each element e of its logical (row-major) order dropped or scaled by 1 / (1 - p), in x's dtype."""
    if p == 0:
        return x
    index = torch.arange(x.numel(), device=x.device).view(x.shape)
    return torch.where(keep_mask(index, p, seed), x * (1 / (1 - p)), torch.zeros((), dtype=x.dtype, device=x.device))


def seed_tensor(op: str, seed: int | torch.Tensor | None, device: torch.device) -> torch.Tensor:
    """A dropout seed as kernels take it: a 0-dim int64 tensor. None draws one from torch's default generator."""
    if seed is None:
        return torch.randint(2**63 - 1, (), device=device)
    if isinstance(seed, torch.Tensor):
        if seed.dtype != torch.int64 or seed.dim() != 0:
            raise TypeError(f"{op}: seed is a {seed.dtype} tensor {tuple(seed.shape)}, expected a 0-dim int64 tensor")
        return seed.to(device)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"{op}: seed is {type(seed).__name__}, expected an int, a 0-dim int64 tensor or None")
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"{op}: seed is {seed}, expected an int that fits in 64 bits")
    return torch.full((), seed, dtype=torch.int64, device=device)


def check_dropout(op: str, dropout_p: float) -> None:
    if isinstance(dropout_p, bool) or not isinstance(dropout_p, numbers.Real | torch.SymFloat):
        raise TypeError(f"{op}: dropout_p is {dropout_p!r}, expected a number")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"{op}: dropout_p is {dropout_p}, expected 0 <= dropout_p < 1")
