"""The package as users get it: the wheel and the sdist hold all they need, and the wheel works outside the checkout."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

TRAIN_A_STEP = """
import pathlib, sys
import torch, transformers, peft, pyfast
assert pathlib.Path(pyfast.__file__).is_relative_to(sys.prefix), pyfast.__file__
config = transformers.LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                                  num_key_value_heads=2, vocab_size=128)
model = peft.get_peft_model(transformers.LlamaForCausalLM(config), peft.LoraConfig(task_type="CAUSAL_LM"))
report = pyfast.patch(model, strict=True)
assert {row.backend for row in report.swapped} == {"cpu"}, report
optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
tokens = torch.randint(0, 128, (2, 16))
losses = []
for _ in range(5):
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
assert losses[-1] < losses[0], losses
print("trained")
"""


def tracked(folder: str) -> set[str]:
    listed = subprocess.run(["git", "ls-files", folder], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return set(listed.split())


def run(*command, **kwargs):
    done = subprocess.run(command, capture_output=True, text=True, **kwargs)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of what git tracks, so that no file of the checkout is changed; the objects already built come along."""
    folder = tmp_path_factory.mktemp("source")
    for name in sorted(tracked(".")):
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target, follow_symlinks=False)
    return folder


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built in the checkout, whose objects `make build` has already compiled."""
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", folder, ROOT)
    return next(folder.glob("*.whl"))


def test_wheel_holds_every_module(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {n for n in tracked("pyfast") if n.endswith(".py")} <= names
    at_root = {n for n in tracked("kernels") | tracked("benchmarks") if n.endswith(".py")}
    assert {f"pyfast/{n}" for n in at_root} <= names
    assert sum("_cpu" in n for n in names) == sum("_info" in n for n in names) == 1


def test_sdist_holds_every_source(source, tmp_path):
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "-o", tmp_path, source)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        names = {n.split("/", 1)[1] for n in archive.getnames() if "/" in n}
    wanted = tracked("csrc") | tracked("kernels") | {n for n in tracked("pyfast") if n.endswith(".py")}
    assert wanted <= names, wanted - names
    assert {"setup.py", "pyproject.toml", "constraints.txt", "LICENSE", "README.md"} <= names


def test_wheel_trains_outside_the_checkout_without_a_compiler(wheel, tmp_path):
    """An environment with the wheel alone; its dependencies are those of the running interpreter."""
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", site, wheel)
    # added as a plain path, so that an editable install of this checkout beside the dependencies stays out
    (site / "dependencies.pth").write_text("\n".join({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}))
    environment = {"PATH": str(python.parent), "HOME": os.environ.get("HOME", "/"), "HF_HUB_OFFLINE": "1"}
    assert run(python, "-c", TRAIN_A_STEP, cwd=tmp_path, env=environment).strip().endswith("trained")


@pytest.mark.parametrize("missing", ["torch", "compiler"])
def test_what_setup_says(source, tmp_path, missing):
    """Without torch one line says what to do; without a compiler a pure Python package is built."""
    environment = os.environ | {"PATH": str(tmp_path), "CXX": "no-such-compiler"}
    command = [sys.executable, "setup.py", "build", "--build-base", tmp_path / "build"]
    if missing == "torch":
        (tmp_path / "torch.py").write_text("raise ImportError('no torch')")
        environment["PYTHONPATH"] = str(tmp_path)
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, env=environment)
    if missing == "torch":
        assert done.returncode == 1
        assert done.stderr.strip().splitlines()[-1].startswith("pyfast: install torch first")
    else:
        assert done.returncode == 0, done.stderr
        assert "PyTorch will serve every op" in done.stdout
        built = [p.name for p in (tmp_path / "build").rglob("*") if p.is_file()]
        assert "dispatch.py" in built
        assert not [n for n in built if n.endswith(".so")]
