import pytest

from pyfast.train.config import FinetuneArguments, InputError, parse_arguments

BASE = ["--model_name_or_path", "m", "--train_file", "t.csv"]


def parse(*words):
    return parse_arguments(FinetuneArguments, [*BASE, *words])


def test_hyphens_and_underscores_are_the_same_option():
    assert parse("--lora-r", "4", "--learning-rate", "1e-3").lora_r == parse("--lora_r=4").lora_r == 4


def test_yaml_config_is_overridden_by_the_command_line(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("learning_rate: 5e-4\nlora_r: 8\npacking: true\nlora_target_modules: [q_proj, v_proj]\n")
    args = parse("--config", str(file), "--lora_r", "2")
    assert (args.learning_rate, args.lora_r, args.packing) == (5e-4, 2, True)
    assert args.lora_target_modules == ["q_proj", "v_proj"]


def test_every_training_argument_is_an_option():
    args = parse(
        "--warmup_steps",
        "3",
        "--weight_decay",
        "0.1",
        "--lr_scheduler_type",
        "cosine",
        "--gradient_accumulation_steps",
        "2",
    )
    assert (args.warmup_steps, args.weight_decay, args.gradient_accumulation_steps) == (3, 0.1, 2)


def test_default_learning_rate_depends_on_what_is_trained():
    assert parse().learning_rate == 2e-4
    assert parse("--use_peft", "False").learning_rate == 2e-5


def test_dtype_follows_the_machine_and_the_user():
    assert parse("--dtype", "float32").bf16 is False
    assert parse("--dtype", "bfloat16").bf16 is True
    assert parse().dtype in ("float32", "bfloat16")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lorar", "4"], "did you mean --lora_r"),
        (["--lora_r", "four"], "invalid int value"),
        (["--lora_r", "0"], "at least 1"),
        (["--lora_dropout", "2"], "share in [0, 1)"),
        (["--learning_rate", "-1"], "not be negative"),
        (["--per_device_train_batch_size", "0"], "--per_device_train_batch_size must be at least 1"),
        (["t.csv"], "'t.csv' belongs to no option"),
        (["--task", "translation"], "translation"),
        (["--dtype", "float8"], "float8"),
        (["--freeze", "("], "regular expression"),
        (["--config", "none.yaml"], "no such file"),
        (["--validation_split", "1.5"], "share"),
        (["--early_stopping_patience", "2", "--eval_strategy", "no"], "eval_strategy"),
        (["--merge", "--use_peft", "False"], "--merge"),
        (["--dataset_name", "d"], "one of them"),
    ],
)
def test_a_mistake_is_one_clear_line(words, message):
    with pytest.raises(InputError) as error:
        parse(*words)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_model_and_data_are_needed():
    with pytest.raises(InputError, match="no model"):
        parse_arguments(FinetuneArguments, ["--train_file", "t.csv"])
    with pytest.raises(InputError, match="no data"):
        parse_arguments(FinetuneArguments, ["--model_name_or_path", "m"])
