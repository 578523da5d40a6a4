"""A whole training step, stock beside PyFast: forward, backward and optimizer, in tokens per second and peak memory.

    python -m benchmarks.end_to_end --config llama-90m --dtype bf16 --batch 4 --seq 512 --json

Each variant lives in a process of its own, so that its memory is its own; they take turns, a round each, so that a
machine whose speed drifts slows both. A round during which other processes took more than BUSY of the CPU is discarded.
Before anything is timed, the variants' first losses must agree.
"""

import argparse
import json
import multiprocessing
import statistics
import sys
import time
from pathlib import Path

BUSY = 0.05  # the share of the CPU that others may take during a round
WARMUP = 3  # steps before timing; their losses are compared

LLAMA_90M = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 8,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
}
LLAMA_TINY = {"hidden_size": 96, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 1000}
QWEN2_05B = {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
LLAMA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

#: name -> (transformers config class, its arguments, LoRA targets)
CONFIGS = {
    "llama-90m": ("LlamaConfig", LLAMA_90M, LLAMA_TARGETS),
    "qwen2-0.5b": ("Qwen2Config", QWEN2_05B, LLAMA_TARGETS),
    "gpt2-small": ("GPT2Config", {}, ["c_attn", "c_proj", "c_fc"]),
    "llama-tiny": ("LlamaConfig", LLAMA_90M | LLAMA_TINY, LLAMA_TARGETS),  # to try the benchmark itself
}
#: how far two variants' losses may differ, relative: rounding in the model's dtype, never a wrong kernel
LOSS_TOLERANCE = {"fp32": 1e-5, "bf16": 2e-3}


def build(config: str, dtype: str):
    """The model with LoRA r=16 as PEFT makes it by default: fp32 adapters beside a bf16 model, SDPA attention."""
    import peft
    import torch
    import transformers

    torch.manual_seed(0)
    class_name, arguments, targets = CONFIGS[config]
    model = transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, class_name)(**arguments),
        dtype={"bf16": torch.bfloat16, "fp32": torch.float32}[dtype],
        attn_implementation="sdpa",
    )
    model = peft.get_peft_model(model, peft.LoraConfig(r=16, target_modules=targets, task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():  # a zero B would hide every error behind it
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model.train()


def resident_mb(field: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def receive(pipe) -> int:
    try:
        return pipe.recv()
    except EOFError:  # the measuring process has given up
        return 0


def worker(pipe, variant: str, options: argparse.Namespace) -> None:
    """Serves rounds: receives a number of steps, answers its seconds, losses, peak memory and what others took."""
    import torch

    from .machine import OthersLoad

    torch.set_num_threads(options.threads)
    model = step_model = build(options.config, options.dtype)
    if variant == "pyfast":
        import pyfast

        pyfast.patch(model)
    elif variant == "compile":
        step_model = torch.compile(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, model.config.vocab_size, (options.batch, options.seq), generator=generator)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew at what is resident now
    pipe.send({"loaded_mb": resident_mb("VmRSS")})

    def step() -> float:
        loss = step_model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    while steps := receive(pipe):
        with OthersLoad() as others:
            start = time.perf_counter()
            losses = [step() for _ in range(steps)]
            seconds = time.perf_counter() - start
        pipe.send({"seconds": seconds, "losses": losses, "others": others.share, "peak_mb": resident_mb("VmHWM")})


def measure(options: argparse.Namespace) -> dict:
    from .machine import machine, versions

    context = multiprocessing.get_context("spawn")
    pipes, processes, loaded = {}, [], {}
    for variant in options.variants:
        pipes[variant], theirs = context.Pipe()
        processes.append(context.Process(target=worker, args=(theirs, variant, options), daemon=True))
        processes[-1].start()
        theirs.close()
        loaded[variant] = pipes[variant].recv()["loaded_mb"]

    def round_of(variant: str, steps: int) -> dict:
        pipes[variant].send(steps)
        try:
            return pipes[variant].recv()
        except EOFError:
            raise SystemExit(f"the process of {variant} ended in an error (above): nothing is reported") from None

    warm = {variant: round_of(variant, WARMUP) for variant in options.variants}
    first = warm[options.variants[0]]["losses"]
    for variant in options.variants[1:]:
        worst = max(abs(a - b) / abs(a) for a, b in zip(first, warm[variant]["losses"], strict=True))
        if not worst <= LOSS_TOLERANCE[options.dtype]:
            raise SystemExit(f"{variant}'s losses differ from {options.variants[0]}'s by {worst:.1e}: nothing is timed")

    seconds = {variant: [] for variant in options.variants}
    peak, discarded = {}, 0
    while len(seconds[options.variants[0]]) < options.rounds:
        taken = {variant: round_of(variant, options.steps) for variant in options.variants}
        peak = {variant: taken[variant]["peak_mb"] for variant in options.variants}
        if max(result["others"] for result in taken.values()) > BUSY:
            discarded += 1
            if discarded > options.max_discarded:
                raise SystemExit(
                    f"{discarded} rounds were disturbed by other processes and only"
                    f" {len(seconds[options.variants[0]])} of {options.rounds} were clean: try again on a quiet machine"
                )
            continue
        for variant, result in taken.items():
            seconds[variant].append(result["seconds"] / options.steps)
    for variant in options.variants:
        pipes[variant].send(0)
    for process in processes:
        process.join()

    result = {"config": options.config, "dtype": options.dtype, "batch": options.batch, "seq": options.seq}
    result |= {"rounds": options.rounds, "discarded_rounds": discarded}
    median = {variant: statistics.median(seconds[variant]) for variant in options.variants}
    for variant in options.variants:
        result[f"{variant}_tokens_per_s"] = round(options.batch * options.seq / median[variant], 1)
        result[f"{variant}_step_s"] = [round(f(seconds[variant]), 4) for f in (min, statistics.median, max)]
        result[f"{variant}_peak_mb"] = round(peak[variant], 1)
        result[f"{variant}_loaded_mb"] = round(loaded[variant], 1)
    if {"stock", "pyfast"} <= set(options.variants):
        result["ratio"] = round(median["stock"] / median["pyfast"], 3)
        above = {v: peak[v] - loaded[v] for v in ("stock", "pyfast")}
        result["memory_ratio"] = round(above["pyfast"] / above["stock"], 3)
    return result | {"machine": machine(), "versions": versions()}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.end_to_end", description=__doc__.split("\n\n")[0])
    parser.add_argument("--config", choices=CONFIGS, default="llama-90m")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5, help="clean rounds per variant, 5 at least")
    parser.add_argument("--steps", type=int, default=2, help="training steps in a round")
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    parser.add_argument("--variants", nargs="+", choices=("stock", "pyfast", "compile"), default=["stock", "pyfast"])
    parser.add_argument("--max-discarded", type=int, default=30, help="disturbed rounds before giving up")
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line, instead of a table")
    options = parser.parse_args(argv)
    if options.rounds < 5:
        parser.error("--rounds: 5 at least, for a median that means something")
    if options.threads is None:
        import torch

        options.threads = torch.get_num_threads()
    result = measure(options)
    if options.json:
        print(json.dumps(result))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("", *options.variants, title=f"{options.config}, {options.dtype}, {options.batch} × {options.seq}")
    for label, field in (("tokens/s", "tokens_per_s"), ("peak MB", "peak_mb"), ("loaded MB", "loaded_mb")):
        table.add_row(label, *(f"{result[f'{variant}_{field}']:,.0f}" for variant in options.variants))
    Console().print(table)
    if "ratio" in result:
        print(
            f"PyFast: {result['ratio']:.2f} × stock, {result['memory_ratio']:.2f} × its memory above the loaded model"
        )


if __name__ == "__main__":
    sys.exit(main())
