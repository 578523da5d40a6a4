"""Writes the tables of README from the saved results of a machine, so that none is typed by hand.

    python -m benchmarks.readme [xeon-amx-4-cores]

A table stands between the lines `<!-- results: <name> -->` and `<!-- end of results -->`.
"""

import json
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
README = HERE.parent / "README.md"
MACHINE = "xeon-amx-4-cores"
PEERS = {
    "compile": "torch.compile",
    "bf16_adapters": "PEFT with bf16 adapters",
    "packed": "stock with packed rows",
}
#: a loss of less than this is noise of the machine; the op's own table marks it all the same
NOISE = 0.03
TABLE = re.compile(r"(?<=<!-- results: )(\w+)( -->\n).*?(?=<!-- end of results -->)", re.DOTALL)


def table(head: str, rows: list[list[str]]) -> str:
    columns = head.count("|") - 1
    lines = [head, "|---|" + "--:|" * (columns - 1), *("| " + " | ".join(row) + " |" for row in rows)]
    return "\n".join(lines) + "\n"


def steps(folder: Path) -> str:
    """A row for each configuration against stock, one more for each other peer."""
    rows = []
    for path in sorted(folder.glob("end_to_end_*.json")):
        found = json.loads(path.read_text())
        random = found["data"] == "random tokens"
        size = f"{found['batch']} × {found['seq']}" if random else f"{found['batch']} rows of"
        what = " (supervised tokens)" if found["counted"] != "tokens" else ""
        unit = f"{found['stock_tokens_per_s']:,.0f}", f"{found['pyfast_tokens_per_s']:,.0f}"
        result = f"{found['ratio']:.2f} ×", f"{found['memory_ratio']:.2f} ×"
        rows.append([f"{found['config']} {found['dtype']}, {size} {found['data']}{what}", *unit, *result])
        for variant, peer in PEERS.items():
            if f"ratio_{variant}" in found:
                result = f"{found[f'ratio_{variant}']:.2f} ×", f"{found[f'memory_ratio_{variant}']:.2f} ×"
                rows.append([f"— against {peer}", f"{found[f'{variant}_tokens_per_s']:,.0f}", "", *result])
    head = "| step | tokens/s, Hugging Face + PEFT | tokens/s, PyFast | ratio | memory above the loaded model |"
    return table(head, rows)


def gpu_steps(folder: Path) -> str:
    """For each GPU that was measured, a row for each variant of each model and form."""
    gpus: dict[str, list] = {}
    for path in sorted(folder.parent.glob("*/end_to_end_*.json")):
        found = json.loads(path.read_text())
        if "gpu" in found:
            rows = gpus.setdefault(f"{found['gpu']}, commit {found.get('commit', 'unknown')}", [])
            rows += [row for row in found["rows"] if "tokens_per_s" in row]
    if not gpus:
        return "No step has been measured on a GPU yet.\n"
    head = "| step | variant | tokens/s | over stock | memory above the weights, of stock's |"
    tables = []
    for gpu, rows in gpus.items():
        cells = [
            [f"{row['model']}, {row['form']}", row["variant"], f"{row['tokens_per_s']:,.0f}"]
            + [f"{row[name]:.2f} ×" if row.get(name) else "" for name in ("over_stock", "memory_of_stock")]
            for row in rows
        ]
        tables.append(f"{gpu}:\n\n{table(head, cells)}")
    return "\n".join(tables)


def losses(folder: Path) -> str:
    """The rows of the ops' tables in which PyFast takes longer than a peer, and by how much."""
    rows = []
    for path in sorted(folder.glob("*.json")):
        for row in json.loads(path.read_text()).get("rows", []):
            if row["loses"] and row["pyfast_speedup"] < 1 - NOISE:
                rows.append([row["op"], row["case"], row["variant"], f"{row['pyfast_speedup']:.2f} ×"])
    return table("| op | case | peer | the peer's time over PyFast's |", rows)


TABLES = {"steps": steps, "gpu_steps": gpu_steps, "losses": losses}


def written(text: str, machine: str) -> str:
    """The text with its tables made anew."""
    return TABLE.sub(lambda found: "".join(found.groups()) + TABLES[found[1]](HERE / "results" / machine), text)


if __name__ == "__main__":
    README.write_text(written(README.read_text(), *(sys.argv[1:] or [MACHINE])))
