"""Chat in the terminal with any checkpoint, as it was trained: no export, no server.

    python -m rlhf.chat checkpoints/ppo
    python -m rlhf.chat checkpoints/sft --reward-checkpoint checkpoints/reward
    python -m rlhf.chat --base-model models/SmolLM2-135M-Instruct

An answer appears as it is sampled; Ctrl-C stops it. `/help` lists the commands.
"""

import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from rlhf.data.format import PromptFormat, tokenize_prompt
from rlhf.data.rows import BadRow, checked_turns
from rlhf.data.template import is_hh_template
from rlhf.engine.adapters import read_stacked
from rlhf.engine.base import base_facts, check_context, same_base
from rlhf.engine.generation import start, stream
from rlhf.engine.loading import load_base
from rlhf.engine.roles import BASE, REFERENCE, SharedBase
from rlhf.engine.tokenizers import load_format, load_tokenizer
from rlhf.runs.checkpoints import check_child, read_run
from rlhf.runs.checks import check_numbers
from rlhf.runs.cli import run
from rlhf.runs.device import choose_dtype, device
from rlhf.runs.errors import UserError
from rlhf.runs.terminal import plain

HELP = """\
/base /sft /ppo  who answers from now on
/score           the reward model's score of the last answer
/reset           begin a new dialogue
/help            this
/quit, Ctrl-D    end
Ctrl-C           stop an answer"""
ROLES = {"base": BASE, "sft": REFERENCE, "ppo": "policy"}
PHASES = ("sft", "reward", "ppo")

Runs = dict[str, dict[str, Any]]  # run.json by phase
Turns = list[tuple[str, str]]  # (role, text)


@dataclass(frozen=True)
class Config:
    # of any phase; None: checkpoints/ppo, or with --base-model the base alone
    checkpoint: Positional[str | None] = None
    base_model: str | None = None  # where the base is now, if it was moved
    # where the SFT checkpoint is now, if it was moved
    sft_checkpoint: str | None = None
    # for /score; None: the one that the policy was trained against
    reward_checkpoint: str | None = None
    load_in_4bit: bool = True  # only for a base alone
    # only for a base alone; None: its chat template, or hh if it has none
    prompt_format: Literal["hh", "model"] | None = None
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"  # what the base computes in

    max_prompt_length: int = 384  # tokens; a longer dialogue loses its oldest turns, as in training
    max_new_tokens: int = 128  # most tokens of an answer
    temperature: float = 0.7  # 0: greedy
    seed: int = 0  # of the draws


def main(config: Config) -> None:
    check_numbers(vars(config))
    shared, prompt_format, names = open_checkpoint(config)
    print(f"{', '.join(names)} can answer; {names[-1]} answers now. /help lists the commands.")
    chat = Chat(config, shared, prompt_format, names)
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  arrow keys and history
    while True:
        try:
            line = input("> ").strip()
            if line == "/quit":
                break
            if line.startswith("/"):
                print(chat.command(line))
            elif line:
                chat.answer(line)
        except EOFError:
            print()
            break
        except KeyboardInterrupt:
            print("\nCtrl-C stops an answer; /quit or Ctrl-D ends the chat.")


# ---------------------------------------------------------------- what answers


def open_checkpoint(config: Config) -> tuple[SharedBase, PromptFormat, list[str]]:
    """The shared base with its adapters, the prompt format, and the models that can answer.

    The last of them answers first.
    """
    dtype = choose_dtype(config.dtype, device())
    if config.checkpoint is None and config.base_model:
        base = base_facts(config.base_model, None, config.load_in_4bit)
        tokenizer = load_tokenizer(base["model"], base["revision"])
        own = tokenizer.chat_template and not is_hh_template(tokenizer.chat_template)
        prompt_format = PromptFormat(config.prompt_format or ("model" if own else "hh"), tokenizer)
        runs = {}
        folders = {}
    else:
        runs, folders = read_runs(config)
        base = same_base(runs["sft"], folders["sft"], config.base_model)
        prompt_format = load_format(folders["sft"], runs["sft"])
    check_context(
        base,
        config.max_prompt_length + config.max_new_tokens,
        "--max-prompt-length",
        "--max-new-tokens",
    )
    prompt_format.check()
    shared = SharedBase(
        load_base(base, dtype, prompt_format.pad_token_id), folders.get("sft"), dtype
    )
    for phase, role in (("ppo", "policy"), ("reward", "reward")):
        if phase in runs:
            shared.add_role(role, **read_stacked(folders[phase], shared))
            if (role in shared.heads) != (role == "reward"):
                raise UserError(
                    f"{folders[phase]} is not what its run.json says: train that phase again"
                )
    return shared, prompt_format, ["base", *(name for name in ("sft", "ppo") if name in runs)]


def read_runs(config: Config) -> tuple[Runs, dict[str, str]]:
    """The run.json and the folder of the checkpoint and of its parents, by phase."""
    checkpoint = config.checkpoint or "checkpoints/ppo"
    phase = phase_of(checkpoint)
    runs = {phase: read_run(checkpoint, phase, "the first argument")}
    made_with = runs[phase]["hyperparameters"]
    folders = {phase: checkpoint}
    if phase != "sft":
        folders["sft"] = config.sft_checkpoint or str(made_with.get("sft_checkpoint"))
        runs["sft"] = read_run(folders["sft"], "sft")
        check_child(runs[phase], checkpoint, runs["sft"], folders["sft"])
    reward = config.reward_checkpoint or made_with.get("reward_checkpoint")
    if phase != "reward" and reward and (config.reward_checkpoint or Path(reward).exists()):
        folders["reward"] = reward
        runs["reward"] = read_run(reward, "reward")
        check_child(runs["reward"], reward, runs["sft"], folders["sft"])
        trained_against = runs[phase].get("parents", {}).get("reward")
        other = trained_against not in (None, runs["reward"]["adapter_sha256"])
        if other and not config.reward_checkpoint:
            print(f"{reward} is not what the policy was trained against any more: no /score.")
            del runs["reward"], folders["reward"]
    return runs, folders


def phase_of(checkpoint: str) -> str:
    """The phase in a checkpoint's run.json; "ppo" if that cannot be read."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
        phase = json.loads((Path(checkpoint) / "run.json").read_text(encoding="utf-8"))["phase"]
        if phase in PHASES:
            return phase
    return "ppo"


# ---------------------------------------------------------------- the dialogue


class Chat:
    """A dialogue with one of the models; another may take over between turns."""

    def __init__(
        self, config: Config, shared: SharedBase, prompt_format: PromptFormat, names: list[str]
    ):
        self.config = config
        self.shared = shared
        self.prompt_format = prompt_format
        self.names = names
        self.name = names[-1]  # who answers
        self.turns: Turns = []
        self.answers = 0
        # Token ids of the last prompt, its answer and EOS.
        self.last: list[int] | None = None

    def command(self, line: str) -> str:
        """Run a line that begins with a slash. Returns what to print."""
        if line == "/reset":
            self.turns = []
            self.last = None
            return "A new dialogue."
        if line == "/score":
            return self.score()
        if line[1:] in ROLES:
            if line[1:] not in self.names:
                return f"There is no {line[1:]} here, only {', '.join(self.names)}."
            self.name = line[1:]
            return f"{self.name} answers from now on."
        return HELP

    def score(self) -> str:
        if "reward" not in self.shared.heads:
            return "There is no reward model here: name one with --reward-checkpoint."
        if self.last is None:
            return "There is no answer to score."
        return f"{self.shared.score([self.last]).item():.2f}"

    def answer(self, text: str) -> None:
        """Print the answer to the user's turn as it is sampled. Ctrl-C stops it."""
        try:
            turns = checked_turns([*self.turns, ("user", text)])
            prompt = tokenize_prompt(turns, self.prompt_format, self.config.max_prompt_length)
        except BadRow as reason:
            print(f"This cannot be asked: {reason}. /reset starts over.")
            return
        self.last = None
        shown = ""
        ids: list[int] = []
        try:
            for ids, shown in self.sample(prompt):  # noqa: B007
                pass
        except KeyboardInterrupt:
            print(" (stopped)", end="")
        finally:
            self.shared.graphs.clear()
        print()
        if shown:
            self.turns = [*turns, ("assistant", shown)]
            self.last = [*prompt, *ids, self.prompt_format.eos_token_id]
        else:
            print("The answer is empty: your turn is left out of the dialogue.")

    def sample(self, prompt: list[int]) -> Iterator[tuple[list[int], str]]:
        """Yield the answer so far, after each token, as token ids and as the text printed.

        The last text is the whole answer's, as `generate` gives it.
        """
        self.answers += 1
        seed = self.config.seed, 5, self.answers
        settings = self.config.max_new_tokens, self.config.temperature
        decoding = start(self.shared, ROLES[self.name], [prompt], [seed], *settings)
        ids: list[int] = []
        shown = ""
        for _, token, response in stream(decoding, self.prompt_format):
            ids = response.text_ids if response else [*ids, token]
            text = self.prompt_format.decode(ids)
            text = text if response else settled(text, self.prompt_format.stop_text)
            # Later tokens may change how earlier ones are decoded.
            if response and not text.startswith(shown):
                sys.stdout.write("\n")  # and the whole answer once more
                shown = ""
            if text.startswith(shown):
                sys.stdout.write(plain(text[len(shown) :]))
                sys.stdout.flush()
                shown = text
            yield ids, shown


def settled(text: str, stop_text: str | None) -> str:
    """As much of a text as later tokens cannot change.

    That excludes a part of a character, for which some tokenizers write a U+FFFD per byte, and what
    may be the beginning of the next turn.
    """
    text = text.rstrip("\ufffd")
    for length in range(len(stop_text or ""), 0, -1):
        if text.endswith(stop_text[:length]):
            return text[:-length].rstrip()
    return text.rstrip()


if __name__ == "__main__":
    run(main, Config, {}, __doc__)
