"""The three tasks: which columns they read, how a row becomes tokens and labels, which head and metrics they take."""

from dataclasses import dataclass
from typing import ClassVar

import transformers
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from .config import DataArguments, InputError
from .metrics import ClassificationMetrics, LanguageModelMetrics, TokenClassificationMetrics

IGNORED = -100  # the label of a token that is not supervised (torch.nn.functional.cross_entropy's ignore_index)

TEXT = ("text", "sentence", "review", "content")
LABEL = ("label", "labels", "sentiment", "category", "class")
PROMPT = ("prompt", "question", "instruction")
COMPLETION = ("completion", "answer", "response", "output")
TOKENS = ("tokens", "words")
TAGS = ("ner_tags", "tags", "pos_tags", "labels")
MESSAGES = ("messages", "conversations")


def find_column(columns: list[str], given: str | None, names: tuple[str, ...], option: str, what: str) -> str:
    """The column that was named, or the first that goes by a usual name. Raises InputError where there is none."""
    if given is not None:
        if given not in columns:
            raise InputError(f"there is no column {given!r} (--{option}): the columns are {', '.join(columns)}")
        return given
    for name in names:
        if name in columns:
            return name
    raise InputError(
        f"there is no column {names[0]!r} for {what}: the columns are {', '.join(columns)}; name it with --{option}"
    )


def detect_task(args: DataArguments, columns: list[str]) -> str:
    """The task that the columns speak for."""
    has = {names: any(name in columns for name in names) for names in (MESSAGES, PROMPT, COMPLETION, TOKENS, LABEL)}
    if has[MESSAGES] or args.prompt_column or (has[PROMPT] and has[COMPLETION]):
        return "text-generation"
    if has[TOKENS] and any(name in columns for name in TAGS):
        return "token-classification"
    return "text-classification" if has[LABEL] or args.label_column else "text-generation"


def cell(row: dict, column: str) -> str:
    """A cell as text. Raises InputError where it is missing or empty of value."""
    if row.get(column) is None:
        raise InputError(f"the column {column!r} holds no value")
    if isinstance(row[column], (list, dict)):
        raise InputError(f"the column {column!r} holds a {type(row[column]).__name__} where text is expected")
    return str(row[column])


def label_name(value) -> str:
    """A label's name: "1" for 1, 1.0 and "1"."""
    if isinstance(value, (list, dict)):
        raise InputError(f"a label is one value, got {value}: each row has one label")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip()


def label_names(rows: Dataset, column: str, many: bool = False) -> list[str]:
    """All labels of the training rows: the dataset's own names where it has them, else sorted, numbers by value."""
    feature = rows.features[column]
    feature = getattr(feature, "feature", feature) if many else feature
    if hasattr(feature, "names"):
        return list(feature.names)
    values = (value for cell in rows[column] for value in split_words(cell)) if many else rows[column]
    names = {label_name(value) for value in values if value is not None} - {""}
    numbers = all(name.lstrip("-").isdigit() for name in names)
    if len(names) < 2:
        raise InputError(
            f"the column {column!r} has only the label {', '.join(names)!r}: there is nothing to tell apart"
        )
    return sorted(names, key=int) if numbers else sorted(names)


def split_words(value: list | str | None) -> list:
    """A list, or a text cell (CSV, TSV) whose words are split by spaces."""
    return value.split() if isinstance(value, str) else list(value or [])


@dataclass
class Task:
    """One task over one tokenizer and one set of columns. `encode(row)` gives (features, was it truncated)."""

    tokenizer: PreTrainedTokenizerBase
    max_length: int

    name: ClassVar[str]
    head: ClassVar[str]  # how transformers names the model classes of the task
    auto_model: ClassVar[type]
    peft_task: ClassVar[str]

    def encode(self, row: dict) -> tuple[dict, bool]:
        raise NotImplementedError

    @property
    def columns(self) -> dict[str, str]:
        """The columns that it reads, by what they are to it."""
        names = ("text", "label", "prompt", "completion", "messages")
        return {name: column for name in names if (column := getattr(self, name, None)) is not None}

    def label_id(self, value, labels: list[str]) -> int:
        name = labels[value] if isinstance(value, int) and self.class_labels else label_name(value)
        if name not in labels:
            raise InputError(f"the label {name!r} was never seen in training: the labels are {', '.join(labels)}")
        return labels.index(name)


@dataclass
class TextClassification(Task):
    """text + label rows: one label for the whole text."""

    text: str
    label: str
    labels: list[str]
    class_labels: bool = False

    name = "text-classification"
    head = "ForSequenceClassification"
    auto_model = transformers.AutoModelForSequenceClassification
    peft_task = "SEQ_CLS"

    @classmethod
    def from_rows(cls, args, tokenizer, max_length, rows):
        text = find_column(rows.column_names, args.text_column, TEXT, "text_column", "the text")
        label = find_column(rows.column_names, args.label_column, LABEL, "label_column", "the label")
        return cls(tokenizer, max_length, text, label, label_names(rows, label), is_class_label(rows, label))

    def encode(self, row):
        features, truncated = self.encode_input(row)
        return {**features, "labels": self.label_id(cell_value(row, self.label), self.labels)}, truncated

    def encode_input(self, row):
        ids = self.tokenizer(cell(row, self.text), verbose=False)["input_ids"]
        truncated = len(ids) > self.max_length
        if truncated:
            ids = self.tokenizer(cell(row, self.text), truncation=True, max_length=self.max_length)["input_ids"]
        return {"input_ids": ids}, truncated

    def collator(self):
        return transformers.DataCollatorWithPadding(self.tokenizer)

    def metrics(self):
        return ClassificationMetrics(self.labels)


@dataclass
class TokenClassification(Task):
    """tokens + tags rows: one label per word, on the word's first token (as BERT's NER does)."""

    text: str
    label: str
    labels: list[str]
    class_labels: bool = False

    name = "token-classification"
    head = "ForTokenClassification"
    auto_model = transformers.AutoModelForTokenClassification
    peft_task = "TOKEN_CLS"

    @classmethod
    def from_rows(cls, args, tokenizer, max_length, rows):
        text = find_column(rows.column_names, args.text_column, TOKENS, "text_column", "the tokens")
        label = find_column(rows.column_names, args.label_column, TAGS, "label_column", "the tags")
        labels = label_names(rows, label, many=True)
        return cls(tokenizer, max_length, text, label, labels, is_class_label(rows, label))

    def encode(self, row):
        words, tags = split_words(row[self.text]), split_words(row[self.label])
        if len(words) != len(tags):
            raise InputError(f"{len(words)} tokens have {len(tags)} tags: each token needs one")
        features, truncated = self.encode_input(row)
        word_ids, labels, before = features.pop("word_ids"), [], None
        for word in word_ids:
            first = word is not None and word != before
            labels.append(self.label_id(tags[word], self.labels) if first else IGNORED)
            before = word
        return {**features, "labels": labels}, truncated

    def encode_input(self, row):
        options = {"is_split_into_words": True, "truncation": True, "max_length": self.max_length}
        words = split_words(row[self.text])
        if not all(isinstance(word, str) for word in words):
            raise InputError(f"the column {self.text!r} must hold a list of words, got {words}")
        encoded = self.tokenizer(words, **options)
        word_ids = encoded.word_ids()
        reached = max((word for word in word_ids if word is not None), default=-1)
        return {"input_ids": encoded["input_ids"], "word_ids": word_ids}, reached + 1 < len(words)

    def collator(self):
        return transformers.DataCollatorForTokenClassification(self.tokenizer)

    def metrics(self):
        return TokenClassificationMetrics(self.labels)


@dataclass
class TextGeneration(Task):
    """prompt + completion, chat, or plain text rows; only completions and assistant turns are supervised."""

    messages: str | None = None
    prompt: str | None = None
    completion: str | None = None
    text: str | None = None
    chat: bool = False
    packing: bool = False

    name = "text-generation"
    head = "ForCausalLM"
    auto_model = transformers.AutoModelForCausalLM
    peft_task = "CAUSAL_LM"

    @classmethod
    def from_rows(cls, args, tokenizer, max_length, rows):
        columns = rows.column_names
        task = cls(tokenizer, max_length, packing=getattr(args, "packing", False))
        task.messages = next((name for name in MESSAGES if name in columns), None)
        pair = (args.prompt_column, args.completion_column, *PROMPT, *COMPLETION)
        if (task.messages is None and any(name in columns for name in pair if name)) or args.prompt_column:
            task.messages = None
            task.prompt = find_column(columns, args.prompt_column, PROMPT, "prompt_column", "the prompt")
            task.completion = find_column(
                columns, args.completion_column, COMPLETION, "completion_column", "the completion"
            )
        elif task.messages is None:
            task.text = find_column(columns, args.text_column, TEXT, "text_column", "the text")
        task.chat = bool(task.messages or (task.prompt and not isinstance(rows[0][task.prompt], str)))
        if task.chat and not tokenizer.chat_template:
            raise InputError(
                "the rows are conversations and this tokenizer has no chat template: use a chat model, or give "
                "prompt and completion as text"
            )
        return task

    def encode(self, row):
        ids, labels = [], []
        for text, supervised, special in self.segments(row):
            piece = self.tokens(text, special)
            ids += piece
            labels += piece if supervised else [IGNORED] * len(piece)
        if not self.chat and self.end is not None:
            ids.append(self.end)
            labels.append(self.end)
        truncated = len(ids) > self.max_length
        return {"input_ids": ids[: self.max_length], "labels": labels[: self.max_length]}, truncated

    @property
    def end(self) -> int | None:
        return self.tokenizer.eos_token_id if self.tokenizer.eos_token_id is not None else self.tokenizer.sep_token_id

    def tokens(self, text: str, special: bool) -> list[int]:
        """Token ids, with the tokenizer's opening token where `special`; some tokenizers also close every text."""
        ids = self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
        return ids[:-1] if special and ids and ids[-1] == self.end else ids

    def prompt_ids(self, prompt: str) -> list[int]:
        """A prompt as training saw it, to be continued."""
        if not self.chat:
            return self.tokens(str(prompt), True)
        messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": str(prompt)}]
        rendered = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return self.tokens(rendered, False)

    def segments(self, row: dict) -> list[tuple[str, bool, bool]]:
        """The row as (text, supervised, with the tokenizer's special tokens) pieces in order."""
        if self.messages:
            return self.chat_segments(row[self.messages], 0)
        if self.chat:
            prompt, completion = row[self.prompt], row[self.completion]
            if not (isinstance(prompt, list) and isinstance(completion, list)):
                raise InputError(f"{self.prompt!r} and {self.completion!r} are both text or both lists of messages")
            return self.chat_segments(prompt + completion, len(prompt))
        if self.prompt:
            return [(cell(row, self.prompt), False, True), (cell(row, self.completion), True, False)]
        return [(cell(row, self.text), True, True)]

    def chat_segments(self, messages: list[dict], first: int) -> list[tuple[str, bool, bool]]:
        """The rendered conversation, cut where an assistant's turn begins and ends; turns before `first` are context.

        Where the template renders a turn differently once others follow it (it drops the reasoning of earlier turns),
        only the last turn is supervised.
        """
        if not messages or not all(
            isinstance(m, dict) and m.get("role") and (m.get("content") is not None or m.get("tool_calls"))
            for m in messages
        ):
            raise InputError("a conversation is a list of {'role': ..., 'content': ...}, and not empty")

        def render(upto: int, **options) -> str:
            return self.tokenizer.apply_chat_template(messages[:upto], tokenize=False, **options)

        try:
            turns = [i for i, m in enumerate(messages) if m["role"] == "assistant" and i >= first]
            prompts = [render(i, add_generation_prompt=True) for i in turns]
            ends = [render(i + 1) for i in turns]
            full = ends[-1] if turns else render(len(messages))
        except Exception as error:  # a template refuses a conversation with an exception of its own
            raise InputError(f"the chat template refuses this conversation: {error}") from None
        if not all(full.startswith(text) for text in prompts + ends):
            prompts, ends = prompts[-1:], ends[-1:]
            if not full.startswith(prompts[0]):
                raise InputError("the chat template renders an answer that does not continue its prompt")
        segments, at = [], 0
        for prompt, end in zip(prompts, ends, strict=True):
            segments += [(full[at : len(prompt)], False, False), (full[len(prompt) : len(end)], True, False)]
            at = len(end)
        return segments or [(full, False, False)]

    def collator(self):
        if self.packing:
            return transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True)
        return transformers.DataCollatorForTokenClassification(self.tokenizer)

    def metrics(self):
        return LanguageModelMetrics()


def is_class_label(rows: Dataset, column: str) -> bool:
    feature = rows.features[column]
    return hasattr(getattr(feature, "feature", feature), "names")


def cell_value(row: dict, column: str):
    if row.get(column) is None or row[column] == "":
        raise InputError(f"the column {column!r} holds no value")
    return row[column]


TASKS = {task.name: task for task in (TextGeneration, TextClassification, TokenClassification)}
