"""The tile of every kernel, as data: kernel -> architecture -> rows of (largest problem size, tile), first fit.

Size is what the kernel's launcher passes to `launch.tile`; None is no limit. "default" serves every GPU without rows of
its own; "interpreter" has small tiles, so that small tests cross many tile borders.
Tiles marked "guess" have not been timed on hardware.
"""

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
}
