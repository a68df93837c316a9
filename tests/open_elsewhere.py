"""Have transformers 4.57, which servers of 2025 and 2026 are built on, open what the scripts make.

    make open-elsewhere

1. Install it into a folder of its own (work/transformers-4.57; another with --libraries), without
   touching .venv.
2. Make a tiny base with Llama 3.2's position embedding, an SFT, a reward and a PPO checkpoint on
   it, and an export.
3. Let it open each of them with PEFT's and its own Auto classes, and compare logits, scores and
   token ids with ours.
4. Merge both adapters as llama.cpp does, by one alpha over the rank of each tensor, and compare the
   logits.

Everything is in float32 and must agree to 1e-4.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from conftest import ROOT, make_model, read_demo, run_main, write_jsonl

from benchmarks.install import install

WANTED = ("transformers==4.57.1", "tokenizers==0.22.1", "huggingface_hub==0.35.3")
ROPE = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPE |= {"original_max_position_embeddings": 64}  # 8192 in Llama 3.2, whose texts are longer
TEXT = (
    "\n\nHuman: Why is the sky blue?\n\nAssistant: Light is scattered by the air, and blue light "
    "most of all. " * 6
)
TOLERANCE = 1e-4
SMALL = (
    "--dtype fp32 --max-steps 4 --max-length 256 --lora-rank 4 --lora-alpha 8 --batch-size 4 "
    "--learning-rate 1e-2"
)
BASE = "--base-model base --no-load-in-4bit --output-dir sft"
PPO = (
    "--dtype fp32 --response-length 8 --max-prompt-length 64 --episodes-per-update 4 "
    "--num-mini-batches 2"
)
PPO += (
    " --total-episodes 12 --rollout-batch-size 4 --max-eval-samples 3 --lora-rank 4 --lora-alpha 8 "
    "--role-layers 2"
)
PPO += " --learning-rate 1e-2 --warmup-updates 0 --critic-warmup-updates 0"

ELSEWHERE = """
import json, sys
sys.path.insert(0, sys.argv[1])
import torch, transformers
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification
from transformers import AutoModelForCausalLM, AutoTokenizer

text, ids, found = sys.argv[2], None, {"version": transformers.__version__}
for name, opened in {
    "exported": AutoModelForCausalLM,
    "sft": AutoPeftModelForCausalLM,
    "ppo": AutoPeftModelForCausalLM,
    "reward": AutoPeftModelForSequenceClassification,
    "ppo/value": AutoPeftModelForSequenceClassification,
}.items():
    tokenizer = AutoTokenizer.from_pretrained(name)
    ids = tokenizer(text)["input_ids"]
    head = {"num_labels": 1, "pad_token_id": tokenizer.pad_token_id}
    more = {} if "Causal" in opened.__name__ else head
    model = opened.from_pretrained(name, dtype=torch.float32, **more).eval()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0]
    found[name] = {"ids": ids, "numbers": logits.flatten().tolist()}
json.dump(found, open("elsewhere.json", "w"))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--libraries", type=Path, default=ROOT / "work" / "transformers-4.57")
    libraries = parser.parse_args().libraries.resolve()
    if not (libraries / "transformers").is_dir():
        problem = install(libraries, *WANTED)
        if problem:
            sys.exit(f"{' '.join(WANTED)} cannot be installed into {libraries}: {problem}")
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        make_all()
        command = [sys.executable, "-c", ELSEWHERE, str(libraries), TEXT]
        subprocess.run(
            command,
            check=True,
            env={**os.environ, "PYTHONPATH": "", "TRANSFORMERS_VERBOSITY": "error"},
        )
        theirs = json.loads(Path("elsewhere.json").read_text())
        print(f"transformers {theirs.pop('version')}")
        differences = compare(theirs)
        os.chdir(ROOT)
    sys.exit(0 if max(differences) <= TOLERANCE else "something opens elsewhere as another model")


def make_all() -> None:
    """The checkpoints sft, reward and ppo, and the export of ppo."""
    base = make_model(Path("base"))
    config = json.loads((base / "config.json").read_text())
    del config["rope_parameters"]  # as Llama 3.2's own config.json writes it
    (base / "config.json").write_text(
        json.dumps(config | {"rope_theta": 500000.0, "rope_scaling": ROPE})
    )
    Path("data").mkdir()
    for split, rows in (("train", 24), ("test", 8)):
        write_jsonl(Path("data") / f"{split}.jsonl", read_demo(split)[:rows])
    data = ["--dataset", "data"]
    reward = ["--reward-checkpoint", "reward"]
    sft = ["--sft-checkpoint", "sft"]
    small = [*SMALL.split(), *data]
    for script, argv in (
        ("sft_train", [*small, *BASE.split()]),
        ("reward_train", [*small, *sft, "--role-layers", "2", "--output-dir", "reward"]),
        ("ppo_train", [*PPO.split(), *data, *sft, *reward, "--output-dir", "ppo"]),
        ("rlhf.export", ["ppo", "exported", "--dtype", "fp32"]),
    ):
        result = run_main(script, argv, seconds=300)
        if result.returncode:
            sys.exit(result.stderr)


def compare(theirs: dict) -> list[float]:
    """Largest differences between what we compute and what they do; each is printed."""
    import torch
    from safetensors.torch import load_file

    from rlhf.engine.adapters import read_stacked
    from rlhf.engine.decoder import lay_out
    from rlhf.engine.loading import load_base
    from rlhf.engine.roles import SharedBase
    from rlhf.engine.tokenizers import load_tokenizer

    ids = load_tokenizer("sft")(TEXT)["input_ids"]
    base = json.loads(Path("sft/run.json").read_text())["base"]
    shared = SharedBase(load_base(base, torch.float32, 0), "sft", torch.float32)
    for role, folder in (("policy", "ppo"), ("reward", "reward"), ("value", "ppo/value")):
        shared.add_role(role, **read_stacked(folder, shared))
    texts = lay_out([ids], shared.device)
    ours = {}
    with torch.no_grad():
        for name, role in {"sft": "reference", "ppo": "policy", "exported": "policy"}.items():
            ours[name] = shared.upper(shared.lower(texts), texts, role) @ shared.lm_head_weight().T
        for name, role in {"reward": "reward", "ppo/value": "value"}.items():
            ours[name] = shared.read_head(texts, role)
    differences = []

    def report(what: str, numbers: torch.Tensor, name: str) -> None:
        differences.append((numbers - ours[name].flatten()).abs().max().item())
        print(
            f"{what}: off by {differences[-1]:.1e} at most, of numbers up to "
            f"{ours[name].abs().max():.1f}"
        )

    for name, found in theirs.items():
        if found["ids"] != ids:
            sys.exit(f"{name}: its tokenizer gives other ids")
        report(name, torch.tensor(found["numbers"]), name)
    for name in ("sft", "ppo"):
        config = json.loads(Path(name, "adapter_config.json").read_text())
        weights = load_file(Path(name, "adapter_model.safetensors"))
        model = load_base(base, torch.float32, 0)
        for key, a in weights.items():
            if "lora_A" in key:
                b = weights[key.replace("lora_A", "lora_B")]
                merged = model.get_parameter(
                    key.removeprefix("base_model.model.").replace("lora_A.", "")
                )
                merged.data += config["lora_alpha"] / len(a) * b @ a
        with torch.no_grad():
            report(
                f"{name} by llama.cpp's rule",
                model(input_ids=torch.tensor([ids])).logits.flatten(),
                name,
            )
    return differences


if __name__ == "__main__":
    main()
