"""PyFast: fused LoRA, attention and cross-entropy kernels, swapped into Hugging Face models by one call."""

import importlib

from pyfast import ops
from pyfast.dispatch import use_backend
from pyfast.ops.checks import checks

__version__ = "0.1.0"

# loaded at first use: these need transformers and PEFT, which the ops do not
_LAZY = {
    "patch": "pyfast.hf.patch",
    "unpatch": "pyfast.hf.patch",
    "PatchReport": "pyfast.hf.patch",
    "verify": "pyfast.verification",
    "VerifyReport": "pyfast.verification",
    "finetune": "pyfast.train",
}

__all__ = ["__version__", "checks", "ops", "use_backend", *_LAZY]


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'pyfast' has no attribute {name!r}")
