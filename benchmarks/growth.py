"""How a PyFast training step grows with layers, batch and sequence length.

    python -m benchmarks.growth [--dtype bf16] [--json] [--save benchmarks/results]

Time should grow linearly with layers and batch; with the length, attention's with its square and all else linearly, and
memory linearly. For each series: `off_line`, how far a point is from the best line, relative; `quadratic_share`, the
part of the largest value that the square has in the best parabola (0 for a line, near 1 for a square); `exponent`, the
slope between the last two points in a log-log plot. A time is the least of STEPS.
"""

import argparse
import gc
import json
import math
import time
from pathlib import Path

import numpy as np
from torch.autograd.profiler import profile

from . import charts, data, end_to_end, machine

WIDTH = {"hidden_size": 768, "intermediate_size": 2048, "num_attention_heads": 12, "num_key_value_heads": 4}
BASE = {"layers": 2, "batch": 1, "length": 512, "vocabulary": 8000}
#: what is varied -> its values
SERIES = {"layers": (2, 4, 8, 16), "batch": (2, 4, 8, 16), "length": (1024, 2048, 4096, 8192)}
STEPS = 5


def measure_step(dtype: str, width: dict, layers: int, batch: int, length: int, vocabulary: int) -> dict:
    """Seconds of a step, those inside attention's kernels apart, and the peak MB above the loaded model."""
    arguments = {**width, "num_hidden_layers": layers, "vocab_size": vocabulary, "tie_word_embeddings": False}
    arguments["max_position_embeddings"] = length
    config = end_to_end.Config("LlamaConfig", arguments, end_to_end.LLAMA_TARGETS)
    tokens = data.random_tokens(vocabulary, batch, length).batches
    training = end_to_end.Training("pyfast", end_to_end.build(config, dtype), tokens)
    gc.collect()
    training.step(0)
    peak = min(machine.peak_mb(lambda: training.step(0)) for _ in range(2))
    total, attention = [], []
    for _ in range(STEPS):
        with profile(use_kineto=False) as profiler:
            start = time.perf_counter()
            training.step(0)
            total.append(time.perf_counter() - start)
        events = [e for e in profiler.key_averages() if "attention" in e.key and "::" in e.key]
        attention.append(sum(event.self_cpu_time_total for event in events) / 1e6)
    seconds, inside = min(total), min(attention)
    return {"step_s": seconds, "attention_s": inside, "rest_s": seconds - inside, "peak_mb": peak}


def fit(x: list[float], y: list[float]) -> dict[str, float]:
    """Least squares of relative errors: a line, a parabola, and the slope of the last two points."""
    weights = [1 / value for value in y]
    line = np.polyval(np.polyfit(x, y, 1, w=weights), x)
    square, *_ = np.polyfit(x, y, 2, w=weights)
    found = {
        "off_line": max(abs(line - y) * weights),
        "quadratic_share": square * x[-1] ** 2 / y[-1],
        "exponent": math.log(y[-1] / y[-2]) / math.log(x[-1] / x[-2]),
    }
    return {name: round(float(value), 3) for name, value in found.items()}


def measure(dtype: str, series: dict = SERIES, base: dict = BASE, width: dict = WIDTH) -> dict:
    """{series: {"x", the measured columns, "fits" of what grows}}."""
    result = {"dtype": dtype, "base": base}
    for name, values in series.items():
        points = [measure_step(dtype, width, **base | {name: value}) for value in values]
        columns = {key: [round(point[key], 5) for point in points] for key in points[0]}
        fitted = ("attention_s", "rest_s", "peak_mb") if name == "length" else ("step_s", "peak_mb")
        fits = {key: fit(values, columns[key]) for key in fitted}
        result[name] = {"x": list(values), **columns, "fits": fits}
    return result | {"machine": machine.machine(), "versions": machine.versions()}


def draw(result: dict, path: Path) -> None:
    figure, panels = charts.new_figure(4)
    for axes, name in zip(panels, ("layers", "batch", "length"), strict=False):
        found = result[name]
        for key in ("step_s", "attention_s", "rest_s") if name == "length" else ("step_s",):
            axes.plot(found["x"], found[key], "o-", label=key.removesuffix("_s"))
        axes.set(xlabel=name, ylabel="seconds per step", ylim=(0, None), xlim=(0, None))
        axes.legend()
    panels[3].plot(result["length"]["x"], result["length"]["peak_mb"], "o-")
    panels[3].set(xlabel="length", ylabel="MB above the loaded model", ylim=(0, None), xlim=(0, None))
    figure.savefig(path, dpi=90)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth", description=__doc__.split("\n\n")[0])
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line, instead of a table")
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="write JSON and chart to FOLDER/<machine>/")
    options = parser.parse_args(argv)
    machine.require_kernels()
    result = measure(options.dtype)
    if options.save:
        folder = options.save / machine.folder_name()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "growth.json").write_text(json.dumps(result, indent=1) + "\n")
        draw(result, folder / "growth.png")
    if options.json:
        print(json.dumps(result))
        return
    for name in SERIES:
        for key, found in result[name]["fits"].items():
            values = ", ".join(f"{value:.4g}" for value in result[name][key])
            print(f"{name} {result[name]['x']}: {key} {values}; {found}")


if __name__ == "__main__":
    main()
