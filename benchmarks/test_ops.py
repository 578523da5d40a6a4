"""The ops under pytest-benchmark, with its options and history: pytest benchmarks/test_ops.py -k "attention and bf16"

Each case is checked before it is timed. The tables with peers side by side are `python -m benchmarks`'s.
"""

import pytest

from benchmarks.__main__ import NAMES, bench

CASES = {f"{case.op}-{case.label}": case for name in NAMES for case in bench(name).cases()}


@pytest.mark.parametrize(
    ("case", "variant"), [(name, variant) for name, case in CASES.items() for variant in case.timed]
)
def test_op(benchmark, case, variant):
    benchmark.group = case
    inputs = CASES[case].inputs()
    CASES[case].check(inputs)
    benchmark(CASES[case].run, variant, inputs)
