"""Loss curves of stock and PyFast on GSM8K: a random Llama, prompts masked, rows packed, the same 100 steps.

    python examples/gsm8k_curve.py --train_file gsm8k/train.jsonl [--steps 100] [--hidden 768 --layers 8] [--json]

No hub is needed: the tokenizer is trained on the file. Each run has a process of its own. Prints the largest distance
between the curves and fails where it is above --tolerance at any step.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path


def make_model(folder: Path, train_file: str, vocabulary: int, hidden: int, layers: int) -> None:
    """A random Llama with a byte-level BPE tokenizer of the same vocabulary, trained on the file."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    texts = [text for line in Path(train_file).read_text().splitlines() for text in json.loads(line).values()]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>").save_pretrained(folder)
    torch.manual_seed(0)
    heads = hidden // 64
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3 // 64 * 64,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 3),
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train_file", required=True)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--tolerance", type=float, default=0.02)
    args = parser.parse_args()
    curves, rates = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        make_model(model, args.train_file, args.vocabulary, args.hidden, args.layers)
        options = {
            "model_name_or_path": model, "train_file": args.train_file, "task": "text-generation", "packing": True,
            "max_train_samples": args.steps * args.batch, "max_steps": args.steps, "validation_split": 0,
            "per_device_train_batch_size": args.batch, "learning_rate": 1e-3, "logging_steps": 1, "lr_scheduler_type":
            "constant", "eval_strategy": "no", "save_strategy": "no", "dtype": args.dtype, "disable_tqdm": True,
        }  # fmt: skip
        words = [f"--{name}={value}" for name, value in options.items()]
        for name, flags in (("stock", ["--stock"]), ("pyfast", [])):
            output = Path(folder) / name
            command = [sys.executable, "-m", "pyfast.cli", "finetune", *words, f"--output_dir={output}", *flags]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            run = json.loads((output / "run.json").read_text())
            curves[name] = [loss for _, loss in run["loss"]]
            rates[name] = run["train"]["tokens_per_second"]
    distances = [abs(a - b) for a, b in zip(curves["stock"], curves["pyfast"], strict=True)]
    first, last = curves["stock"][0], curves["stock"][-1]
    found = {"steps": len(distances), "first_loss": first, "last_loss": last, "largest_distance": max(distances)}
    print(json.dumps({**found, "tokens_per_s": rates}))
    if not max(distances) <= args.tolerance:
        sys.exit(f"the curves are {max(distances):.4f} apart, more than {args.tolerance}")


if __name__ == "__main__":
    main()
