"""Fine-tuning: transformers' Trainer, PEFT, datasets and accelerate, with PyFast's swap, packing and report."""

from .config import FinetuneArguments, InputError, parse_arguments
from .predict import GenerateArguments, PredictArguments, generate, predict
from .trainer import FinetuneResult, finetune, run

__all__ = [
    "FinetuneArguments",
    "FinetuneResult",
    "GenerateArguments",
    "InputError",
    "PredictArguments",
    "finetune",
    "generate",
    "parse_arguments",
    "predict",
    "run",
]
