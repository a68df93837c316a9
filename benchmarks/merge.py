"""Does an exported model say what base and adapter say, word for word? In float32.

    make bench-merge

Merges the checkpoint with `rlhf.export --dtype fp32` into a folder that goes again, and lets both
answer test prompts greedily: base and adapter by PEFT, the merge by Transformers. Prints how many
answers are the same, token by token, and the largest difference of their logits along the way.
"""

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import rlhf  # noqa: F401  before the libraries that it sets up
from rlhf import export

import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM

from rlhf.data.sources import load_pairs
from rlhf.engine.tokenizers import load_format
from rlhf.runs.checkpoints import read_run
from rlhf.runs.cli import run
from rlhf.runs.errors import UserError


@dataclass(frozen=True)
class Config:
    checkpoint: str = "runs/demo/ppo"  # of ppo_train.py, or of sft_train.py
    dataset: str = "demo/data"  # its test prompts are asked
    prompts: int = 20
    tokens: int = 64  # of each answer; none ends before


@torch.no_grad()
def main(config: Config) -> None:
    prompt_format = load_format(
        config.checkpoint, read_run(config.checkpoint, export.phase_of(config.checkpoint))
    )
    turns = list(dict.fromkeys(pair.turns for pair in load_pairs(config.dataset, "test")))[
        : config.prompts
    ]
    with tempfile.TemporaryDirectory() as folder:
        export.main(export.Config(config.checkpoint, folder, dtype="fp32", overwrite=True))
        merged = AutoModelForCausalLM.from_pretrained(folder)
        beside = AutoPeftModelForCausalLM.from_pretrained(config.checkpoint, dtype=torch.float32)
        same = 0
        largest = 0.0
        for turn in turns:
            ids = torch.tensor([prompt_format.prompt_ids(turn)])
            answers = [
                model.generate(
                    input_ids=ids,
                    do_sample=False,
                    min_new_tokens=config.tokens,
                    max_new_tokens=config.tokens,
                )
                for model in (beside, merged)
            ]
            same += torch.equal(*answers)
            logits = [model(input_ids=answers[0]).logits for model in (beside, merged)]
            largest = max(largest, (logits[0] - logits[1]).abs().max().item())
    print(
        f"{same} of {len(turns)} answers of {config.tokens} greedy tokens are the same; the "
        f"largest logit difference is {largest:.1e}"
    )
    if same < len(turns) or largest > export.ROUNDING:
        raise UserError(f"the merge of {config.checkpoint} is not its base and adapter")


if __name__ == "__main__":
    run(main, Config, {}, __doc__)
