"""The public ops. Each is differentiable and runs on the backend that pyfast.dispatch chooses."""

from pyfast.ops import schemas  # noqa: F401  registers the kernels' schemas before any op is called
from pyfast.ops.swiglu import swiglu

__all__ = ["swiglu"]
