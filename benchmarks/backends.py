"""Which backend serves each op on an architecture, from what was measured there: `pyfast tune` ends with this.

    python -m benchmarks.backends benchmarks/results/nvidia-h100-80gb-hbm3 [--folder kernels]

RESULTS holds the JSON files of `python -m benchmarks.gpu`. FOLDER/backends_<architecture>.json is what dispatch reads:
for each op the backends that are no slower than PyTorch, fastest first, and "torch". A backend that was wrong or did
not run in one of the cases is left out, and so are cases that PyTorch did not run; ops without any keep their row.
"""

import argparse
import json
import sys
from pathlib import Path

from . import cuda, gpu

FOLDER = Path(__file__).resolve().parents[1] / "kernels"


def order(rows: list[dict]) -> list[str]:
    """Of the rows of an op: its backends no slower than PyTorch's, by their time for all cases together; none where
    PyTorch has run no case."""
    refused = {row["variant"] for row in rows if "not_run" in row} - {"torch"}
    cases = [gpu.as_called(rows, case) for case in dict.fromkeys(row["case"] for row in rows)]
    cases = [ms for ms in cases if "torch" in ms]
    everywhere = [name for name in cuda.OURS if name not in refused and all(name in ms for ms in cases)]
    total = {name: sum(ms[name] for ms in cases) for name in everywhere if cases}
    return sorted((name for name in total if total[name] <= total["torch"]), key=total.get)


def write(results: Path, folder: Path) -> Path:
    """Writes the table of the architecture that `results` are of; raises ValueError where they are of none or of
    several."""
    found = [json.loads(path.read_text()) for path in sorted(results.glob("*.json"))]
    found = [one for one in found if one.get("architecture") and one.get("rows")]
    architectures = {one["architecture"] for one in found}
    if len(architectures) != 1:
        held = f"those of {' and '.join(sorted(architectures))}" if found else "none"
        raise ValueError(
            f"{results} must hold the results of one GPU's ops (python -m benchmarks.gpu), it holds {held}"
        )
    architecture = architectures.pop()
    path = folder / f"backends_{architecture}.json"
    backends = json.loads(path.read_text())["backends"] if path.exists() else {}
    backends |= {one["rows"][0]["op"]: names for one in found if (names := order(one["rows"]))}
    machine = {key: value for key, value in found[0].items() if isinstance(value, str)}
    lines = [f'  "{op}": {json.dumps(backends[op])}' for op in sorted(backends)]
    lines = [f' "machine": {json.dumps(machine)},', ' "backends": {', ",\n".join(lines), " }"]
    path.write_text("\n".join(["{", *lines, "}"]) + "\n")
    return path


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.backends", description=__doc__.split("\n\n")[0])
    parser.add_argument("results", type=Path, help="a folder of results")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the table goes (%(default)s)")
    options = parser.parse_args(argv)
    try:
        path = write(options.results, options.folder)
    except ValueError as error:
        print(f"benchmarks.backends: {error}", file=sys.stderr)
        return 2
    print(path.read_text(), end="")
    print(f"written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
