"""Files into rows, rows into tokens: which tokens are supervised, what is cut, dropped and refused."""

import json
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from pyfast.train import data
from pyfast.train.config import DataArguments, InputError
from pyfast.train.tasks import IGNORED, TASKS, detect_task


def make_task(name, tokenizer, rows, max_length=64, **columns):
    names = ("text_column", "label_column", "prompt_column", "completion_column")
    args = SimpleNamespace(**{**dict.fromkeys(names), "packing": False, **columns})
    return TASKS[name].from_rows(args, tokenizer, max_length, Dataset.from_list(rows))


@pytest.fixture(scope="module")
def llama(models):
    return AutoTokenizer.from_pretrained(models["llama"])


@pytest.fixture(scope="module")
def bert(models):
    return AutoTokenizer.from_pretrained(models["bert"])


def supervised(tokenizer, features):
    """The text of the supervised tokens, which must be their own labels."""
    kept = [(i, label) for i, label in zip(features["input_ids"], features["labels"], strict=True) if label != IGNORED]
    assert all(i == label for i, label in kept)
    return tokenizer.decode([i for i, _ in kept])


def test_only_the_completion_is_supervised_and_it_ends(llama):
    row = {"prompt": "the film was", "completion": " very good"}
    features, truncated = make_task("text-generation", llama, [row]).encode(row)
    assert supervised(llama, features) == " very good</s>"
    assert llama.decode(features["input_ids"]) == "<s>the film was very good</s>"
    assert not truncated


def test_a_tokenizer_that_closes_every_text_does_not_close_the_prompt(bert):
    row = {"question": "the film was", "answer": " good"}
    features, _ = make_task("text-generation", bert, [row]).encode(row)
    assert features["input_ids"].count(bert.eos_token_id) == 1
    assert features["input_ids"][-1] == features["labels"][-1] == bert.eos_token_id


def test_every_assistant_turn_is_supervised_and_no_other(llama):
    turns = [("user", "the film"), ("assistant", "good"), ("user", "the food"), ("assistant", "very bad")]
    row = {"messages": [{"role": role, "content": text} for role, text in turns]}
    features, _ = make_task("text-generation", llama, [row]).encode(row)
    assert supervised(llama, features) == "good</s>very bad</s>"
    whole = llama.apply_chat_template(row["messages"], tokenize=False)
    assert llama.decode(features["input_ids"]) == whole


def test_conversational_prompt_and_completion(llama):
    row = {
        "prompt": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "bad"},
            {"role": "user", "content": "b"},
        ],
        "completion": [{"role": "assistant", "content": "good"}],
    }
    features, _ = make_task("text-generation", llama, [row]).encode(row)
    assert supervised(llama, features) == "good</s>"


def test_a_template_that_rewrites_earlier_turns_supervises_the_last_one(models):
    tokenizer = AutoTokenizer.from_pretrained(models["llama"])
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>"
        "{% if m.role == 'assistant' and not loop.last %}so{% else %}{{ m.content }}{% endif %}</s>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    turns = [("user", "the film"), ("assistant", "good"), ("user", "the food"), ("assistant", "bad")]
    row = {"messages": [{"role": role, "content": text} for role, text in turns]}
    features, _ = make_task("text-generation", tokenizer, [row]).encode(row)
    assert supervised(tokenizer, features) == "bad</s>"


def test_plain_text_is_supervised_whole(llama):
    row = {"text": "the film was good"}
    features, _ = make_task("text-generation", llama, [row]).encode(row)
    assert features["labels"] == features["input_ids"]


def test_token_labels_sit_on_the_first_token_of_each_word(bert):
    row = {"tokens": ["the", "cinematography", "was", "good"], "ner_tags": ["O", "NOUN", "O", "ADJ"]}
    task = make_task("token-classification", bert, [row])
    features, truncated = task.encode(row)
    assert [task.labels[label] for label in features["labels"] if label != IGNORED] == row["ner_tags"]
    assert len(features["labels"]) == len(features["input_ids"]) > 6
    assert not truncated


def test_rows_are_cut_dropped_and_counted(llama):
    rows = [
        {"prompt": "a", "completion": " good"},
        {"prompt": "a", "completion": " good" * 30},
        {"prompt": "the film was " * 10, "completion": " good"},
    ]
    encoded = data.encode(Dataset.from_list(rows), make_task("text-generation", llama, rows, max_length=12), "train")
    assert (len(encoded.rows), encoded.truncated, encoded.dropped) == (2, 2, 1)
    assert max(map(len, encoded.rows["input_ids"])) == 12
    assert str(encoded) == "2 rows, 2 truncated, 1 dropped (no supervised token left)"


def test_no_row_left_is_an_error(llama):
    rows = [{"prompt": "the film was " * 10, "completion": " good"}]
    with pytest.raises(InputError, match="supervised token"):
        data.encode(Dataset.from_list(rows), make_task("text-generation", llama, rows, max_length=8), "train")


def test_a_label_never_seen_in_training_names_the_row(bert):
    task = make_task("text-classification", bert, [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}])
    with pytest.raises(InputError, match=r"validation row 2: the label 'z' was never seen in training.*x, y"):
        data.encode(Dataset.from_list([{"text": "a", "label": "x"}, {"text": "b", "label": "z"}]), task, "validation")


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ([1, 0, 10, 2], ["0", "1", "2", "10"]),
        (["b", "a"], ["a", "b"]),
        ([1.0, 0.0], ["0", "1"]),
        ([True, False], ["False", "True"]),
    ],
)
def test_label_names(bert, values, names):
    rows = [{"text": "a", "label": value} for value in values]
    task = make_task("text-classification", bert, rows)
    assert task.labels == names
    assert [task.encode(row)[0]["labels"] for row in rows] == [
        names.index(str(int(v)) if v in (1.0, 0.0) and not isinstance(v, bool) else str(v)) for v in values
    ]


def test_every_file_type_gives_the_same_rows(tmp_path):
    rows = [{"text": 'so "good", NA', "label": "1"}, {"text": "None", "label": "0"}]
    (tmp_path / "a.csv").write_text('text,label\n"so ""good"", NA",1\nNone,0\n')
    (tmp_path / "a.tsv").write_text('text\tlabel\nso "good", NA\t1\nNone\t0\n')
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    for name in ("a.csv", "a.tsv", "a.jsonl", "a.parquet"):
        read = data.read_file(str(tmp_path / name))
        assert [{k: str(v) for k, v in row.items()} for row in read] == rows, name


def test_a_split_column_divides_one_file(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text("text,label,split\na,x,train\nb,y,test\nc,x,train\nd,y,dev\n")
    splits = data.load_splits(DataArguments(train_file=str(file)))
    assert {name: rows["text"][:] for name, rows in splits.items()} == {
        "train": ["a", "c"],
        "validation": ["d"],
        "test": ["b"],
    }
    assert splits.hashes["train"].startswith("sha256:")


@pytest.mark.parametrize(
    ("columns", "task"),
    [
        (["text", "label"], "text-classification"),
        (["sentence", "label"], "text-classification"),
        (["prompt", "completion"], "text-generation"),
        (["question", "answer"], "text-generation"),
        (["messages"], "text-generation"),
        (["text"], "text-generation"),
        (["tokens", "ner_tags"], "token-classification"),
    ],
)
def test_the_task_is_read_from_the_columns(columns, task):
    assert detect_task(DataArguments(), columns) == task


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("text-generation", [{"prompt": "a", "completion": ["b"]}], "holds a list where text is expected"),
        ("text-generation", [{"prompt": [{"role": "user", "content": "a"}], "completion": "b"}], "both text or both"),
        ("text-generation", [{"messages": [{"role": "user", "content": None}]}], "a conversation is"),
        ("token-classification", [{"tokens": ["a", None], "tags": ["X", "O"]}], "a list of words"),
        ("token-classification", [{"tokens": [["a"], ["b"]], "tags": ["X", "O"]}], "a list of words"),
    ],
)
def test_cells_of_another_kind_name_the_row(llama, name, rows, message):
    task = make_task(name, llama, rows)
    with pytest.raises(InputError, match=f"train row 1: .*{message}"):
        data.encode(Dataset.from_list(rows), task, "train")


def test_only_causal_models_learn_to_generate(models):
    from transformers import BertConfig, BertLMHeadModel

    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    encoder = BertConfig(vocab_size=100, initializer_range=0.5, **shape)
    with pytest.raises(InputError, match="BertLMHeadModel sees the tokens behind"):
        data.check_causal(BertLMHeadModel(encoder))
    data.check_causal(BertLMHeadModel(BertConfig(vocab_size=100, initializer_range=0.5, is_decoder=True, **shape)))
    for name in ("llama", "gpt2"):
        data.check_causal(AutoModelForCausalLM.from_pretrained(models[name]))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_packed_rows_do_not_see_each_other(models, name):
    """The loss of packed rows is the loss of the same rows padded, in the stock model too."""
    tokenizer = AutoTokenizer.from_pretrained(models[name])
    model = AutoModelForCausalLM.from_pretrained(models[name]).eval()
    rows = [{"prompt": "the film was", "completion": " good"}, {"prompt": "a", "completion": " very very bad room"}]
    task = make_task("text-generation", tokenizer, rows)
    features = [task.encode(row)[0] for row in rows]
    padded = task.collator()(features)
    task.packing = True
    packed = task.collator()(features)
    assert packed["input_ids"].shape == (1, sum(len(f["input_ids"]) for f in features))
    with torch.no_grad():
        expected, found = (model(**batch, use_cache=False).loss for batch in (padded, packed))
        broken = model(input_ids=packed["input_ids"], labels=packed["labels"], use_cache=False).loss
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert abs(broken - expected) > 1e-4  # the same rows as one text: the comparison would notice
    data.check_packing(model, task.collator())


def test_a_model_whose_packed_rows_see_each_other_is_refused():
    from transformers import BloomConfig, BloomForCausalLM, DataCollatorWithFlattening, MambaConfig, MambaForCausalLM

    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    bloom = BloomForCausalLM(BloomConfig(vocab_size=100, hidden_size=32, n_layer=2, n_head=2))
    mamba = MambaForCausalLM(MambaConfig(vocab_size=100, hidden_size=32, num_hidden_layers=2, state_size=4))
    for model in (bloom, mamba):
        with pytest.raises(InputError, match="see each other"):
            data.check_packing(model, collate)
