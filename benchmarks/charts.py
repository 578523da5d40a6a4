"""Charts of saved results: the roofline, and time and memory along sequence length and vocabulary.

The roofline follows Williams, Waterman and Patterson 2009: what a kernel reaches against its FLOPs per byte.
"""

import importlib.util
import json
from pathlib import Path

LIMITS = {"bfloat16": "gemm_bf16_tflops", "float32": "gemm_fp32_tflops"}


def draw(folder: Path, results: list[Path]) -> list[str]:
    """Writes the PNGs to the folder from the JSON files of ops; their names. Says so where matplotlib is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        print('no charts: matplotlib is missing (pip install "pyfast-kernels[bench]")')
        return []
    loaded = [json.loads(path.read_text()) for path in results]
    rows = [row for result in loaded for row in result["rows"]]
    drawn = []
    if any(row["flops"] and row["bytes"] for row in rows):
        drawn.append(roofline(folder / "roofline.png", loaded))
    for op, axis in sorted({(row["op"], row["axis"]) for row in rows if "axis" in row}):
        along = [row for row in rows if row["op"] == op and row.get("axis") == axis]
        drawn.append(sweep(folder / f"{op}_{axis.replace(' ', '_')}.png", op, axis, along))
    return drawn


def new_figure(columns: int):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * columns, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, columns)
    for one in axes.flat:
        one.grid(alpha=0.3)
    return figure, axes


def roofline(path: Path, results: list[dict]) -> str:
    """A panel per dtype: PyFast and the first peer of each case with FLOPs, under the roof of copy and GEMM rates."""
    figure, panels = new_figure(2)
    for axes, (dtype, gemm) in zip(panels, LIMITS.items(), strict=True):
        copy, peak = (max(result["roofline"][key] for result in results) for key in ("copy_gb_per_s", gemm))
        intensity = [2**i for i in range(2, 13)]
        axes.loglog(intensity, [min(peak, x * copy / 1e3) for x in intensity], "k", label="copy and GEMM limits")
        rows = [row for result in results for row in result["rows"] if row["dtype"] == dtype and row["flops"]]
        for i, op in enumerate(sorted({row["op"] for row in rows})):
            color, cases = f"C{i}", {}
            for row in rows:
                if row["op"] == op and not row["floor"]:
                    cases.setdefault(row["case"], []).append(row)
            for case in cases.values():
                x = case[0]["flops"] / case[0]["bytes"]
                ours, peer = case[0]["tflops"], case[1]["tflops"]
                axes.loglog([x, x], [peer, ours], color, lw=0.8)
                axes.loglog(x, peer, "o", mec=color, mfc="white", ms=5)
                axes.loglog(x, ours, "o", color=color, ms=6)
            axes.loglog([], [], "o", color=color, label=op)
        axes.loglog([], [], "o", mec="k", mfc="white", label="its first peer")
        axes.set(title=dtype, xlabel="FLOP per byte", ylabel="TFLOP/s")
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    return path.name


def sweep(path: Path, op: str, axis: str, rows: list[dict]) -> str:
    """Time and peak memory of each variant along one axis."""
    figure, (time, memory) = new_figure(2)
    for variant in dict.fromkeys(row["variant"] for row in rows):
        own = sorted((row for row in rows if row["variant"] == variant), key=lambda row: row["x"])
        x = [row["x"] for row in own]
        style = (
            {"ls": ":", "color": "k"} if own[0]["floor"] else {"marker": "o", "lw": 2.5 if variant == "pyfast" else 1}
        )
        low, high = ([row["ms"] - row["min_ms"] for row in own], [row["max_ms"] - row["ms"] for row in own])
        time.errorbar(x, [row["ms"] for row in own], (low, high), label=variant, capsize=2, **style)
        if not own[0]["floor"]:
            memory.plot(x, [row["peak_mb"] for row in own], label=variant, **style)
    for axes, label in ((time, "ms"), (memory, "peak MB beyond the inputs")):
        axes.set(xscale="log", yscale="log", xlabel=axis, ylabel=label)
        axes.set_xticks(sorted({row["x"] for row in rows}), sorted({row["x"] for row in rows}))
        axes.minorticks_off()
    time.set_title(f"{op}, {rows[0]['dtype']}, forward + backward")
    time.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    return path.name
