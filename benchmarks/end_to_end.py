"""A whole training step, stock beside PyFast: forward, backward and optimizer, in tokens per second and peak memory.

    python -m benchmarks.end_to_end --config llama-90m --dtype bf16 --batch 4 --seq 512 --json

Each variant lives in a process of its own, so that its memory is its own; they take turns, a round each, so that a
machine whose speed drifts slows all. A round during which other processes took more than BUSY of the CPU is discarded.
Before anything is timed, the variants' losses of several steps, dropout off, must agree. The step's own matrix products
take a turn too, in a process without a model.
"""

import argparse
import gc
import json
import multiprocessing
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

from . import data
from .machine import OthersLoad, folder_name, forget_peak, machine, require_kernels, resident_mb, versions

BUSY = 0.05  # the share of the CPU that others may take during a round
CHECKED = 3  # steps whose losses are compared, at least: every batch once
RANK, ALPHA = 16, 8  # of LoRA

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
MINILM_WORDS = {"vocab_size": data.MINILM_VOCABULARY}
LLAMA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Config(NamedTuple):
    """A model: random weights of a transformers config class with these arguments, or MiniLM's; and its data.

    data: "tokens", "sentences" or "questions" of data.py. batch, steps: defaults; a round is `steps` steps.
    """

    class_name: str | None
    arguments: dict
    targets: list[str]
    data: str = "tokens"
    batch: int = 4
    steps: int = 2
    variants: tuple[str, ...] = ("stock", "pyfast")


SFT = {"data": "questions", "batch": 8, "steps": 8, "variants": ("stock", "packed", "pyfast")}
CONFIGS = {
    "llama-90m": Config("LlamaConfig", LLAMA_90M, LLAMA_TARGETS),
    "qwen2-0.5b": Config("Qwen2Config", QWEN2_05B, LLAMA_TARGETS),
    "gpt2-small": Config("GPT2Config", {}, ["c_attn", "c_proj", "c_fc"]),
    "bert-minilm": Config(None, {}, ["query", "key", "value", "dense"], "sentences", 16, 8),
    "sft-gsm8k": Config("LlamaConfig", LLAMA_90M | MINILM_WORDS, LLAMA_TARGETS, **SFT),
    # to try the benchmark itself
    "llama-tiny": Config("LlamaConfig", LLAMA_90M | LLAMA_TINY, LLAMA_TARGETS),
    "sft-tiny": Config("LlamaConfig", LLAMA_90M | LLAMA_TINY | MINILM_WORDS, LLAMA_TARGETS, **SFT),
}


class Variant(NamedTuple):
    """How a model is trained. packed: on questions joined without padding, where the data are questions."""

    help: str
    patched: bool = False
    compiled: bool = False
    fp32_adapters: bool = True
    packed: bool = False


VARIANTS = {
    "stock": Variant("Hugging Face and PEFT as they are, batches padded"),
    "pyfast": Variant("pyfast.patch; questions packed, with their boundaries", patched=True, packed=True),
    "compile": Variant("stock under torch.compile", compiled=True),
    "bf16_adapters": Variant("stock with autocast_adapter_dtype=False", fp32_adapters=False),
    "packed": Variant("stock on packed questions, with positions that give correct masks", packed=True),
    "pyfast_padded": Variant("pyfast.patch on stock's padded questions", patched=True),
}
GEMMS = "gemms"  # the process of the step's own matrix products

#: how far two variants' losses may differ, relative: rounding in the model's dtype, never a wrong kernel
LOSS_TOLERANCE = {"fp32": 1e-5, "bf16": 2e-3}


def torch_dtype(name: str):
    import torch

    return {"bf16": torch.bfloat16, "fp32": torch.float32}[name]


def build(config: Config, dtype: str, fp32_adapters: bool = True):
    """The model with LoRA r=16, by default as PEFT makes it: fp32 adapters beside a bf16 model, SDPA attention."""
    return add_adapters(base_model(config, dtype), config, fp32_adapters)


def base_model(config: Config, dtype: str):
    """The model without adapters, on the default device."""
    import torch
    import transformers

    torch.manual_seed(0)
    name, arguments, *_ = config
    options = {"dtype": torch_dtype(dtype), "attn_implementation": "sdpa"}
    if name is None:
        model = transformers.AutoModelForSequenceClassification.from_pretrained(data.minilm(), num_labels=2, **options)
    else:
        model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**arguments), **options)
    model.config.use_cache = False  # as Trainer sets it; with a cache, stock takes packed rows for one
    return model


def add_adapters(model, config: Config, fp32_adapters: bool = True):
    import peft

    task = "SEQ_CLS" if config.class_name is None else "CAUSAL_LM"
    lora = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=config.targets, task_type=task)
    model = peft.get_peft_model(model, lora, autocast_adapter_dtype=fp32_adapters)
    draw_adapters(model)
    return model.train()


def draw_adapters(model) -> None:
    """The same ones whatever has drawn numbers before. A zero B would hide every error behind it."""
    import torch

    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            scale = 0.02 if "lora_B" in name else parameter.shape[1] ** -0.5
            parameter.data.copy_(torch.randn(parameter.shape) * scale)


def find_data(options: argparse.Namespace, packed: bool = False, boundaries: bool = False) -> data.Data:
    config = CONFIGS[options.config]
    if config.data == "sentences":
        return data.sentences(options.batch, options.steps)
    if config.data == "questions":
        return data.questions(options.batch, options.steps, packed, packed and boundaries)
    vocabulary = config.arguments.get("vocab_size", 50257)  # GPT-2's default
    return data.random_tokens(vocabulary, options.batch, options.seq)


class Training:
    """Steps of one variant. A step's value is its loss."""

    def __init__(self, variant: str, model, batches: list[dict]):
        import torch

        self.model = self.call = model
        self.batches = batches
        self.dropout = [(module, module.p) for module in model.modules() if isinstance(module, torch.nn.Dropout)]
        if VARIANTS[variant].patched:
            import pyfast

            pyfast.patch(model)
        if VARIANTS[variant].compiled:
            self.call = torch.compile(model)
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def set_dropout(self, on: bool) -> None:
        """Variants draw different masks: their losses can be compared only without dropout."""
        for module, p in self.dropout:
            module.p = p if on else 0.0

    def step(self, i: int) -> float:
        loss = self.call(**self.batches[i % len(self.batches)]).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


class Gemms:
    """The matrix products that a PyFast step needs, by torch.mm on reused memory. A step's value: seconds without LoRA.

    Counted in a forward of the stock model on PyFast's batches: one product for each projection, one more where its
    input needs a gradient, one more where its weight does. Padding is left out, and in the head what is unsupervised;
    so are attention's products.
    """

    def __init__(self, steps: list[list], dtype):
        import torch

        self.steps = steps  # of each batch what `needed` gives
        sizes = [(m * k, n * k, m * n) for step in self.steps for _, m, k, n, _ in step]
        x, w, y = (max(column) for column in zip(*sizes, strict=True))
        self.x, self.w, self.y, self.out = (torch.randn(n, dtype=dtype) for n in (x, w, y, max(x, w, y)))

    def set_dropout(self, on: bool) -> None:
        pass

    def multiply(self, kind: str, m: int, k: int, n: int) -> None:
        import torch

        x, w, y = self.x[: m * k].view(m, k), self.w[: n * k].view(n, k), self.y[: m * n].view(m, n)
        a, b = {"y": (x, w.T), "dx": (y, w), "dw": (y.T, x)}[kind]
        torch.mm(a, b, out=self.out[: len(a) * b.shape[1]].view(len(a), b.shape[1]))

    def step(self, i: int) -> float:
        seconds = 0.0
        for *product, adapter in self.steps[i % len(self.steps)]:
            start = time.perf_counter()
            self.multiply(*product)
            seconds += 0.0 if adapter else time.perf_counter() - start
        return seconds


def needed(model, batch: dict) -> list[tuple[str, int, int, int, bool]]:
    """(kind, rows, in, out, whether an adapter's) of the products of a batch's forward and backward."""
    import torch
    from transformers.pytorch_utils import Conv1D

    names = {module: name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear | Conv1D)}
    head = model.get_output_embeddings()
    mask = batch.get("attention_mask")
    found = []

    def record(module, args, output):
        x = args[0]
        rows, k, n = x[..., 0].numel(), x.shape[-1], output.shape[-1]
        if module is head:
            rows = data.supervised(batch)
        elif mask is not None and x.shape[:-1] == mask.shape:
            rows = int(mask.sum())
        kinds = ("y",) + ("dx",) * x.requires_grad + ("dw",) * module.weight.requires_grad
        found.extend((kind, rows, k, n, "lora_" in names[module]) for kind in kinds)

    hooks = [module.register_forward_hook(record) for module in names]
    model(**batch)
    for hook in hooks:
        hook.remove()
    return found


def receive(pipe):
    try:
        return pipe.recv()
    except EOFError:  # the measuring process has given up
        return None


def worker(pipe, variant: str, options: argparse.Namespace) -> None:
    """Serves rounds: receives a number of steps and whether dropout is on; answers their seconds, values and memory."""
    import torch

    torch.set_num_threads(options.threads)
    config = CONFIGS[options.config]
    if variant == GEMMS:
        found = find_data(options, packed=True)
        model = build(config, options.dtype)
        training = Gemms([needed(model, batch) for batch in found.batches], torch_dtype(options.dtype))
    else:
        kind = VARIANTS[variant]
        found = find_data(options, kind.packed, boundaries=kind.patched)
        training = Training(variant, build(config, options.dtype, kind.fp32_adapters), found.batches)
    gc.collect()
    forget_peak()
    pipe.send({"loaded_mb": resident_mb()})
    while order := receive(pipe):
        steps, dropout = order
        training.set_dropout(dropout)
        with OthersLoad() as others:
            start = time.perf_counter()
            values = [training.step(i) for i in range(steps)]
            seconds = time.perf_counter() - start
        pipe.send({"seconds": seconds, "values": values, "others": others.share, "peak_mb": resident_mb("VmHWM")})


def check_losses(losses: dict[str, list[float]], tolerance: float) -> None:
    """Ends the run where a variant's losses differ from the first variant's."""
    first, *others = losses
    for variant in others:
        errors = [abs(a - b) / abs(a) for a, b in zip(losses[first], losses[variant], strict=True)]
        if not all(error <= tolerance for error in errors):  # so written, a NaN is refused
            raise SystemExit(f"{variant}'s losses differ from {first}'s, by {errors}: nothing is timed")


def measure(options: argparse.Namespace) -> dict:
    context = multiprocessing.get_context("forkserver")  # what all import is imported once
    context.set_forkserver_preload(["benchmarks.end_to_end", "torch", "transformers", "peft", "pyfast"])
    pipes, processes, loaded = {}, [], {}
    everyone = [*options.variants, GEMMS]
    for variant in everyone:
        pipes[variant], theirs = context.Pipe()
        processes.append(context.Process(target=worker, args=(theirs, variant, options), daemon=True))
        processes[-1].start()
        theirs.close()

    def answer(variant: str) -> dict:
        try:
            return pipes[variant].recv()
        except EOFError:
            raise SystemExit(f"the process of {variant} ended in an error (above): nothing is reported") from None

    def round_of(variant: str, steps: int, dropout: bool = True) -> dict:
        pipes[variant].send((steps, dropout))
        return answer(variant)

    loaded = {variant: answer(variant)["loaded_mb"] for variant in everyone}
    checked = {variant: round_of(variant, max(CHECKED, options.steps), dropout=False) for variant in options.variants}
    check_losses({variant: found["values"] for variant, found in checked.items()}, LOSS_TOLERANCE[options.dtype])
    for variant in everyone:
        round_of(variant, options.steps)  # warm

    seconds = {variant: [] for variant in everyone}
    frozen, peak, discarded = [], {}, 0
    while len(frozen) < options.rounds:
        taken = {variant: round_of(variant, options.steps) for variant in everyone}
        peak = {variant: taken[variant]["peak_mb"] for variant in everyone}
        if max(result["others"] for result in taken.values()) > BUSY:
            discarded += 1
            if discarded > options.max_discarded:
                raise SystemExit(
                    f"{discarded} rounds were disturbed by other processes and only {len(frozen)} of {options.rounds}"
                    " were clean: try again on a quiet machine"
                )
            continue
        for variant, result in taken.items():
            seconds[variant].append(result["seconds"] / options.steps)
        frozen.append(sum(taken[GEMMS]["values"]) / options.steps)
    for variant in everyone:
        pipes[variant].send(None)
    for process in processes:
        process.join()
    return report(options, seconds, frozen, peak, loaded) | {"discarded_rounds": discarded}


def report(options: argparse.Namespace, seconds: dict, frozen: list[float], peak: dict, loaded: dict) -> dict:
    """The fields of the JSON object; rates are in supervised tokens where the data are questions."""
    found = find_data(options)
    kind = CONFIGS[options.config].data
    counted = found.supervised_tokens() if kind == "questions" else found.tokens()
    tokens = counted / len(found.batches)
    result = {"config": options.config, "dtype": options.dtype, "batch": options.batch}
    result |= {"seq": max(batch["input_ids"].shape[1] for batch in found.batches), "data": found.name}
    result |= {"counted": "supervised tokens" if kind == "questions" else "tokens", "tokens": found.tokens()}
    result |= {"padded_tokens": found.padded_tokens(), "rounds": options.rounds, "steps": options.steps}
    median = {variant: statistics.median(values) for variant, values in seconds.items()}
    for variant in options.variants:
        result[f"{variant}_tokens_per_s"] = round(tokens / median[variant], 1)
        result[f"{variant}_step_s"] = [round(f(seconds[variant]), 4) for f in (min, statistics.median, max)]
        result[f"{variant}_peak_mb"] = round(peak[variant], 1)
        result[f"{variant}_loaded_mb"] = round(loaded[variant], 1)
    if "pyfast" in options.variants:
        result["gemm_s"] = [round(f(seconds[GEMMS]), 4) for f in (min, statistics.median, max)]
        result["gemm_share"] = round(median[GEMMS] / median["pyfast"], 3)
        result["frozen_gemm_share"] = round(statistics.median(frozen) / median["pyfast"], 3)
        above = {variant: peak[variant] - loaded[variant] for variant in options.variants}
        for variant in options.variants:
            if variant != "pyfast":
                suffix = "" if variant == "stock" else f"_{variant}"
                result[f"ratio{suffix}"] = round(median[variant] / median["pyfast"], 3)
                result[f"memory_ratio{suffix}"] = round(above["pyfast"] / above[variant], 3)
    return result | {"machine": machine(), "versions": versions()}


def save(result: dict, folder: Path) -> None:
    """end_to_end_<config>_<dtype>.json, and end_to_end.md with a row for each of them in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    name = f"end_to_end_{result['config']}_{result['dtype']}.json"
    (folder / name).write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    lines = [
        "# end_to_end",
        "",
        "A variant's step is the median with its smallest and largest; its ratio is its time over PyFast's: above 1,"
        " PyFast wins; where it loses, ◀. Memory is PyFast's peak above the loaded model over the variant's.",
        "`gemms`: the step's own matrix products alone.",
        "",
        "| config | dtype | data | variant | step, ms | tokens/s | ratio | memory | commit |",
        "|---|---|---|---|--:|--:|--:|--:|---|",
    ]
    for path in sorted(folder.glob("end_to_end_*.json")):
        found = json.loads(path.read_text())
        variants = [key.removesuffix("_step_s") for key in found if key.endswith("_step_s")]
        for variant in [*variants, *(["gemms"] if "gemm_s" in found else [])]:
            low, middle, high = (
                f"{1e3 * s:.0f}" for s in found["gemm_s" if variant == "gemms" else f"{variant}_step_s"]
            )
            suffix = "" if variant == "stock" else f"_{variant}"
            ratio = found.get("gemm_share" if variant == "gemms" else f"ratio{suffix}", "")
            loses = " ◀" if variant != "gemms" and ratio != "" and ratio < 1 else ""
            cells = [found["config"], found["dtype"], found.get("data", "random tokens"), variant]
            cells += [f"{middle} ({low} to {high})", found.get(f"{variant}_tokens_per_s", ""), f"{ratio}{loses}"]
            cells += [found.get(f"memory_ratio{suffix}", ""), found["versions"].get("commit", "")]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    (folder / "end_to_end.md").write_text("\n".join(lines) + "\n")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.end_to_end", description=__doc__.split("\n\n")[0])
    parser.add_argument("--config", choices=CONFIGS, default="llama-90m")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--batch", type=int, help="default: the configuration's")
    parser.add_argument("--seq", type=int, default=512, help="tokens of a row, where tokens are random")
    parser.add_argument("--rounds", type=int, default=5, help="clean rounds per variant, 5 at least")
    parser.add_argument("--steps", type=int, help="training steps in a round; default: the configuration's")
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    known = "; ".join(f"{name}: {variant.help}" for name, variant in VARIANTS.items())
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, help=f"default: the configuration's. {known}")
    parser.add_argument("--max-discarded", type=int, default=30, help="disturbed rounds before giving up")
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line, instead of a table")
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="also write it to FOLDER/<machine>/")
    options = parser.parse_args(argv)
    config = CONFIGS[options.config]
    options.batch, options.steps = options.batch or config.batch, options.steps or config.steps
    options.variants = options.variants or list(config.variants)
    if options.rounds < 5:
        parser.error("--rounds: 5 at least, for a median that means something")
    if options.threads is None:
        import torch

        options.threads = torch.get_num_threads()
    require_kernels()
    result = measure(options)
    if options.save:
        save(result, options.save / folder_name())
    if options.json:
        print(json.dumps(result))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("", *options.variants, title=f"{options.config}, {options.dtype}, {result['data']}")
    for label, field in (
        (f"{result['counted']}/s", "tokens_per_s"),
        ("peak MB", "peak_mb"),
        ("loaded MB", "loaded_mb"),
    ):
        table.add_row(label, *(f"{result[f'{variant}_{field}']:,.0f}" for variant in options.variants))
    Console().print(table)
    for name, value in result.items():
        if name.startswith(("ratio", "memory_ratio", "gemm_share", "frozen_gemm_share")):
            print(f"{name} {value}")


if __name__ == "__main__":
    sys.exit(main())
