"""What happens around a step of transformers' Trainer: stopping, saving, restacking, logging."""

from collections.abc import Sequence
from pathlib import Path

from transformers import TrainerCallback

from rlhf.engine.decoder import Decoder
from rlhf.engine.micro_batches import MicroBatchSize
from rlhf.runs.curves import Curves, Panel
from rlhf.runs.metrics import JsonLines, read_jsonl
from rlhf.runs.resume import SaveClock
from rlhf.runs.stop import after_step
from rlhf.runs.terminal import Progress, console


class AllStepsMade(Exception):
    """The state that a run resumes from is that of its last step."""


class AfterStep(TrainerCallback):
    """What the processes agree on after each step: whether to stop, and whether to save a state.

    A state is also saved at the end of training, as what comes after it may fail. The test rows are
    evaluated every `eval_steps` steps, except after the last, where the script does it.
    """

    def __init__(self, clock: SaveClock, micro_batch: MicroBatchSize, eval_steps: int | None):
        self.clock = clock
        self.micro_batch = micro_batch
        self.eval_steps = eval_steps

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps:  # the Trainer would make one more before it looks
            raise AllStepsMade

    def on_step_end(self, args, state, control, **kwargs):
        last = state.global_step >= state.max_steps
        due = last or self.clock.due(state.global_step)
        signal, due, self.micro_batch.tokens = after_step(due, self.micro_batch.tokens)
        control.should_save = due or bool(signal)
        control.should_training_stop = last or bool(signal)
        if self.eval_steps and not last:
            control.should_evaluate = state.global_step % self.eval_steps == 0


class Restack(TrainerCallback):
    """Shows the decoder the adapters as they are when training begins, and after each step."""

    def __init__(self, decoder: Decoder):
        self.decoder = decoder

    def on_train_begin(self, args, state, control, optimizer, **kwargs):
        self.decoder.restack()  # a state may have been loaded
        self.decoder.follow(optimizer.optimizer)  # the one that accelerate's holds


class TrainerLog(TrainerCallback):
    """Writes what the Trainer logs to metrics.jsonl, shows progress, and draws curves."""

    def __init__(self, folder: Path, name: str, panels: Sequence["Panel"]):
        self.metrics = JsonLines(folder / "metrics.jsonl")
        self.name = name
        self.curves = Curves(folder, "step", panels)
        self.progress: Progress | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.progress = Progress(self.name, "step", state.max_steps)
            self.progress.begin(state.global_step)

    def on_step_begin(self, args, state, control, **kwargs):
        if self.progress and state.global_step == self.progress.first:
            self.progress.begin(state.global_step)  # what came before it was an evaluation

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and logs:
            # One counts from the last start only, the other is wrong for batches that are lists.
            logs = {
                name: value
                for name, value in logs.items()
                if name not in ("train_loss", "total_flos")
            }
            if "eval_loss" in logs:
                before = read_jsonl(self.curves.metrics)
                console.print(describe_evaluation(state.global_step, logs, before))
            self.metrics.write({"step": state.global_step, **logs})
            if "loss" in logs:
                speed = logs.get("speed/tokens_per_second", 0.0)
                self.progress.update(state.global_step, loss=float(logs["loss"]), speed=speed)
                self.curves.draw_when_due()

    def stop(self) -> None:
        """Give the terminal back, however the training ended."""
        if self.progress:
            self.progress.stop()


def describe_evaluation(step: int, numbers: dict[str, float], rows: list[dict[str, float]]) -> str:
    """An evaluation in one line, which also says where the loss was lower before.

    Args:
        rows: the run's metrics so far.
    """
    said = [f"loss {numbers['eval_loss']:.4f}"]
    for name in ("accuracy", "margin"):
        if f"eval_{name}" in numbers:
            said.append(f"{name} {numbers[f'eval_{name}']:.3f}")
    line = f"step {step:,}, test rows: {', '.join(said)}"
    looks = [row for row in rows if "eval_loss" in row]
    best = min(looks, key=lambda row: row["eval_loss"], default=numbers)
    if best["eval_loss"] < numbers["eval_loss"]:
        line += f"; the loss was lowest at step {best['step']:,}, {best['eval_loss']:.4f}"
    return line
