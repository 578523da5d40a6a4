"""Plants errors in copies of the project and asks whether the tests catch them: what tests/cuda/mutate.py and
tests/triton_kernels/mutate.py, which list the errors, have in common."""

import argparse
import contextlib
import multiprocessing
import os
import shutil
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]


@contextlib.contextmanager
def planted(mutation, file: str):
    """The folder of a copy of the project, without the CUDA builds, in whose `file` mutation.new stands wherever
    mutation.old did."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        ignored = shutil.ignore_patterns("_emu.*", "_cuda.*")
        for part in ("pyfast", "tests", "kernels", "csrc"):
            shutil.copytree(ROOT / part, copy / part, ignore=ignored, symlinks=True)
        shutil.copy(ROOT / "pyproject.toml", copy)
        source = (copy / file).read_text()
        if mutation.old not in source:
            raise ValueError(f"{mutation.name}: {file} has no {mutation.old!r} any more")
        (copy / file).write_text(source.replace(mutation.old, mutation.new))
        yield copy


#: forks processes that have what takes longest to import
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["torch", "hypothesis", "pytest", "pytest_timeout"])


def fails(copy: Path, mutation, file: str) -> bool:
    """Whether a test in `file` -k mutation.tests fails in the copy, or crashes. Triton kernels are interpreted."""
    arguments = ["-q", "-x", "-p", "no:cacheprovider", "-p", "pytest_timeout", "-k", mutation.tests, file]
    process = _processes.Process(target=_run_pytest, args=(copy, arguments))
    process.start()
    process.join()
    if process.exitcode > 1:
        raise RuntimeError(
            f"{mutation.name}: pytest ended with {process.exitcode}\n{(copy / 'log').read_text()[-2000:]}"
        )
    return process.exitcode != 0  # negative where a signal ended it


def _run_pytest(copy: Path, arguments: list[str]) -> None:
    os.chdir(copy)
    log = os.open("log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1), os.dup2(log, 2)
    # pytest's other plugins take a third of the time until the first test
    os.environ.update(TRITON_INTERPRET="1", PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    sys.path[:] = [path for path in sys.path if not path.startswith(str(ROOT))]
    import pytest

    os._exit(pytest.main(arguments, plugins=[_LikelyFirst()]))


class _LikelyFirst:
    """The emulator's schedule that shows most errors comes before the others."""

    def pytest_collection_modifyitems(self, items):
        items.sort(key=lambda item: "random-lazy" not in item.name)


def main(description: str, mutations, caught) -> int:
    """The command line: 1 if caught(mutation) is false for one of them. A mutation has a name and a file."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="of the mutations; all by default")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    chosen = [m for m in mutations if not options.names or m.name in options.names]
    survivors = []
    with ThreadPoolExecutor(options.jobs) as pool:
        for mutation, was_caught in zip(chosen, pool.map(caught, chosen), strict=True):
            print(f"{'caught  ' if was_caught else 'SURVIVED'}  {mutation.file}: {mutation.name}", flush=True)
            if not was_caught:
                survivors.append(mutation.name)
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} planted errors caught")
    return 1 if survivors else 0
