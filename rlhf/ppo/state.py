"""All that a PPO run needs to resume exactly where it was: weights, optimizer, positions.

No random numbers are kept. Every draw follows from the seed and the number of the episode or update
(`ppo_train.draw_prompts`, `draw_minibatches`), so a resumed run draws what it would have drawn.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer

from rlhf.data.files import facts_of_source
from rlhf.data.format import PromptFormat
from rlhf.engine.adapters import save_stacked
from rlhf.engine.generation import Response
from rlhf.engine.micro_batches import keep_tokens
from rlhf.engine.roles import SharedBase
from rlhf.ppo.batch import NotFinite
from rlhf.ppo.evaluation import Evaluation, plot_frontier
from rlhf.ppo.log import Log, whole_speed
from rlhf.ppo.reward_function import RewardFunction
from rlhf.runs.checkpoints import write_run
from rlhf.runs.curves import drawing
from rlhf.runs.errors import Stopped, UserError
from rlhf.runs.metrics import read_jsonl
from rlhf.runs.processes import agree, is_main
from rlhf.runs.resume import States, states
from rlhf.runs.stop import stop_when_asked
from rlhf.runs.terminal import console

COLUMNS = ("scores", "kl", "entropy", "gold_scores", "refusal_odds", "overrefusal_odds")


@dataclass(frozen=True)
class Best:
    """The policy that the gold model has scored highest so far."""

    update: int
    gold_score: float  # mean over the prompts
    weights: dict[str, Tensor]  # all that are trained, on the CPU


def inputs_of(
    runs: dict[str, dict[str, Any]],
    function: RewardFunction | None,
    prompts: tuple[list[list[int]], ...],
    dtype: torch.dtype,
) -> dict[str, Any]:
    """What a run starts from, by name; it resumes only from the same.

    Args:
        runs: the run.json of the SFT, the reward and the gold checkpoint, by role.
        prompts: the training prompts, the held-out ones, and those set apart, if there are any.
    """
    inputs = {
        "dtype": str(dtype),
        "prompts": hashlib.sha256(json.dumps(prompts).encode()).hexdigest(),
        **{f"{role} checkpoint": run["adapter_sha256"] for role, run in runs.items()},
    }
    return inputs | ({"reward function's file": function.sha256} if function else {})


class State:
    """A run's last whole update. As a context it restores an earlier run's, and hears signals."""

    def __init__(
        self,
        states: States,
        kl_coef: float,
        shared: SharedBase,
        optimizer: Optimizer,
        scaler: GradScaler,
        log: Log,
    ):
        self.states = states
        self.shared = shared
        self.optimizer = optimizer
        self.scaler = scaler
        self.log = log
        self.update = 0
        self.kl_coef = kl_coef
        self.sft: Evaluation | None = None  # SFT's, of the prompts that every evaluation uses
        self.held_out: Evaluation | None = None  # SFT's, of the held-out prompts
        self.best: Best | None = None  # with `--keep best`
        self.moved = False  # whether an optimizer step was made since
        optimizer.register_step_post_hook(self._note_step)

    def _note_step(self, *_: Any) -> None:
        self.moved = True

    def __enter__(self) -> "State":
        state, facts = self.states.newest()
        if state:
            self.restore(state, facts)
        else:
            self.log.rewind(0, 0)
            if self.states.flags["resume"]:
                console.print("There is no state to resume from: the run starts at the beginning.")
        self.saved = self.update
        self.listening = stop_when_asked()
        self.listening.__enter__()
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.listening.__exit__(None, None, None)
        if kind is Stopped and self.update > self.saved and not self.moved:
            self.save()
        if kind is NotFinite:
            state = next(iter(states(self.states.folder)), "none")
            raise NotFinite(
                f"update {self.update + 1}: {error}; the last good state is {state}"
            ) from None

    def done(self, update: int, kl_coef: float) -> None:
        """Note that an update is complete; save a state if one is due."""
        self.update = update
        self.kl_coef = kl_coef
        self.moved = False
        self.positions = self.log.positions()
        if update < self.log.total and agree(self.states.clock.due(update)):
            self.save()

    def keep_if_best(self, update: int, look: Evaluation) -> None:
        """Keep the weights as they are now if they got the gold model's highest score so far."""
        gold_score = look.gold_scores.mean().item()
        if self.best is None or gold_score > self.best.gold_score:
            weights = self.shared.trained_weights()
            copies = {name: weight.cpu().clone() for name, weight in weights.items()}
            self.best = Best(update, gold_score, copies)

    def restore_best(self) -> str:
        """Put the best weights back. Returns a line that says which they are."""
        self.shared.load_trained(self.best.weights)
        return (
            f"Keeping the policy of update {self.best.update} of {self.log.total}: the "
            f"gold model's mean score, {self.best.gold_score:.2f}, was highest there, on prompts "
            "set apart from the train split."
        )

    def facts_of_best(self) -> dict[str, Any]:
        """What run.json says of the best policy."""
        if self.best is None:
            return {}
        return {"kept": {"update": self.best.update, "gold_score": self.best.gold_score}}

    def save(self) -> None:
        facts = {
            "update": self.update,
            "kl_coef": self.kl_coef,
            "scaler": self.scaler.state_dict(),
            "micro_batch_tokens": self.shared.micro_batch.tokens,
            "rollout_rows": self.shared.rollout_rows,
            "positions": self.positions,
            "sft": to_json(self.sft),
        }
        if self.held_out is not self.sft:
            facts["held_out"] = to_json(self.held_out)
        if self.best:
            facts["best"] = {"update": self.best.update, "gold_score": self.best.gold_score}
        with self.states.new(self.update, facts) as folder:
            if is_main():
                save_file(self.shared.trained_weights(), folder / "weights.safetensors")
                save_file(optimizer_tensors(self.optimizer), folder / "optimizer.safetensors")
                if self.best:
                    save_file(self.best.weights, folder / "best.safetensors")
        self.saved = self.update

    def restore(self, folder: Path, facts: dict[str, Any]) -> None:
        if facts["update"] >= self.log.total:
            raise UserError(
                f"--resume: the run in {self.states.folder} has made {facts['update']} updates: "
                "raise --total-episodes or --max-steps"
            )
        flags = self.states.flags
        self.shared.load_trained(load_file(folder / "weights.safetensors"))
        load_optimizer(self.optimizer, load_file(folder / "optimizer.safetensors"))
        self.scaler.load_state_dict(facts["scaler"])
        before = facts["micro_batch_tokens"]
        keep_tokens(self.shared.micro_batch, flags["micro_batch_tokens"], before)
        before = facts["hyperparameters"]["rollout_batch_size"]
        if flags["rollout_batch_size"] in ("auto", before):  # fewer, if memory ran out
            self.shared.rollout_rows = facts["rollout_rows"]
        self.update = facts["update"]
        self.kl_coef = facts["kl_coef"]
        self.positions = facts["positions"]
        self.sft = from_json(facts["sft"])
        self.held_out = from_json(facts["held_out"]) if "held_out" in facts else self.sft
        if "best" in facts:
            self.best = Best(**facts["best"], weights=load_file(folder / "best.safetensors"))
        self.log.rewind(*self.positions, self.sft, self.update)


def to_json(look: Evaluation) -> dict[str, Any]:
    return {
        "responses": [[r.ids, r.text_ids, r.ended_by] for r in look.responses],
        "texts": look.texts,
        **{name: to_list(getattr(look, name)) for name in COLUMNS},
    }


def from_json(look: dict[str, Any]) -> Evaluation:
    # States of earlier versions do not have all of them.
    columns = {name: torch.tensor(look[name]) for name in COLUMNS if look.get(name) is not None}
    responses = [Response(*response) for response in look["responses"]]
    return Evaluation(responses, look["texts"], **columns)


def to_list(tensor: Tensor | None) -> list[float] | None:
    return None if tensor is None else tensor.tolist()


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All of an AdamW's state: `group.parameter.name`."""
    return {
        f"{g}.{p}.{name}": value
        for g, group in enumerate(optimizer.param_groups)
        for p, parameter in enumerate(group["params"])
        for name, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` took."""
    for key, value in tensors.items():
        group, number, name = key.split(".")
        parameter = optimizer.param_groups[int(group)]["params"][int(number)]
        # The step goes to the device too, where a fused AdamW keeps it. It is a copy because what
        # was read may be a view of the file.
        optimizer.state[parameter][name] = value.to(parameter.device, copy=True)


def save(
    folder: Path,
    hyperparameters: dict[str, Any],
    shared: SharedBase,
    prompt_format: PromptFormat,
    base: dict[str, Any],
    runs: dict[str, dict[str, Any]],
    started: float,
    log: Log,
    **facts: Any,
) -> None:
    """What a finished run leaves: policy and value model as PEFT adapters, plots, run.json last.

    Args:
        runs: the run.json of the SFT, the reward and the gold checkpoint, by role.
        facts: what else `write_run` takes.
    """
    if not is_main():
        return
    log.curves.draw()
    with drawing(folder / "frontier.png") as partial:
        plot_frontier(folder, partial)
    save_stacked(folder, shared, "policy", prompt_format, base)
    save_stacked(folder / "value", shared, "value", prompt_format, base)
    write_run(
        folder,
        "ppo",
        hyperparameters,
        shared.dtype,
        started,
        base=base,
        prompt_format=prompt_format.name,
        parents={role: run["adapter_sha256"] for role, run in runs.items()},
        data=facts_of_source(hyperparameters["dataset"], hyperparameters["columns"]),
        updates=log.total,
        episodes=log.total * hyperparameters["episodes_per_update"],
        micro_batch_tokens=shared.micro_batch.tokens,
        rollout_rows=shared.rollout_rows,
        rollout_weights=shared.rollout_weights,
        speed=whole_speed(read_jsonl(folder / "metrics.jsonl")),
        **facts,
    )
