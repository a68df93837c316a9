"""What SFT and reward training add to TRL's trainers."""

import contextlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PrinterCallback, Trainer
from transformers.trainer import FSDP_MODEL_NAME

from rlhf.engine.callbacks import AfterStep, AllStepsMade, TrainerLog
from rlhf.engine.card import Plan, choose_tokens, describe_start
from rlhf.engine.micro_batches import MicroBatchSize, cut_by_tokens, keep_tokens
from rlhf.engine.speed import Stopwatch, Work, memory_gib, mfu
from rlhf.runs.advice import less_memory
from rlhf.runs.checkpoints import sizes_before
from rlhf.runs.curves import Panel
from rlhf.runs.errors import UserError
from rlhf.runs.metrics import read_jsonl
from rlhf.runs.processes import (
    agree,
    is_main,
    largest,
    most,
    num_processes,
    part,
    sharded,
    sum_gradients,
    sum_over_processes,
    this_process,
    wait,
    whole,
)
from rlhf.runs.resume import States, states
from rlhf.runs.stop import check_stop, stop_when_asked
from rlhf.runs.terminal import console

Row = dict[str, list[int]]  # of a data set: token ids, and labels, by column

EVALUATIONS = 10  # in a run, including the last
EVAL_SHARE = 0.1  # of a run's time


def num_steps(rows: int, batch_size: int, epochs: float, max_steps: int | None = None) -> int:
    """Optimizer steps of a run. Raises UserError when the rows do not fill one."""
    if rows < batch_size:
        most = rows // num_processes() * num_processes()
        todo = f"lower --batch-size to {most}"
        if not most:
            todo = f"start fewer processes than {num_processes()}"
        raise UserError(f"{rows} training rows do not fill one batch of {batch_size}: {todo}")
    whole_batches = rows // batch_size
    # As the Trainer counts them.
    epoch = whole_batches if num_processes() > 1 else math.ceil(rows / batch_size)
    return max_steps or math.ceil(epoch * epochs)


def choose_size(
    plan: Plan, longest: int, flags: Mapping[str, Any], device: torch.device, dtype: torch.dtype
) -> int:
    """Tokens of a micro-batch; prints the first line of the run.

    Args:
        plan: the memory plan by tokens of a micro-batch.
        longest: tokens of the longest row.
        flags: the script's.
    """
    before = sizes_before(flags["output_dir"], flags["resume"])
    asked = flags["micro_batch_tokens"]
    tokens, why = choose_tokens(plan, asked, longest, device, before, less_memory(flags))
    console.print(describe_start(device, tokens, flags["batch_size"], dtype, why))
    return tokens


def steps_between_evaluations(
    asked: int | Literal["auto"] | None, steps: int, batch_size: int, eval_rows: int
) -> int | None:
    """Steps from one evaluation of the test rows to the next; None: only first and last.

    `auto` cuts the run into `EVALUATIONS` parts, or into fewer, so that the evaluations between
    them take at most `EVAL_SHARE` of its time. Evaluating a row takes half as long as training on
    it.
    """
    if asked != "auto":
        return asked
    affordable = EVAL_SHARE * steps * batch_size / (eval_rows / 2)
    parts = min(EVALUATIONS, int(affordable) + 1)
    return math.ceil(steps / parts) if parts > 1 else None


def trainer_options(dtype: torch.dtype, folder: Path) -> dict[str, Any]:
    """The arguments of SFTConfig and RewardConfig that no flag sets."""
    return {
        "output_dir": str(folder),
        "gradient_accumulation_steps": 1,  # `training_step` takes a batch in parts
        "gradient_checkpointing": False,  # the decoder has its own; FSDP's: `checkpoint_layers`
        "lr_scheduler_type": "cosine",
        # The base computes in bfloat16 anyway; autocast would only cost time.
        "bf16": False,
        "fp16": dtype == torch.float16,  # for the gradient scaler
        "use_cpu": this_process().device.type == "cpu",
        "dataloader_pin_memory": False,
        "logging_steps": 1,  # the steps behind a longer mean would be lost if a run is cut short
        "logging_nan_inf_filter": False,
        "save_strategy": "no",  # `AfterStep` decides
        "disable_tqdm": True,
    }


def keep_fp32(model: nn.Module) -> None:
    """Cast every trained weight to float32: on a quantised base TRL makes them bf16."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def checkpoint_layers(base: PreTrainedModel) -> None:
    """Have transformers compute layers twice, under FSDP, where our decoder is not used."""
    base.activation_checkpointing_enable()
    # Not needed, and layers below the first adapter would go backward too.
    base.disable_input_require_grads()


# ---------------------------------------------------------------- TRL's trainers, resumable


def num_tokens(row: Row) -> int:
    """Tokens of a row's texts as TRL counts them: a prompt counts once for each response."""
    return sum(len(ids) for column, ids in row.items() if column.endswith("_ids"))


class Resumable(Trainer):
    """The base class of our trainers, in front of TRL's; `run` replaces `train`.

    Two things differ from transformers' Trainer (5.23).

    1. States. The Trainer writes checkpoints in place, and removes old ones before it has checked
       the new one. Here states go through `rlhf.runs.resume`: trained weights, optimizer,
       scheduler, scaler, random numbers and the place in the data.
    2. Steps. A step has one batch, which goes through the model in parts that fit the memory
       (`go_through`). A loss or gradient that is not finite ends the run.

    The loss is a mean over items. A subclass says what they are, and how many each row has.
    """

    panels: tuple[Panel, ...]  # of curves.png
    means: tuple[str, ...]  # logged as means over the items; the loss comes first
    extremes: tuple[str, ...] = ()  # logged as minimum or maximum: `min_...`, `max_...`
    eval_steps: int | None  # from one evaluation to the next; None: only first and last
    partial = Path()  # the state that is being written
    at_hand: list[Row]  # of this step
    work: Work | None = None  # for a token; None: the model is sharded
    dtype: torch.dtype  # that the base computes in
    clock: Stopwatch | None = None  # from the first step on

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.padded = self.data_collator  # TRL's
        self.data_collator = lambda rows: {"rows": rows}

    def tokens(self, row: Row) -> int:
        """Tokens of a row that go through the model."""
        raise NotImplementedError

    def items(self, row: Row) -> int:
        """Items of a row."""
        raise NotImplementedError

    def part_loss(self, rows: list[Row]) -> dict[str, Tensor]:
        """`means` as sums over the rows' items, the loss with its gradient, and `extremes`."""
        raise NotImplementedError

    def evaluation(self) -> dict[str, float]:
        """Means over the test rows, including the loss. All processes call it."""
        raise NotImplementedError

    def prepare(self, states: States, name: str, tokens: int) -> None:
        """Find the state to resume from, if there is one.

        Args:
            name: of the run, for its progress bar.
            tokens: of a micro-batch, unless the state says otherwise.
        Raises:
            UserError: the run began with other flags or inputs.
        """
        self.states = states
        self.folder = states.folder
        self.lines = TrainerLog(states.folder, name, self.panels)
        self.micro_batch = MicroBatchSize(tokens)
        self.resumed, facts = states.newest()
        if self.resumed:
            asked = states.flags["micro_batch_tokens"]
            keep_tokens(self.micro_batch, asked, facts["micro_batch_tokens"])
        if is_main():
            self.lines.metrics.cut(facts.get("position", 0))
        # It would print each log as a dictionary; TrainerLog replaces it.
        self.remove_callback(PrinterCallback)
        self.add_callback(AfterStep(states.clock, self.micro_batch, self.eval_steps))
        self.add_callback(self.lines)
        self.args.eval_on_start = self.eval_dataset is not None and not self.resumed

    def run(self) -> None:
        """Train, from the start or from the state that `prepare` found.

        Raises:
            Stopped: a signal asked the run to end.
        """
        with stop_when_asked():
            try:
                self.train(resume_from_checkpoint=str(self.resumed) if self.resumed else None)
            except AllStepsMade:  # its weights are loaded by now
                if is_main():
                    row = {
                        "step": self.state.global_step,
                        "train_runtime": 0.0,
                        "epoch": self.state.epoch,
                    }
                    self.lines.metrics.write(row)
            finally:
                self.lines.stop()
            check_stop(together=True)

    def first_row(self, name: str) -> float | None:
        """A metric that was logged before the first step."""
        rows = read_jsonl(self.folder / "metrics.jsonl") if is_main() else []
        return agree(rows[0].get(name) if rows else None)

    def speed(self) -> dict[str, float]:
        """Tokens a second over the whole run, and the seconds of all its steps."""
        rows = [row for row in read_jsonl(self.folder / "metrics.jsonl") if "time/step" in row]
        seconds = sum(row["time/step"] for row in rows)
        tokens = sum(row["time/step"] * row["speed/tokens_per_second"] for row in rows)
        return {"speed/tokens_per_second": tokens / seconds, "time/steps": seconds}

    def trained(self) -> dict[str, nn.Parameter]:
        """The weights that are trained, by name."""
        return {
            name: parameter
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad
        }

    def whole_weights(self) -> dict[str, Tensor]:
        """The weights that are trained, by name, unsharded. All processes call it."""
        return {
            name: whole(parameter.detach()).contiguous()
            for name, parameter in self.trained().items()
        }

    def not_finite(self, what: str) -> UserError:
        """The error for a number that is not finite: step, rows, and the last good state."""
        column = "chosen_ids" if "chosen_ids" in self.train_dataset.column_names else "input_ids"
        at_hand = [row[column] for row in self.at_hand]
        rows = [i for i, ids in enumerate(self.train_dataset[column]) if ids in at_hand]
        state = next(iter(states(self.folder)), "none")
        return UserError(
            f"step {self.state.global_step + 1}: the {what} is not finite, at usable training rows "
            f"{', '.join(map(str, rows))} (counted from 0); the last good state is {state}; lower "
            "--learning-rate, try --dtype fp32, or look at these rows"
        )

    # -- a step in parts

    def go_through(self, rows: list[Row]) -> tuple[dict[str, float], dict[str, int]]:
        """Forward, and backward if gradients are on, over the rows of all processes, in parts.

        The gradients are those of the mean loss, but of this process's rows: `sum_gradients` still
        has to add them up, unless FSDP has. No process waits for another between the parts, so each
        can make its parts smaller when its memory runs out. Under FSDP all processes go through the
        same number of parts together, and none can.

        Args:
            rows: of this process.
        Returns:
            `means` and `extremes` over the rows of all processes, whatever the parts; and the
            number of items, of tokens as TRL counts them, and of tokens that went through the
            model.
        """
        lengths = [self.tokens(row) for row in rows]
        counts = [sum(map(self.items, rows)), sum(map(num_tokens, rows)), sum(lengths)]
        counts = sum_over_processes(
            torch.tensor(counts, dtype=torch.float64, device=self.args.device)
        )
        # FSDP takes the mean of the gradients.
        weight = ((num_processes() if sharded() else 1) / counts[0]).float()

        def work() -> list[dict[str, Tensor]]:
            parts = cut_by_tokens(lengths, self.micro_batch.tokens)
            # Agreed on before the first part.
            missing = most(len(parts)) - len(parts) if sharded() else 0
            found = [self.differentiate([rows[i] for i in part], weight) for part in parts]
            for _ in range(missing):
                self.differentiate([self.train_dataset[0]], 0 * weight)
            return found

        found = self.micro_batch.retry(work, max(lengths, default=0), self.model.zero_grad)
        sums, peaks = self.add_up(found)
        # The step's one wait for the device.
        numbers = torch.cat([sums / counts[0], peaks, counts]).tolist()
        names = self.means + self.extremes
        values = dict(zip(names, numbers, strict=False))
        return values, dict(
            zip(("items", "num_tokens", "texts"), map(int, numbers[len(names) :]), strict=True)
        )

    def differentiate(self, rows: list[Row], weight: Tensor) -> dict[str, Tensor]:
        """`part_loss`, and backward of `weight` times the loss where gradients are enabled."""
        found = self.part_loss(rows)
        if torch.is_grad_enabled():
            self.accelerator.backward(weight * found["loss"])
        return {name: value.detach() for name, value in found.items()}

    def add_up(self, found: list[dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
        """The sums behind `means`, and the `extremes`, of the parts of all processes."""
        like = {"dtype": torch.float64, "device": self.args.device}
        sums = torch.zeros(len(self.means), **like)
        peaks = torch.full((len(self.extremes),), -math.inf, **like)
        signs = torch.tensor(
            [-1 if name.startswith("min_") else 1 for name in self.extremes], **like
        )
        for of_part in found:
            numbers = torch.stack([of_part[name].double() for name in self.means + self.extremes])
            sums += numbers[: len(sums)]
            peaks = torch.maximum(peaks, signs * numbers[len(sums) :])
        return sum_over_processes(sums), signs * largest(peaks)

    # -- overrides of transformers 5.23's and TRL 1.16's Trainer, which call what is here

    def evaluate(self, *_, **__) -> dict[str, float]:
        """Log `evaluation`. Its time does not count towards a step's."""
        self.model.eval()
        with self.clock.paused() if self.clock else contextlib.nullcontext(), torch.no_grad():
            metrics = {f"eval_{name}": value for name, value in self.evaluation().items()}
        self.log(metrics)
        told = self.args, self.state, self.control, metrics
        self.control = self.callback_handler.on_evaluate(*told)
        return metrics

    def get_train_dataloader(self):
        """Rows stay lists on the CPU until a part of them is laid out.

        With several processes, rows that do not fill a last batch for all of them are left out,
        where accelerate would repeat others. So every process has rows in every step.
        """
        self.args.dataloader_drop_last = num_processes() > 1
        self.accelerator.device_placement = False
        try:
            return super().get_train_dataloader()
        finally:
            self.args.dataloader_drop_last = False
            self.accelerator.device_placement = True

    def training_step(self, model, inputs, num_items_in_batch=None):
        """A step's gradients and metrics. `model` is not used: DDP's would wait."""
        self.at_hand = inputs["rows"]
        self.clock = self.clock or Stopwatch(self.args.device)
        self.model.train()
        values, counts = self.go_through(self.at_hand)
        if not math.isfinite(values["loss"]):
            raise self.not_finite("loss")
        if not sharded():
            sum_gradients(self.trained().values())
        loss = values.pop("loss")
        self._total_train_tokens += counts["num_tokens"]
        # Counted from the last lap, so it includes the optimizer step and what was written then.
        self.clock.lap("time/step")
        seconds = self.clock.seconds["time/step"]
        speed = {"speed/tokens_per_second": counts["texts"] / seconds, "time/step": seconds}
        if self.work:
            operations = self.work.training(counts["texts"], counts["items"])
            speed |= mfu(operations, seconds, self.args.device, self.dtype)
        speed |= memory_gib(self.args.device)
        for name, value in {"num_tokens": self._total_train_tokens, **values, **speed}.items():
            self._metrics["train"][name] = [value]  # which TRL adds to the log
        return torch.tensor(loss, device=self.args.device)

    def _get_grad_norm(self, model, grad_norm=None):
        # As a float, so that the log need not read it from the device again.
        norm = float(super()._get_grad_norm(model, grad_norm=grad_norm))
        # With fp16 the scaler skips such a step and halves its scale, down to 1.
        scaler = self.accelerator.scaler
        if not math.isfinite(norm) and not (scaler and scaler.get_scale() >= 1):
            raise self.not_finite("gradient")
        return norm

    def _save_checkpoint(self, model, trial):
        step = self.state.global_step
        facts = {
            "position": self.lines.metrics.position(),
            "micro_batch_tokens": self.micro_batch.tokens,
        }
        with self.states.new(step, facts) as self.partial:
            # Not TRL's, which writes a model card first.
            Trainer._save_checkpoint(self, model, trial)
            wait()
            checkpoint = self.partial / f"checkpoint-{step}"
            if is_main():
                # It holds the same weights a second time.
                (checkpoint / f"{FSDP_MODEL_NAME}.bin").unlink(missing_ok=True)
                for path in checkpoint.iterdir():
                    path.rename(self.partial / path.name)
                checkpoint.rmdir()

    def _get_output_dir(self, trial):
        return str(self.partial)

    def save_model(self, output_dir=None, _internal_call=False):
        weights = self.whole_weights()
        if is_main():
            Path(output_dir).mkdir(exist_ok=True)
            save_file(weights, f"{output_dir}/weights.safetensors")

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        weights = load_file(f"{resume_from_checkpoint}/weights.safetensors")
        with torch.no_grad():
            for name, parameter in self.trained().items():
                parameter.copy_(part(weights[name], parameter))
