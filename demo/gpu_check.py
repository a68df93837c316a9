"""A few steps of all four scripts with the 4-bit base on this card, one line on each.

Then tokens that are sampled from CUDA graphs are held against those of the same steps without.

    make gpu-check

Works in runs/gpu-check. Paste its last lines into a bug report. `--allow-cpu` runs the same without
a card.
"""

import dataclasses
import importlib.metadata
import json
import platform
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / "runs" / "gpu-check"
SFT, REWARD, PPO = (str(RUNS / phase) for phase in ("sft", "reward", "ppo"))
STEPS = {
    "sft_train.py": ["--output-dir", SFT, "--load-in-4bit", "--max-steps", "20"],
    "reward_train.py": [
        *["--sft-checkpoint", SFT, "--output-dir", REWARD],
        *["--max-steps", "20", "--max-eval-samples", "40"],
    ],
    "ppo_train.py": [
        *["--sft-checkpoint", SFT, "--reward-checkpoint", REWARD, "--output-dir", PPO],
        *["--max-steps", "3", "--max-eval-samples", "16"],
    ],
    "compare_outputs.py": [
        *["--sft-checkpoint", SFT, "--reward-checkpoint", REWARD, "--ppo-checkpoint", PPO],
        *["--output-dir", str(RUNS / "reports"), "--max-new-tokens", "32"],
    ],
}


def main() -> int:
    import torch

    if torch.cuda.is_available():
        capability = ".".join(map(str, torch.cuda.get_device_capability()))
        card = (
            f"{torch.cuda.get_device_name()} (compute capability {capability}), CUDA "
            f"{torch.version.cuda}"
        )
    elif "--allow-cpu" in sys.argv[1:]:
        card = "no card, on the CPU"
    else:
        print(
            "error: torch sees no CUDA card on this machine; --allow-cpu runs the check without "
            "one",
            file=sys.stderr,
        )
        return 2

    lines = []
    failed = False
    for script, flags in STEPS.items():
        started = time.monotonic()
        command = [sys.executable, str(ROOT / script), "--preset", "demo", "--overwrite", *flags]
        failed = subprocess.run(command, cwd=ROOT).returncode != 0
        took = f"{time.monotonic() - started:.0f} s"
        run_json = Path(flags[flags.index("--output-dir") + 1]) / "run.json"
        memory = (
            f", peak memory {json.loads(run_json.read_text())['peak_memory_gib']:.2f} GiB"
            if run_json.exists()
            else ""
        )
        lines.append(
            f"{'FAILED' if failed else 'passed'}  {script:<19} {took}{'' if failed else memory}"
        )
        if failed:
            break  # the later scripts need this one
    else:
        for weights, found in compare_graphs().items():
            no_graph = torch.cuda.is_available() and not found["graphs"]
            wrong = found["same"] < found["tokens"] or no_graph
            failed = failed or wrong
            how = (
                f"{found['same']} of {found['tokens']} tokens are the same from {found['graphs']} "
                "CUDA graphs"
            )
            lines.append(f"{'FAILED' if wrong else 'passed'}  decoding, {weights:<9} {how}")
    libraries = ("torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in libraries)
    print("\n" + "\n".join([*lines, card, f"Python {platform.python_version()}, {versions}"]))
    return int(failed)


def compare_graphs() -> dict[str, dict[str, int]]:
    """How many tokens agree with and without graphs, for each kind of weights of a rollout."""
    sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
    import card

    import ppo_train

    checkpoints = {"sft_checkpoint": SFT, "reward_checkpoint": REWARD}
    shared, prompt_format, _ = card.open_policy(
        {"ppo": dataclasses.replace(ppo_train.PRESETS["demo"], **checkpoints)}
    )
    shared.merge("policy")
    through = {"base": shared.decoder.layers, "merged": shared.merged.layers}
    return {
        weights: card.compare_graph(shared, prompt_format, layers, rows=8)
        for weights, layers in through.items()
    }


if __name__ == "__main__":
    sys.exit(main())
