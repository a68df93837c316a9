"""The models in a comparison (base, SFT and PPO, on one loaded base) and their answers."""

import math
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from rlhf.data.format import PromptFormat
from rlhf.engine.adapters import read_stacked
from rlhf.engine.base import check_context
from rlhf.engine.generation import generate
from rlhf.engine.roles import BASE, REFERENCE, SharedBase
from rlhf.runs.checkpoints import SCRIPTS, check_child, read_run
from rlhf.runs.errors import UserError

Turns = tuple[tuple[str, str], ...]  # (role, text)
# text, tokens, ended_by (a key of ENDINGS), score (None without a reward model).
Answer = dict[str, Any]
# What compare.json holds; the terminal and the other files show parts of it.
Report = dict[str, Any]


def read_runs(folders: dict[str, str]) -> dict[str, dict[str, Any]]:
    """The run.json of each phase that has been trained, by phase.

    Args:
        folders: of the SFT, reward and PPO checkpoints, by phase; only SFT's has to exist.
    Raises:
        UserError: a checkpoint is damaged, or they do not fit together.
    """
    runs = {"sft": read_run(folders["sft"], "sft")}
    check_number(runs["sft"], "epochs")
    lost = {"reward": "there are no scores and no win rates", "ppo": "PPO is left out"}
    for phase in ("reward", "ppo"):
        folder = folders[phase]
        if not Path(folder).exists():
            makes = f"`python {SCRIPTS[phase]}` makes one"
            print(f"There is no {phase} checkpoint at {folder}: {lost[phase]} ({makes}).")
            continue
        runs[phase] = read_run(folder, phase)
        check_child(runs[phase], folder, runs["sft"], folders["sft"])
    if "ppo" in runs:
        check_number(runs["ppo"], "updates")
    return runs


def check_number(facts: Any, name: str) -> None:
    """Raise UserError unless a run.json, which may have been edited, has a number `name`."""
    if not isinstance(facts, dict) or not isinstance(facts.get(name), int | float):
        raise UserError(f"a run.json is damaged ({name} is not a number): train that phase again")


def load_models(
    model: PreTrainedModel,
    folders: dict[str, str],
    runs: dict[str, dict[str, Any]],
    dtype: torch.dtype,
) -> SharedBase:
    """The base with the adapters of all phases in `runs`; folders by phase."""
    shared = SharedBase(model, folders["sft"], dtype)
    for phase, role in (("ppo", "policy"), ("reward", "reward")):
        if phase in runs:
            shared.add_role(role, **read_stacked(folders[phase], shared))
            if (role in shared.heads) != (role == "reward"):
                raise UserError(
                    f"{folders[phase]} is not what its run.json says: train that phase again"
                )
    return shared


def check_lengths(base: dict[str, Any], prompts: list[list[int]], max_new_tokens: int) -> None:
    """Raise UserError if a prompt with its answer and EOS is longer than the base can read."""
    longest = max(map(len, prompts)) + max_new_tokens + 1
    check_context(base, longest, "--max-prompt-length", "--max-new-tokens")


def role_of(name: str) -> str:
    """The role of a model, by its name in the report."""
    return {"base": BASE, "PPO": "policy"}.get(name, REFERENCE)


def answers_of(
    shared: SharedBase,
    prompt_format: PromptFormat,
    prompts: list[list[int]],
    name: str,
    scored: bool,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    batch_size: int,
) -> list[Answer]:
    """A model's answers.

    Args:
        prompts: token ids.
        name: of the model, as in the report.
        scored: whether the reward model scores the answers.
    Raises:
        UserError: a score is not finite.
    """
    seeds = [seed + i for i in range(len(prompts))]
    sampling = max_new_tokens, temperature, seeds, batch_size
    responses = generate(shared, role_of(name), prompt_format, prompts, *sampling)
    scores = [None] * len(prompts)
    if scored:
        eos = [prompt_format.eos_token_id]
        texts = [p + r.text_ids + eos for p, r in zip(prompts, responses, strict=True)]
        scores = shared.score(texts).tolist()
        if not all(map(math.isfinite, scores)):
            raise UserError(
                f"the reward model gives {name} a score that is not finite: try --dtype fp32"
            )
    return [
        {
            "text": prompt_format.decode(response.text_ids),
            "tokens": len(response.text_ids),
            "ended_by": response.ended_by,
            "score": score,
        }
        for response, score in zip(responses, scores, strict=True)
    ]
