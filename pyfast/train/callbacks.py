"""Trainer callbacks: the progress bar, the clock of tokens/s, and Ctrl-C."""

import signal
import sys
import threading
import time

import psutil
import torch
from transformers import ProgressCallback, TrainerCallback


def memory_mb() -> float:
    """Memory in use now: the GPU's where there is one, else this process's resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated() / 2**20
    return psutil.Process().memory_info().rss / 2**20


def peak_memory_mb() -> float:
    """The most memory this process ever held, counted as in `memory_mb`."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    try:  # VmHWM starts anew with each program; getrusage's ru_maxrss would count the parent's memory too
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 2**10
    except (OSError, StopIteration):
        return memory_mb()


class Clock(TrainerCallback):
    """Seconds spent in training steps, data loading included, evaluation and saving left out."""

    def __init__(self):
        self.seconds = 0.0
        self.tokens = 0
        self.peak_memory_mb = 0.0

    def restart(self, args, state, control, **kwargs):
        self.mark = time.perf_counter()

    def on_train_begin(self, args, state, control, **kwargs):
        self.first_tokens = state.num_input_tokens_seen
        self.restart(args, state, control)

    on_evaluate = on_save = restart

    def on_step_end(self, args, state, control, **kwargs):
        now = time.perf_counter()
        self.seconds += now - self.mark
        self.mark = now
        self.tokens = state.num_input_tokens_seen - self.first_tokens

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


class Progress(ProgressCallback):
    """Trainer's bar with loss, tokens/s and memory; evaluations are written as lines above it."""

    def __init__(self, clock: Clock):
        super().__init__()
        self.clock = clock
        self.loss = None

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None and not sys.stderr.isatty():
            self.training_bar.mininterval = 10  # seconds between two lines of a log file

    def on_step_end(self, args, state, control, **kwargs):
        super().on_step_end(args, state, control, **kwargs)
        if self.training_bar is not None:
            loss = "" if self.loss is None else f"loss {self.loss:.4f}, "
            rate = f"{self.clock.tokens_per_second:,.0f} tokens/s, {memory_mb():,.0f} MB"
            self.training_bar.set_postfix_str(loss + rate, refresh=False)

    def on_log(self, args, state, control, logs=None, **kwargs):
        logs = logs or {}
        self.loss = logs.get("loss", self.loss)
        if self.training_bar is not None and "eval_loss" in logs:
            shown = ("loss", "accuracy", "f1", "perplexity")
            text = ", ".join(f"{name} {logs[f'eval_{name}']:.4f}" for name in shown if f"eval_{name}" in logs)
            self.training_bar.write(f"epoch {logs.get('epoch', 0):.2f}: {text}")


class SaveOnInterrupt(TrainerCallback):
    """Ctrl-C ends the step, saves a checkpoint and stops; a second Ctrl-C stops at once."""

    def __init__(self):
        self.interrupted = False

    def on_train_begin(self, args, state, control, **kwargs):
        self.previous = None
        if threading.current_thread() is threading.main_thread():
            self.previous = signal.signal(signal.SIGINT, self.interrupt)

    def interrupt(self, signum, frame):
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True

    def on_step_end(self, args, state, control, **kwargs):
        if self.interrupted:
            control.should_save = True
            control.should_evaluate = False
            control.should_training_stop = True

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.interrupted:  # the step has saved already
            control.should_save = control.should_evaluate = False

    def restore(self) -> None:
        if getattr(self, "previous", None) is not None:
            signal.signal(signal.SIGINT, self.previous)
            self.previous = None
