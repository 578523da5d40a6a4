"""`_cuda` as it was linked: what it asks of torch, and what its kernels take of a GPU. Read from the file: no GPU."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import pyfast
from benchmarks import cuda_resources

#: what torch/csrc/stable/ops.h calls
HEADERS = (
    "csrc/stable/c/shim.h",
    "csrc/inductor/aoti_torch/c/shim.h",
    "csrc/inductor/aoti_torch/generated/c_shim_aten.h",
)


@pytest.fixture(scope="module")
def library():
    found = next(Path(pyfast.__file__).parent.glob("_cuda.*so"), None)
    if found is None:
        pytest.skip("the CUDA kernels are not built here: no nvcc was found when PyFast was built")
    return found


def test_asks_torch_for_its_stable_abi_only(library):
    """So that one build serves every torch from 2.11: of torch, plain C functions of the stable headers; of CUDA and
    cuBLAS, which torch may not have, none."""
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("nm, which lists a library's symbols, is not installed")
    listed = subprocess.run([nm, "-D", "--undefined-only", library], capture_output=True, text=True, check=True).stdout
    names = {line.split()[1].split("@")[0] for line in listed.splitlines()}
    torchs = {name for name in names if re.search(r"torch|c10|2at\d", name)}
    include = Path(torch.__file__).parent / "include" / "torch"
    declared = set(re.findall(r"\b(?:aoti_)?torch_\w+", "".join((include / h).read_text() for h in HEADERS)))
    assert len(torchs) > 10 and torchs <= declared
    assert not {name for name in names if name.startswith("cu")}


def test_uses_no_macro_that_the_oldest_torch_lacks():
    """Under torch 2.13 it compiles, as another name of TORCH_ERROR_CODE_CHECK; 2.11 does not know it."""
    sources = [p for p in (Path(__file__).parents[2] / "csrc").rglob("*") if p.suffix in (".h", ".cpp")]
    assert len(sources) > 50
    assert not [p.name for p in sources if "STABLE_TORCH_ERROR_CODE_CHECK" in p.read_text()]


@pytest.mark.parametrize(
    "change, fault",
    [
        ({}, None),
        ({"local_instructions": 1}, "1 local loads and stores"),
        ({"async_copies": 0}, "no asynchronous copies"),
        ({"tensor_core": 0, "wgmma_groups": 0}, "no tensor-core instructions"),
        ({"wgmma_groups": 32}, "its wgmma are serialized"),
        ({"given": ""}, "setmaxnreg was ignored"),
        ({"taken": 248}, "setmaxnreg asks for more registers than the block has"),
        ({"registers": 160}, "setmaxnreg asks for more registers than the block has"),
    ],
)
def test_faults_are_named(change, fault):
    values = ("attention90_kernel<bf16, 128>", 168, 0, 0, 163912, 32, 16, 4, 24, 240)
    row = dict(zip(cuda_resources.FIELDS, values, strict=True)) | change
    assert cuda_resources.faults([row]) == ([] if fault is None else [f"{row['kernel']}: {fault}"])


@pytest.mark.slow
def test_no_kernel_spills(library):
    """No local memory, and the instructions that a kernel is written for, on each architecture."""
    try:
        tables = cuda_resources.tables(library)
    except SystemExit as error:
        pytest.skip(str(error))
    assert set(tables) == {"sm_80", "sm_90a"}
    assert {arch: cuda_resources.faults(rows) for arch, rows in tables.items()} == {arch: [] for arch in tables}
