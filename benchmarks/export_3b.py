"""What rlhf.export holds and how long it takes, on a checkpoint of Llama-3.2-3B's shape, on a CPU.

    make bench-export

Takes the random 16-bit model of llama_3b.py (6.4 GB in runs/llama-3b, made if it is not there),
puts a random adapter beside it as ppo_train.py's defaults make it (rank 16 on all layers, 32 on the
upper 14, base in NF4), and exports it in a process of its own. Memory is the largest resident set
that the kernel saw of that process, less that of one that only imports rlhf.export. The base's
files are mapped while a layer is read, so their pages count while they are mapped.
"""

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from rlhf.runs.cli import run

WORK = ROOT / "runs" / "llama-3b"
UPPER = 14  # layers that a role's adapter is on
RANK = 16


@dataclass(frozen=True)
class Config:
    tokenizer: str = "models/SmolLM2-135M-Instruct"  # any will do: weights are random
    output: str = "benchmarks/results/export_3b.json"


def main(config: Config) -> None:
    (ROOT / config.output).parent.mkdir(parents=True, exist_ok=True)
    process = multiprocessing.get_context("spawn").Process(
        target=make_checkpoint, args=(config.tokenizer,)
    )
    process.start()
    process.join()
    if process.exitcode:
        sys.exit(process.exitcode)
    interpreter, *_ = measure("-c", "import rlhf.export")
    exporting, seconds, cpu_seconds = measure(
        "-m", "rlhf.export", str(WORK / "random"), str(WORK / "exported"), "--overwrite"
    )
    result = {
        "interpreter_gb": interpreter,
        "export_gb": exporting,
        "above_interpreter_gb": exporting - interpreter,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "export.json": json.loads((WORK / "exported" / "export.json").read_text()),
    }
    shutil.rmtree(WORK / "exported")
    (ROOT / config.output).write_text(json.dumps(result, indent=2) + "\n")
    print(
        f"rlhf.export of Llama-3.2-3B's shape: {seconds:.0f} s ({cpu_seconds:.0f} of a core), "
        f"{exporting:.2f} GB at its peak, {exporting - interpreter:.2f} GB above the "
        f"{interpreter:.2f} GB of an interpreter that imports it"
    )


def measure(*arguments: str) -> tuple[float, float, float]:
    """Run Python with `arguments`: its largest resident set in GB, wall seconds and core seconds.

    A child's count begins at its parent's size, so this process imports little.
    """
    started = time.monotonic()
    process = subprocess.Popen([sys.executable, *arguments], cwd=ROOT)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(os.waitstatus_to_exitcode(status))
    # In bytes on macOS, in KiB on Linux.
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
    return peak, time.monotonic() - started, usage.ru_utime + usage.ru_stime


def make_checkpoint(tokenizer: str) -> None:
    """A PPO checkpoint of `ppo_train.py`'s default shapes: a random adapter on an NF4 base."""
    import torch
    from llama_3b import LLAMA_3B, write_model
    from peft import LoraConfig
    from safetensors.torch import save_file
    from torch import nn
    from transformers import LlamaForCausalLM

    from ppo_train import Config as PPOConfig
    from rlhf.data.format import PromptFormat
    from rlhf.engine.base import base_facts
    from rlhf.engine.tokenizers import load_tokenizer
    from rlhf.runs.checkpoints import write_run
    from rlhf.runs.trained_prompts import prompt_hashes

    write_model(WORK / "model", tokenizer)
    folder = WORK / "random"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    upper = range(LLAMA_3B.num_hidden_layers - UPPER, LLAMA_3B.num_hidden_layers)
    with torch.device("meta"):
        modules = LlamaForCausalLM(LLAMA_3B).named_modules()
    torch.manual_seed(0)
    state = {}
    names = set()
    for name, module in modules:
        if isinstance(module, nn.Linear) and ".layers." in name:
            rank = RANK * (1 + (int(name.split(".")[2]) in upper))
            state[f"base_model.model.{name}.lora_A.weight"] = (
                torch.randn(rank, module.in_features) * 0.02
            )
            state[f"base_model.model.{name}.lora_B.weight"] = (
                torch.randn(module.out_features, rank) * 0.01
            )
            names.add(name.rpartition(".")[2])
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    pattern = {rf"layers\.({'|'.join(map(str, upper))})\..*": 2 * RANK}
    lora = LoraConfig(
        r=RANK,
        lora_alpha=RANK,
        rank_pattern=pattern,
        alpha_pattern=pattern,
        target_modules=sorted(names),
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(WORK / "model"),
    )
    lora.save_pretrained(str(folder))
    prompt_format = PromptFormat("hh", load_tokenizer(tokenizer))
    prompt_format.tokenizer.save_pretrained(folder)
    base = base_facts(str(WORK / "model"), None, load_in_4bit=True)
    flags = asdict(PPOConfig(output_dir=str(folder)))
    write_run(
        folder,
        "ppo",
        flags,
        torch.bfloat16,
        time.monotonic(),
        prompt_hashes(()),
        base=base,
        prompt_format=prompt_format.name,
    )


if __name__ == "__main__":
    run(main, Config, {}, __doc__)
