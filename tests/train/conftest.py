"""Small models with their tokenizers, made here: nothing is downloaded."""

import json
from pathlib import Path

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
WORDS = [
    "good",
    "bad",
    "fine",
    "poor",
    "great",
    "awful",
    "film",
    "food",
    "room",
    "staff",
    "the",
    "a",
    "was",
    "is",
    "not",
    "very",
    "and",
    "but",
    "so",
    "really",
]


def make_tokenizer(bert: bool = False) -> PreTrainedTokenizerFast:
    """A word-level tokenizer that also knows every character."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    special = ["<pad>", "<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    single = "<s> $A </s>" if bert else "<s> $A"
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 2), ("</s>", 3)])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, add_prefix_space=bert, **names)


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> dict[str, str]:
    """Folders of random models: llama (with a chat template), gpt2, bert, roberta."""
    torch.manual_seed(0)
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    ids = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    # no dropout: runs are compared with each other
    bert = {"max_position_embeddings": 66, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    gpt2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
    gpt2 |= {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
    made = {
        "llama": LlamaForCausalLM(
            LlamaConfig(vocab_size=400, num_key_value_heads=1, max_position_embeddings=64, **small, **ids)
        ),
        "gpt2": GPT2LMHeadModel(GPT2Config(vocab_size=400, **gpt2, **ids)),
        "bert": BertForSequenceClassification(BertConfig(vocab_size=400, **bert, **small, **ids)),
        "roberta": RobertaForSequenceClassification(RobertaConfig(vocab_size=400, **bert, **small, **ids)),
    }
    folders = {}
    for name, model in made.items():
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        tokenizer = make_tokenizer(bert="bert" in name)
        if name == "llama":
            tokenizer.chat_template = CHAT_TEMPLATE
        tokenizer.save_pretrained(folder)
        folders[name] = str(folder)
    return folders


def write_jsonl(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> dict[str, str]:
    """One small training file per kind of row."""
    folder = tmp_path_factory.mktemp("rows")
    things, good, bad = ("film", "food", "room", "staff"), ("good", "fine", "great"), ("bad", "poor", "awful")
    sentences = [
        (f"{article} {thing} was {adverb}{word}", label)
        for article in ("the", "a")
        for thing in things
        for adverb in ("", "really ")
        for words, label in ((good, "positive"), (bad, "negative"))
        for word in words
    ]
    sentences = sentences[::7] + [s for i, s in enumerate(sentences) if i % 7]  # mix the labels
    text = "text,label\n" + "".join(f"{t},{label}\n" for t, label in sentences)
    (folder / "labels.csv").write_text(text)
    (folder / "labels_test.csv").write_text(
        "text,label\nthe food was so great,positive\na room was so awful,negative\n"
    )
    pairs = [{"prompt": f"the {thing} is", "completion": f" {word}"} for thing in things for word in good + bad]
    chats = [
        {"messages": [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["completion"]}]}
        for r in pairs
    ]
    tags = [
        {"tokens": t.split(), "ner_tags": ["ADJ" if w in good + bad else "O" for w in t.split()]} for t, _ in sentences
    ]
    return {
        "labels": str(folder / "labels.csv"),
        "labels_test": str(folder / "labels_test.csv"),
        "pairs": write_jsonl(folder / "pairs.jsonl", pairs),
        "chats": write_jsonl(folder / "chats.jsonl", chats),
        "tags": write_jsonl(folder / "tags.jsonl", tags),
    }
