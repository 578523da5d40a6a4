"""Loading what a run needs from the hub or a folder, and the checks that belong before training starts."""

import re
from pathlib import Path

import torch
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .config import FinetuneArguments, InputError
from .tasks import Task

LONGEST = 1024  # tokens of a row where neither the user nor the model sets a limit below
HEADS = r".*\b(classifier|score)\b.*"  # classification heads start untrained: they are trained whole, without adapters


def chain(error: BaseException | None):
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def looks_local(name: str) -> bool:
    """Whether a name is a path rather than a hub id."""
    return name[0] in "./~" or name.count("/") > 1


def load(auto_class: type, name: str, **options):
    """`auto_class.from_pretrained(name)`; what goes wrong becomes one InputError that says what to do."""
    folder = Path(name).expanduser()
    local = folder.is_dir()
    if not local and looks_local(name):
        raise InputError(f"--model_name_or_path {name}: there is no such folder")
    try:
        return auto_class.from_pretrained(str(folder) if local else name, **options)
    except Exception as error:
        errors = list(chain(error))
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if any(isinstance(e, GatedRepoError) for e in errors):
            text = f"{name} is a gated model: accept its terms at https://huggingface.co/{name}, then `hf auth login`"
        elif any(isinstance(e, RepositoryNotFoundError) for e in errors):
            text = f"{name} is neither a folder nor a model on the hub (or it is private: `hf auth login`)"
        elif local:
            text = f"the folder {name} could not be loaded: {reason}"
        elif isinstance(error, OSError):
            text = f"{name} is no folder, and the hub could not be reached for it: check the network, or give a folder"
        else:
            text = f"{name} could not be loaded: {reason}"
        raise InputError(text) from error


def hub_options(args) -> dict:
    return {"revision": args.model_revision, "trust_remote_code": args.trust_remote_code}


def load_tokenizer(name: str, split_words: bool, **options) -> PreTrainedTokenizerBase:
    # byte-level BPE needs a space before each word that comes alone
    tokenizer = load(AutoTokenizer, name, **options, **({"add_prefix_space": True} if split_words else {}))
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):  # what transformers makes of no files
        raise InputError(f"{name} has no tokenizer: its vocabulary holds special tokens alone")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token is None:
        raise InputError(f"the tokenizer of {name} has no pad, end or unknown token to pad a batch with")
    return tokenizer


def longest_row(config, tokenizer: PreTrainedTokenizerBase, asked: int | None) -> int:
    """Tokens that a row may have: what was asked for, where the model has positions for it, else its own limit."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions and config.model_type in ("roberta", "xlm-roberta", "camembert"):
        positions -= 2  # their positions start behind the padding index
    if asked and positions and asked > positions:
        raise InputError(f"--max_length {asked} is more than the model's {positions} positions")
    return asked or min(x for x in (LONGEST, tokenizer.model_max_length, positions) if x)


def load_model(args: FinetuneArguments, task: Task, config) -> PreTrainedModel:
    """The model with its head, on the CPU. Frozen weights in args.dtype; whatever is trained is fp32."""
    dtype = args.torch_dtype if args.use_peft else torch.float32
    options = {"dtype": dtype, "config": config, "use_safetensors": True, **hub_options(args)}
    if hasattr(task, "labels"):
        options["ignore_mismatched_sizes"] = True  # a head for other labels gives way to a new one
    model = load(task.auto_model, args.model_name_or_path, **options)
    rows = model.get_input_embeddings().num_embeddings
    largest = max(task.tokenizer.get_vocab().values()) + 1
    if largest > rows:
        raise InputError(
            f"the tokenizer has {largest:,} tokens and the model's embedding {rows:,} rows: they do not belong "
            "together, or the embedding was not resized when tokens were added"
        )
    model.config.pad_token_id = task.tokenizer.pad_token_id
    return model


def add_adapters(model: PreTrainedModel, args: FinetuneArguments, task: Task):
    """Wrap the model by PEFT: LoRA on every linear layer, or on those named; a classification head is trained whole."""
    targets = args.lora_target_modules or ["all-linear"]
    config = LoraConfig(
        task_type=task.peft_task,
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=targets[0] if targets == ["all-linear"] else targets,
        exclude_modules=HEADS if hasattr(task, "labels") else None,
    )
    try:
        model = get_peft_model(model, config)
    except ValueError as error:
        raise InputError(f"--lora_target_modules {' '.join(targets)}: {str(error).split('. ')[0]}") from None
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def place(model: torch.nn.Module, args: FinetuneArguments) -> list[str]:
    """Moves the model to the device that trains it, so that it is patched for that; what the user should know of it.

    Of several processes each leaves its model to accelerate, which may shard it.
    """
    notes, found = [], args.n_gpu
    if found > 1:  # Trainer would split every batch among them by nn.DataParallel, packed rows and boundaries too
        args._n_gpu = 1
        notes.append(f"one of {found} GPUs is used: torchrun or accelerate launch starts a process for each")
    if args.world_size == 1:
        model.to(args.device)
    return notes


def freeze(model: torch.nn.Module, pattern: str) -> int:
    """Stop training every parameter whose name the regular expression finds; how many they were."""
    found = [p for name, p in model.named_parameters() if re.search(pattern, name)]
    if not found:
        raise InputError(f"--freeze {pattern!r} finds no parameter, such as {next(model.named_parameters())[0]}")
    for parameter in found:
        parameter.requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise InputError(f"--freeze {pattern!r} leaves nothing to train")
    return len(found)
