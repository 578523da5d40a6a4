"""The planted errors of mutate.py, which is run by hand: each can still be planted."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("mutate", Path(__file__).with_name("mutate.py"))
mutate = importlib.util.module_from_spec(spec)
spec.loader.exec_module(mutate)


@pytest.mark.parametrize("mutation", mutate.MUTATIONS, ids=lambda m: m.name)
def test_has_its_place(mutation):
    folder = ROOT / "csrc" / "cuda"
    assert mutation.old in (folder / mutation.file).read_text() and mutation.old != mutation.new
    assert (folder / f"{mutation.kernel}.cu").exists()


def test_names_are_unique():
    names = [mutation.name for mutation in mutate.MUTATIONS]
    assert len(names) == len(set(names)) >= 40
