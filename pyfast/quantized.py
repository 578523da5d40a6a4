"""Frozen base weights in a quantised storage format, dequantised on the way into a matrix product.

Formats and their sources: nf4 (Dettmers et al. 2023, QLoRA) in bitsandbytes' packed layout; int8 with a scale per row
(Dettmers et al. 2022, LLM.int8()); fp8 with one scale, or one per 128 x 128 tile (DeepSeek-V3).
"""

from dataclasses import dataclass

import torch

#: the 16 levels of nf4: quantiles of a normal distribution, normalised to [-1, 1] (QLoRA, appendix E)
NF4_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
FP8_TILE = 128
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True)
class QuantizedWeight:
    """A frozen (N, K) weight in one of these formats; `scale` is always floating.

    "nf4"   data: uint8, N K / 2 bytes of any shape, row-major, the first of two elements in the high four bits;
            scale: (N K / blocksize,), the largest absolute value of each block; weight = level[code] * scale
    "int8"  data: int8 (N, K); scale: (N,); weight = data * the row's scale
    "fp8"   data: float8_e4m3fn or float8_e5m2 (N, K); scale: () or (ceil(N / 128), ceil(K / 128)), per tile;
            weight = data * scale
    """

    format: str
    data: torch.Tensor
    scale: torch.Tensor
    shape: tuple[int, int]
    blocksize: int = 64

    def __post_init__(self):
        if self.format not in ("nf4", "int8", "fp8"):
            raise ValueError(f"QuantizedWeight: format is {self.format!r}, expected 'nf4', 'int8' or 'fp8'")
        for name, tensor in (("data", self.data), ("scale", self.scale)):
            if not isinstance(tensor, torch.Tensor):
                raise TypeError(f"QuantizedWeight: {name} is {type(tensor).__name__}, expected a torch.Tensor")
        if len(self.shape) != 2 or min(self.shape) < 0:
            raise ValueError(f"QuantizedWeight: shape is {self.shape}, expected (N, K)")
        _check_blocksize(self.blocksize)
        n, k = self.shape
        if self.format == "nf4":
            if n * k % self.blocksize:
                raise ValueError(
                    f"QuantizedWeight: nf4 weight of shape {(n, k)} is not made of whole blocks of {self.blocksize}"
                )
            self._expect("data", self.data, (torch.uint8,), self.data.numel() == n * k // 2, f"{n * k // 2} bytes")
            blocks = n * k // self.blocksize
            self._expect("scale", self.scale, None, self.scale.numel() == blocks, f"({blocks},)")
        else:
            dtypes = (torch.int8,) if self.format == "int8" else _FP8
            self._expect("data", self.data, dtypes, tuple(self.data.shape) == (n, k), f"{(n, k)}")
            tiles = (-(-n // FP8_TILE), -(-k // FP8_TILE))
            shapes = [(n,)] if self.format == "int8" else [(), tiles]
            self._expect("scale", self.scale, None, tuple(self.scale.shape) in shapes, " or ".join(map(str, shapes)))
        if self.scale.device != self.data.device:
            raise ValueError(f"QuantizedWeight: scale is on {self.scale.device}, data on {self.data.device}")

    @staticmethod
    def _expect(name, tensor, dtypes, shape_fits, shape):
        if tensor.dtype not in dtypes if dtypes else not tensor.is_floating_point():
            expected = " or ".join(map(str, dtypes)) if dtypes else "floating point"
            raise TypeError(f"QuantizedWeight: {name} is {tensor.dtype}, expected {expected}")
        if not shape_fits:
            raise ValueError(f"QuantizedWeight: {name} has shape {tuple(tensor.shape)}, expected {shape}")

    @property
    def device(self) -> torch.device:
        return self.data.device

    @classmethod
    def quantize(
        cls, weight: torch.Tensor, format: str, *, blocksize: int = 64, tiles: bool = False
    ) -> "QuantizedWeight":
        """Rounds a floating (N, K) weight to `format`. tiles: for fp8, a scale per 128 x 128 tile instead of one."""
        if weight.dim() != 2:
            raise ValueError(f"QuantizedWeight: weight has shape {tuple(weight.shape)}, expected (N, K)")
        _check_blocksize(blocksize)
        n, k = weight.shape
        w = weight.detach().float()
        if format == "nf4":
            if n * k % blocksize:
                raise ValueError(f"QuantizedWeight: {n} x {k} elements are not a multiple of blocksize {blocksize}")
            blocks = w.reshape(-1, blocksize)
            scale = blocks.abs().amax(1).clamp_min(1e-30)
            levels = torch.tensor(NF4_LEVELS, device=w.device)
            borders = (levels[1:] + levels[:-1]) / 2
            code = torch.bucketize((blocks / scale[:, None]).flatten(), borders).to(torch.uint8).view(-1, 2)
            return cls(format, (code[:, 0] << 4 | code[:, 1])[:, None], scale, (n, k), blocksize)
        if format == "int8":
            scale = w.abs().amax(1).clamp_min(1e-30) / 127
            return cls(format, (w / scale[:, None]).round().to(torch.int8), scale, (n, k))
        limit = torch.finfo(torch.float8_e4m3fn).max
        if not tiles:
            scale = w.abs().amax().clamp_min(1e-30) / limit
            return cls(format, (w / scale).to(torch.float8_e4m3fn), scale, (n, k))
        rows, columns = -(-n // FP8_TILE), -(-k // FP8_TILE)
        padded = torch.nn.functional.pad(w, (0, columns * FP8_TILE - k, 0, rows * FP8_TILE - n))
        scale = padded.view(rows, FP8_TILE, columns, FP8_TILE).abs().amax((1, 3)).clamp_min(1e-30) / limit
        return cls(format, (w / _spread(scale, n, k)).to(torch.float8_e4m3fn), scale, (n, k))

    @classmethod
    def from_bitsandbytes(cls, weight: torch.Tensor) -> "QuantizedWeight":
        """Of a bitsandbytes Params4bit (nf4; nested statistics are expanded) or Int8Params; shares its data."""
        state = getattr(weight, "quant_state", None)
        if state is not None:
            if state.quant_type != "nf4":
                raise ValueError(f"QuantizedWeight: bitsandbytes format {state.quant_type!r} is not served, only 'nf4'")
            scale = state.absmax
            if state.nested:
                second = state.state2
                step = second.absmax.repeat_interleave(second.blocksize)[: scale.numel()]
                scale = second.code[scale.long()] * step + state.offset
            return cls("nf4", weight.data, scale, tuple(state.shape), state.blocksize)
        if getattr(weight, "SCB", None) is not None:
            return cls("int8", weight.data, weight.SCB.float().flatten() / 127, tuple(weight.shape))
        raise TypeError(f"QuantizedWeight: expected a quantised bitsandbytes weight, got {type(weight).__name__}")


def _check_blocksize(blocksize):
    if isinstance(blocksize, bool) or not isinstance(blocksize, int):
        raise TypeError(f"QuantizedWeight: blocksize is {blocksize!r}, expected an int")
    if blocksize < 2 or blocksize % 2:
        raise ValueError(f"QuantizedWeight: blocksize is {blocksize}, expected an even number of 2 or more")


def _spread(scale, n, k):
    """A scale per tile, repeated to one per element of (n, k)."""
    return scale.repeat_interleave(FP8_TILE, 0)[:n].repeat_interleave(FP8_TILE, 1)[:, :k]


def dequantize(weight: QuantizedWeight, dtype: torch.dtype) -> torch.Tensor:
    """The (N, K) weight in `dtype`: computed in fp32 (fp64 for fp64), rounded once."""
    (n, k), wide = weight.shape, torch.promote_types(dtype, torch.float32)
    scale = weight.scale.to(wide)
    if weight.format == "nf4":
        levels = torch.tensor(NF4_LEVELS, dtype=wide, device=scale.device)
        code = weight.data.flatten()
        code = torch.stack((code >> 4, code & 15), 1)
        w = (levels[code.long()].view(-1, weight.blocksize) * scale.view(-1, 1)).view(n, k)
    elif weight.format == "int8":
        w = weight.data.to(wide) * scale[:, None]
    else:
        w = weight.data.to(wide) * (scale if scale.dim() == 0 else _spread(scale, n, k))
    return w.to(dtype)
