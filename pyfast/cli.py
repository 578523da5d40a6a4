"""The `pyfast` command: finetune, predict, generate, bench, tune, doctor."""

import sys

import typer

app = typer.Typer(
    help="Fine-tune Hugging Face models with fused kernels.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
# The options of these commands are dataclasses read by HfArgumentParser, so that both spellings (--lora_r, --lora-r),
# --config and every TrainingArguments option work.
PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def run(arguments: str, action: str, argv: list[str]) -> None:
    """Parse argv and act. A mistake of the user's ends in one line on stderr and exit status 2."""
    from pyfast import train
    from pyfast.train.trainer import Interrupted, quiet_libraries

    quiet_libraries()
    try:
        parsed = train.parse_arguments(getattr(train, arguments), argv)
        getattr(train, action)(parsed)
    except train.InputError as error:
        print(f"pyfast: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    except Interrupted as error:
        print(f"pyfast: {error}", file=sys.stderr)
        raise typer.Exit(130) from None
    except KeyboardInterrupt:
        print("pyfast: stopped; nothing was saved", file=sys.stderr)
        raise typer.Exit(130) from None


@app.command(context_settings=PASSED_ON)
def finetune(context: typer.Context) -> None:
    """Fine-tune a model on your rows (--help lists every option)."""
    run("FinetuneArguments", "run", context.args)


@app.command(context_settings=PASSED_ON)
def predict(context: typer.Context) -> None:
    """Label texts or tokens with a fine-tuned model."""
    run("PredictArguments", "predict", context.args)


@app.command(context_settings=PASSED_ON)
def generate(context: typer.Context) -> None:
    """Continue prompts with a fine-tuned model."""
    run("GenerateArguments", "generate", context.args)


@app.command(context_settings=PASSED_ON)
def bench(context: typer.Context) -> None:
    """Time the kernels beside their peers on this machine (--help lists the ops)."""
    from pyfast.benchmarks.__main__ import main

    main(context.args)


@app.command(context_settings=PASSED_ON)
def tune(context: typer.Context) -> None:
    """Check and time tiles and backends on this GPU, and write its architecture's tables (--help lists the kernels)."""
    from pyfast.benchmarks.tune import main

    main(context.args)


@app.command()
def doctor() -> None:
    """Say what this machine has, and which backend each op will use and why."""
    from pyfast.doctor import report

    report()


if __name__ == "__main__":
    app()
