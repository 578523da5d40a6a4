"""Times PyFast's kernels beside their peers on this machine, and prints a table.

    python -m benchmarks [op ...] [--skip compile] [--save benchmarks/results]        or: pyfast bench [op ...]

An op is the name of a file bench_<op>.py. Results carry machine, versions and commit. Saved ops replace their own
results only, with --only their own cases, if the others are of the same commit; the charts are drawn from all that are
there.
"""

import argparse
import importlib
import json
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from . import charts, harness, machine, roofline

HERE = Path(__file__).parent
NAMES = sorted(path.stem.removeprefix("bench_") for path in HERE.glob("bench_*.py"))
COLUMNS = (
    "op",
    "case",
    "variant",
    "ms",
    "min_ms",
    "max_ms",
    "peak_mb",
    "tflops",
    "of_gemm",
    "gb_per_s",
    "of_copy",
    "pyfast_speedup",
)
LEGEND = (
    "`pyfast_speedup` is the variant's time over PyFast's: above 1, PyFast wins; rows in which it loses are marked ◀."
    " Rows in italics are floors: clone() of the same bytes on huge pages, or the bare matrix products, so that their"
    " speed-up is the share of that rate which PyFast reaches. `pyfast, by torch`: a call so small that PyFast has"
    " PyTorch serve it, so that its checks are all that differs. ms is the median; `peak_mb` what a call holds at most"
    " beyond its inputs; `of_gemm` and `of_copy` are shares of the limits above."
)


def bench(name: str):
    """The module of an op's benchmark."""
    return importlib.import_module(f".bench_{name}", __package__)


def run(names: list[str], skip: list[str], only: str = "") -> Iterator[tuple[str, dict]]:
    """Measures the limits of the machine, then every named benchmark's cases; each name with its result as it comes."""
    count = {name: sum(only in case.label for case in bench(name).cases()) for name in names}
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("limits of this machine", total=sum(count.values()), completed=0)
        limits = roofline.measure()
        head = {"roofline": limits, "machine": machine.machine(), "versions": machine.versions()}
        for name in names:
            chosen = (case.without(skip) for case in bench(name).cases() if only in case.label)
            rows = []
            for case in chosen:
                progress.update(task, description=f"{case.op} {case.label}")
                rows += harness.measure([case], limits)
                progress.advance(task)
            yield name, head | {"rows": rows}


def cells(row: dict) -> list[str]:
    found = ["" if row.get(column) is None else str(row[column]) for column in COLUMNS]
    if row.get("backend") == "torch":
        found[COLUMNS.index("variant")] += ", by torch"
    if row["loses"]:
        found[-1] += " ◀"
    return found


def markdown(name: str, result: dict) -> str:
    def line(words):
        return "| " + " | ".join(words) + " |"

    def facts(found: dict) -> str:
        return ", ".join(f"{key} {value}" for key, value in found.items())

    rows = [[f"*{cell}*" if cell and row["floor"] else cell for cell in cells(row)] for row in result["rows"]]
    head = [f"# {name}", ""]
    head += [f"{facts(result['machine'])}; {facts(result['versions'])}. Limits in the same run: ", ""]
    head[-2] += f"{facts(result['roofline'])}. {LEGEND}"
    table = [line(COLUMNS), line(["---"] * 3 + ["--:"] * (len(COLUMNS) - 3)), *map(line, rows)]
    return "\n".join(head + table) + "\n"


def show(rows: list[dict]) -> None:
    table = Table(*COLUMNS, box=None)
    for row in rows:
        table.add_row(*cells(row), style="red" if row["loses"] else "dim" if row["floor"] else None)
    console = Console()
    console.width = max(console.width, 190)
    console.print(table)


def save(name: str, result: dict, folder: Path) -> None:
    """<name>.json and <name>.md, and the charts of all that the folder holds.

    Cases that an earlier run of the same commit saved, and this one did not measure, stay.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    before = json.loads(path.read_text()) if path.exists() else {"versions": None}
    if before["versions"] == result["versions"]:
        order = {(case.op, case.label): i for i, case in enumerate(bench(name).cases())}
        measured = {(row["op"], row["case"]) for row in result["rows"]}
        kept = [row for row in before["rows"] if (row["op"], row["case"]) not in measured]
        result = result | {"rows": sorted(result["rows"] + kept, key=lambda row: order[row["op"], row["case"]])}
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    (folder / f"{name}.md").write_text(markdown(name, result))
    charts.draw(folder, [path for name in NAMES if (path := folder / f"{name}.json").exists()])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="pyfast bench", description=__doc__.split("\n\n")[0])
    parser.add_argument("names", nargs="*", metavar="op", help=f"of {', '.join(NAMES)}; all without any")
    parser.add_argument("--skip", nargs="+", default=[], metavar="VARIANT", help="peers to leave out, such as compile")
    parser.add_argument("--only", default="", metavar="TEXT", help="only cases with this in their label, such as bf16")
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="write tables and charts to FOLDER/<machine>/")
    options = parser.parse_args(argv)
    for name in options.names:
        if name not in NAMES:
            parser.error(f"there is no benchmark {name!r}: choose from {', '.join(NAMES)}")
    for name in options.names or NAMES:
        try:
            bench(name)
        except ModuleNotFoundError as error:
            parser.error(f"{name} needs {error.name}: pip install 'pyfast-kernels[bench]'")
    machine.require_kernels()
    rows = []
    for name, result in run(options.names or NAMES, options.skip, options.only):
        rows += result["rows"]
        if options.save:  # at once: a later op that fails takes nothing with it
            save(name, result, options.save / machine.folder_name())
    if not rows:
        parser.error(f"--only {options.only}: no case has this in its label")
    show(rows)
    print(json.dumps(result["roofline"]))
    if options.save:
        print(f"saved in {options.save / machine.folder_name()}")


if __name__ == "__main__":
    main()
