"""Times PyFast's kernels beside their peers on this machine, and prints a table.

    python -m benchmarks [op ...] [--save benchmarks/results]        or: pyfast bench [op ...]

An op is the name of a file bench_<op>.py. Results carry machine, versions and commit.
"""

import argparse
import importlib
import json
import re
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn
from rich.table import Table

from . import harness, machine, roofline

HERE = Path(__file__).parent
NAMES = sorted(path.stem.removeprefix("bench_") for path in HERE.glob("bench_*.py"))
COLUMNS = (
    "op",
    "case",
    "variant",
    "ms",
    "min_ms",
    "max_ms",
    "pyfast_speedup",
    "tflops",
    "of_gemm",
    "gb_per_s",
    "of_copy",
)


def bench(name: str):
    return importlib.import_module(f".bench_{name}", __package__)


def machine_folder() -> str:
    """A folder name for this machine's results."""
    found = machine.machine()
    name = re.sub(r"[^a-z0-9]+", "-", f"{found['cpu']} {found['cores']} cores {found['isa']}".lower()).strip("-")
    return name


def run(names: list[str]) -> dict:
    """Measures the limits of the machine, then every case of every named benchmark."""
    with Progress(SpinnerColumn(), TextColumn("{task.description}"), transient=True) as progress:
        task = progress.add_task("limits of this machine")
        limits = roofline.measure()
        rows = []
        for name in names:
            cases = bench(name).cases()
            rows += harness.measure(cases, limits, lambda text: progress.update(task, description=text))
    return {"rows": rows, "roofline": limits, "machine": machine.machine(), "versions": machine.versions()}


def cells(row: dict) -> list[str]:
    return ["" if row.get(column) is None else str(row[column]) for column in COLUMNS]


def markdown(result: dict) -> str:
    def line(words):
        return "| " + " | ".join(words) + " |"

    head = [f"Limits measured in the same run: {result['roofline']}. Machine: {result['machine']}.", ""]
    head += [
        f"Versions: {result['versions']}. `pyfast_speedup` is the variant's time over PyFast's: above 1, PyFast wins.",
        "",
    ]
    table = [line(COLUMNS), line(["---"] * len(COLUMNS)), *(line(cells(row)) for row in result["rows"])]
    return "\n".join(head + table) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="pyfast bench", description=__doc__.split("\n\n")[0])
    parser.add_argument("names", nargs="*", metavar="op", help=f"of {', '.join(NAMES)}; all without any")
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="write JSON and Markdown to FOLDER/<machine>/")
    options = parser.parse_args(argv)
    for name in options.names:
        if name not in NAMES:
            parser.error(f"there is no benchmark {name!r}: choose from {', '.join(NAMES)}")
    names = options.names or NAMES
    result = run(names)
    table = Table(*COLUMNS, box=None)
    for row in result["rows"]:
        table.add_row(*cells(row))
    console = Console()
    console.width = max(console.width, 170)
    console.print(table)
    print(json.dumps(result["roofline"]))
    if options.save:
        folder = options.save / machine_folder()
        folder.mkdir(parents=True, exist_ok=True)
        for name in names:
            module_ops = {case.op for case in bench(name).cases()}
            part = result | {"rows": [row for row in result["rows"] if row["op"] in module_ops]}
            (folder / f"{name}.json").write_text(json.dumps(part, indent=1) + "\n")
            (folder / f"{name}.md").write_text(f"# {name}\n\n{markdown(part)}")
        print(f"saved in {folder}")


if __name__ == "__main__":
    main()
