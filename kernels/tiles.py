"""The tile of every kernel, as data: kernel -> architecture -> rows of (largest problem size, tile), first fit. What
follows a kernel's name is a variant of it with tiles of its own.

Size is what the kernel's launcher passes to `launch.tile`; None is no limit. "default" serves every GPU without rows of
its own; "interpreter" has small tiles, so that small tests cross many tile borders.
Tiles marked "guess" have not been timed on hardware. `pyfast tune` times tiles on a GPU and writes the best of them to
tiles_<architecture>.json beside this file, whose rows then stand here under that architecture.
"""

import json
from pathlib import Path

TILES: dict[str, dict[str, list[tuple[int | None, dict[str, int]]]]] = {
    # columns
    "gated_kernel": {
        "interpreter": [(256, {"ROWS": 16, "BLOCK": 64}), (None, {"ROWS": 1, "BLOCK": 1024})],
        "default": [(None, {"ROWS": 1, "BLOCK": 1024, "num_warps": 4})],  # guess
    },
    "gated_backward_kernel": {
        "interpreter": [(256, {"ROWS": 16, "BLOCK": 64}), (None, {"ROWS": 1, "BLOCK": 1024})],
        "default": [(None, {"ROWS": 1, "BLOCK": 1024, "num_warps": 4})],  # guess
    },
    "activate_kernel": {
        "interpreter": [(None, {"ROWS": 16, "BLOCK": 64})],
        "default": [(None, {"ROWS": 1, "BLOCK": 1024, "num_warps": 4})],  # guess
    },
    "activate_backward_kernel": {
        "interpreter": [(None, {"ROWS": 16, "BLOCK": 64})],
        "default": [(None, {"ROWS": 32, "BLOCK": 64, "num_warps": 4})],  # guess
    },
    # classes
    "cross_entropy_kernel": {
        "interpreter": [(None, {"BLOCK": 512})],
        "default": [(4096, {"BLOCK": 1024, "num_warps": 4}), (None, {"BLOCK": 4096, "num_warps": 8})],  # guess
    },
    # classes
    "exponentials_kernel": {
        "interpreter": [(None, {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64})],
        "default": [  # guess
            (None, {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32, "num_warps": 8, "num_stages": 3}),
        ],
    },
    "logits_gradient_kernel": {
        "interpreter": [(None, {"BLOCK": 512})],
        "default": [(None, {"BLOCK": 2048, "num_warps": 4})],  # guess
    },
    # columns; a program holds whole rows
    "norm_kernel": {
        "interpreter": [(None, {"ROWS": 16})],
        "default": [  # guess
            (256, {"ROWS": 8, "num_warps": 4}),
            (1024, {"ROWS": 2, "num_warps": 4}),
            (4096, {"ROWS": 1, "num_warps": 4}),
            (16384, {"ROWS": 1, "num_warps": 8}),
            (None, {"ROWS": 1, "num_warps": 16}),
        ],
    },
    # PROGRAMS: at most so many per line of the weight, each summing over its rows
    "norm_backward_kernel": {
        "interpreter": [(None, {"ROWS": 16, "PROGRAMS": 3})],
        "default": [  # guess
            (256, {"ROWS": 8, "PROGRAMS": 512, "num_warps": 4}),
            (1024, {"ROWS": 2, "PROGRAMS": 512, "num_warps": 4}),
            (4096, {"ROWS": 1, "PROGRAMS": 512, "num_warps": 8}),
            (8192, {"ROWS": 1, "PROGRAMS": 512, "num_warps": 16}),
            (None, {"ROWS": 1, "PROGRAMS": 512, "num_warps": 32}),
        ],
        "gfx942": [  # guess; a warp has 64 threads
            (256, {"ROWS": 8, "PROGRAMS": 512, "num_warps": 4}),
            (1024, {"ROWS": 2, "PROGRAMS": 512, "num_warps": 4}),
            (4096, {"ROWS": 1, "PROGRAMS": 512, "num_warps": 8}),
            (8192, {"ROWS": 1, "PROGRAMS": 512, "num_warps": 16}),
            (None, {"ROWS": 1, "PROGRAMS": 512, "num_warps": 16}),
        ],
    },
    # dim
    "rope_kernel": {
        "interpreter": [(None, {"ROWS": 32})],
        "default": [(None, {"ROWS": 32, "num_warps": 4})],  # guess
    },
    # head dimension, rounded up to a power of two
    "attention_kernel": {
        "interpreter": [(None, {"BLOCK_M": 64, "BLOCK_N": 32})],
        "default": [  # guess
            (64, {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3}),
            (128, {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2}),
            (None, {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2}),
        ],
        "gfx942": [  # guess
            (64, {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 4, "num_stages": 1}),
            (128, {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 1}),
            (None, {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2}),
        ],
    },
    "attention_dq_kernel": {
        "interpreter": [(None, {"BLOCK_M": 64, "BLOCK_N": 32})],
        "default": [  # guess
            (64, {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2}),
            (128, {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2}),
            (None, {"BLOCK_M": 64, "BLOCK_N": 16, "num_warps": 8, "num_stages": 2}),
        ],
        "gfx942": [  # guess
            (64, {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1}),
            (128, {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2}),
            (None, {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1}),
        ],
    },
    "attention_dkv_kernel": {
        "interpreter": [(None, {"BLOCK_M": 32, "BLOCK_N": 64})],
        "default": [  # guess
            (64, {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2}),
            (128, {"BLOCK_M": 32, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2}),
            (None, {"BLOCK_M": 16, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2}),
        ],
        "gfx942": [  # guess
            (64, {"BLOCK_M": 32, "BLOCK_N": 64, "num_warps": 4, "num_stages": 1}),
            (None, {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1}),
        ],
    },
    "attention_dbias_kernel": {
        "interpreter": [(None, {"BLOCK_M": 64, "BLOCK_N": 32})],
        "default": [  # guess
            (128, {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2}),
            (None, {"BLOCK_M": 64, "BLOCK_N": 16, "num_warps": 8, "num_stages": 1}),
        ],
        "gfx942": [  # guess
            (128, {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1}),
            (None, {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1}),
        ],
    },
    "dropout_kernel": {
        "interpreter": [(None, {"BLOCK": 256})],
        "default": [(None, {"BLOCK": 1024, "num_warps": 4})],  # guess
    },
    "dequantize_kernel": {
        "interpreter": [(None, {"BLOCK": 256})],
        "default": [(None, {"BLOCK": 1024, "num_warps": 4})],  # guess
    },
    # rank; SPLITS: parts of the columns
    "adapter_gradients_kernel": {
        "interpreter": [(None, {"BLOCK_M": 64, "BLOCK_N": 64, "SPLITS": 2})],
        "default": [  # guess
            (32, {"BLOCK_M": 128, "BLOCK_N": 64, "SPLITS": 8, "num_warps": 4, "num_stages": 3}),
            (None, {"BLOCK_M": 64, "BLOCK_N": 32, "SPLITS": 4, "num_warps": 4, "num_stages": 2}),
        ],
    },
    # columns of the product; SPLITS: at most so many parts of a sum over rows
    "matmul_kernel": {
        "interpreter": [(None, {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 128, "GROUP": 2, "SPLITS": 3})],
        "default": [  # guess
            (
                16,
                {
                    "BLOCK_M": 64,
                    "BLOCK_N": 16,
                    "BLOCK_K": 64,
                    "GROUP": 8,
                    "SPLITS": 16,
                    "num_warps": 4,
                    "num_stages": 3,
                },
            ),
            (
                64,
                {
                    "BLOCK_M": 64,
                    "BLOCK_N": 64,
                    "BLOCK_K": 64,
                    "GROUP": 8,
                    "SPLITS": 16,
                    "num_warps": 4,
                    "num_stages": 3,
                },
            ),
            (
                None,
                {
                    "BLOCK_M": 128,
                    "BLOCK_N": 128,
                    "BLOCK_K": 32,
                    "GROUP": 8,
                    "SPLITS": 4,
                    "num_warps": 8,
                    "num_stages": 3,
                },
            ),
        ],
    },
}

_matmul = TILES["matmul_kernel"]
#: Philox takes registers: large tiles spill
TILES["matmul_kernel with dropout"] = {
    "interpreter": _matmul["interpreter"],
    "default": [
        *_matmul["default"][:-1],
        (None, {**_matmul["default"][-1][1], "BLOCK_N": 64}),  # guess
    ],
}

for _file in Path(__file__).parent.glob("tiles_*.json"):
    for _kernel, _rows in json.loads(_file.read_text())["tiles"].items():
        _tiles = [(row["up_to"], row["tile"]) for row in _rows]
        TILES[_kernel][_file.stem.removeprefix("tiles_")] = _tiles
