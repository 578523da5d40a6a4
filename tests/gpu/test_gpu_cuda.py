"""What tests/cuda tests of the CUDA kernels beyond the ops' own tests: the borders of their tiles, and sm_90a's."""

import importlib.util
from pathlib import Path

for path in sorted((Path(__file__).parents[1] / "cuda").glob("test_op_*.py")):
    spec = importlib.util.spec_from_file_location(f"cuda_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, value in vars(module).items():
        if name.startswith("test_") and value.__module__ == module.__name__:
            globals()[f"{name}_of_{path.stem.removeprefix('test_op_')}"] = value
