"""What a CUDA card makes of the three phases and of decoding, beside TRL, and whether it is right.

    make bench-card      # Llama-3.2-3B's shape, random weights, NF4: some 20 minutes on an H100
    python benchmarks/card.py --base-model meta-llama/Llama-3.2-3B
    python benchmarks/card.py --tiny      # a toy model, also on two CPU cores: does this run?

Each part is a process of its own, so that one can fail without the others:

- `phases` runs the three scripts at `auto`, on the whole card and under caps of 8, 12 and 24 GB;
- `decode` times a step at 16 to 256 rows, beside the bandwidth measured here;
- `checks` compares decoding from graphs with the same step uncaptured, trains a policy from NF4 and
  16-bit bases in bf16 and fp16, and kills and resumes a run;
- `trl` runs TRL's trainers at the same settings, if they can be installed.

Random weights never say EOS, so each response has its full length. Works in runs/card. Prints what
it finds, and writes it to benchmarks/results/card_NAME.json after each part.
"""

import dataclasses
import gc
import importlib.metadata
import json
import multiprocessing
import os
import random
import signal
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import rlhf  # noqa: F401  before the libraries that it sets up

import torch
from install import install
from llama_3b import LLAMA_3B, write_model
from ppo_vs_trl import TRL
from safetensors.torch import load_file
from transformers import LlamaConfig

import ppo_train
import reward_train
import sft_train
from rlhf.engine.decoding import LAG, Decoding
from rlhf.engine.graphs import Graphs
from rlhf.engine.tokenizers import load_format
from rlhf.runs.checkpoints import git_commit, read_run
from rlhf.runs.cli import quiet_libraries, run
from rlhf.runs.device import hardware
from rlhf.runs.metrics import read_jsonl
from rlhf.runs.terminal import console

WORK = ROOT / "runs" / "card"
CAPS = (None, 8, 12, 24)  # GB; None: the whole card
ROWS = (16, 32, 64, 128, 256)
PROMPT = 384  # tokens at most
RESPONSE = 128  # tokens at most
TINY = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "head_dim": 32,
    "vocab_size": 49_152,
}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2}
WORDS = "time year people way day man thing woman life child world school"


@dataclass(frozen=True)
class Config:
    # hub id or folder; None: Llama-3.2-3B's shape with random weights
    base_model: str | None = None
    tokenizer: str = "models/SmolLM2-135M-Instruct"  # of the random weights: any will do
    tiny: bool = False  # a toy model and short runs, on a CPU too
    parts: tuple[str, ...] = ("phases", "decode", "checks", "trl")  # which to run
    # a folder with TRL 1.12.0, the last one that had PPO; installed there if it can be
    trl_1_12: str = str(TRL)
    minutes: float = 20.0  # a part is ended after so long


def main(config: Config) -> None:
    name = "tiny" if config.tiny else card_name().replace(" ", "_").replace("/", "_")
    output = ROOT / "benchmarks" / "results" / f"card_{name}.json"
    output = WORK / output.name if config.tiny else output
    WORK.mkdir(parents=True, exist_ok=True)
    prepare(config)
    libraries = ("torch", "transformers", "trl", "peft", "bitsandbytes")
    results: dict[str, Any] = {
        "card": card_name(),
        "machine": hardware(),
        "commit": git_commit(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "versions": {library: importlib.metadata.version(library) for library in libraries},
        "base": config.base_model
        or ("a toy shape" if config.tiny else "Llama-3.2-3B's shape, random weights"),
    }
    for part, label, function, *arguments in plan_of(config):
        console.print(f"{label} ...")
        found = in_a_process(function, config, arguments)
        results.setdefault(part, {})[label] = found
        output.write_text(json.dumps(results, indent=2) + "\n")
        for line in lines_of(found):
            console.print(f"  {line}")
    console.print(f"Saved {output}.")


def plan_of(config: Config) -> list[tuple]:
    """Part, label, function and its arguments, in order."""
    on_card = torch.cuda.is_available()
    # Asked without creating a CUDA context.
    total = torch.cuda.get_device_properties(0).total_memory / 1e9 if on_card else 0
    plan: list[tuple] = []
    for cap in CAPS:
        if cap is None or (cap < total and not config.tiny):
            plan.append(("phases", f"{cap or 'whole'}{' GB' if cap else ' card'}", phases, cap))
    plan.append(("decode", "decoding", decode))
    precisions = (("nf4", "bf16"), ("nf4", "fp16"), ("16 bit", "bf16"))
    for precision, dtype in (("nf4", "bf16"), ("16 bit", "fp32")) if config.tiny else precisions:
        plan.append(("checks", f"{precision} base, {dtype}", check, precision, dtype))
    plan.append(("checks", "killed and resumed", check_resume))
    plan += [("trl", f"TRL, {what}", trl, what) for what in ("sft", "reward", "ppo")]
    return [step for step in plan if step[0] in config.parts]


def in_a_process(function: Callable, config: Config, arguments: list) -> dict[str, Any]:
    """What `function` returns, or why it did not."""
    path = WORK / "part.json"
    path.unlink(missing_ok=True)
    process = multiprocessing.get_context("spawn").Process(
        target=child, args=(function, config, arguments, path)
    )
    started = time.monotonic()
    process.start()
    process.join(60 * config.minutes)
    if process.is_alive():
        try:
            os.killpg(process.pid, signal.SIGKILL)  # with what it started
        except ProcessLookupError:
            process.kill()
        process.join()
        return {"failed": f"ended after {config.minutes:g} minutes"}
    found = (
        json.loads(path.read_text())
        if path.exists()
        else {"failed": f"exit code {process.exitcode}"}
    )
    return found | {"seconds": round(time.monotonic() - started, 1)}


def child(function: Callable, config: Config, arguments: list, path: Path) -> None:
    os.setpgrp()
    quiet_libraries()
    console.quiet = True  # what the scripts say; a part's findings are printed by the parent
    try:
        found = function(config, *arguments)
    except Exception as error:
        found = {
            "failed": f"{type(error).__name__}: {str(error)[:500]}",
            "trace": traceback.format_exc()[-3000:],
        }
    path.write_text(json.dumps(found))


def lines_of(found: dict[str, Any], prefix: str = "") -> list[str]:
    """What was found, a line for each group of numbers."""
    flat = {
        name: value
        for name, value in found.items()
        if not isinstance(value, dict) and name != "trace"
    }
    said = ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in flat.items()
    )
    lines = [f"{prefix}{said}"] if said else []
    for name, value in found.items():
        if isinstance(value, dict):
            lines += lines_of(value, f"{prefix}{name}: ")
    return lines


def card_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


# ---------------------------------------------------------------- model and data


def model_of(config: Config) -> str:
    return config.base_model or str(WORK / ("tiny" if config.tiny else "llama-3b"))


def prepare(config: Config) -> None:
    """The model folder, and pairs whose lengths are about those of rm-static."""
    if not config.base_model:
        shape = LlamaConfig(**LLAMA_3B.to_dict() | TINY) if config.tiny else LLAMA_3B
        write_model(Path(model_of(config)), config.tokenizer, shape)
    choose = random.Random(0)
    words = WORDS.split()

    def text(count: int) -> str:
        return " ".join(choose.choice(words) for _ in range(count))

    def row() -> dict[str, str]:
        prompt = min(340, int(choose.lognormvariate(4.3, 0.8)) + 4)
        return {
            "prompt": f"\n\nHuman: {text(prompt)}\n\nAssistant:",
            "chosen": text(choose.randint(10, 100)),
            "rejected": text(choose.randint(10, 100)),
        }

    folder = WORK / "data"
    folder.mkdir(exist_ok=True)
    for split, count in (("train", 48 if config.tiny else 768), ("test", 8)):
        (folder / f"{split}.jsonl").write_text(
            "".join(json.dumps(row()) + "\n" for _ in range(count))
        )


# ---------------------------------------------------------------- the three phases


def settings(
    config: Config, folder: Path, four_bit: bool = True, dtype: str = "auto"
) -> dict[str, Any]:
    """The Config of each script, at its defaults but for what makes a run short."""
    short = {
        "dataset": str(WORK / "data"),
        "overwrite": True,
        "dtype": dtype,
        "max_eval_samples": 8,
    }
    sft = str(folder / "sft")
    reward = str(folder / "reward")
    layers = {"role_layers": 2} if config.tiny else {}
    steps = {"max_steps": 3 if config.tiny else 8}
    ppo = {
        "total_episodes": 3 * 64,
        "critic_warmup_updates": 0,
        "num_printed_samples": 0,
        "eval_steps": 1000,
    }
    if config.tiny:
        ppo |= {
            "total_episodes": 24,
            "episodes_per_update": 8,
            "response_length": 8,
            "max_prompt_length": 64,
        }
    return {
        "sft": replace(
            sft_train.Config(),
            base_model=model_of(config),
            load_in_4bit=four_bit,
            output_dir=sft,
            **steps,
            **short,
        ),
        "reward": replace(
            reward_train.Config(), sft_checkpoint=sft, output_dir=reward, **steps, **short, **layers
        ),
        "ppo": replace(
            ppo_train.Config(),
            sft_checkpoint=sft,
            reward_checkpoint=reward,
            output_dir=str(folder / "ppo"),
            **ppo,
            **short,
            **layers,
        ),
    }


def phases(config: Config, cap: int | None) -> dict[str, Any]:
    """Speed, memory and what `auto` took, of each phase."""
    if cap:
        torch.cuda.set_per_process_memory_fraction(cap * 1e9 / torch.cuda.mem_get_info()[1])
    folder = WORK / f"phases_{cap or 'whole'}"
    return run_phases(settings(config, folder))


def run_phases(of: dict[str, Any]) -> dict[str, Any]:
    found = {}
    for phase, script in (("sft", sft_train), ("reward", reward_train), ("ppo", ppo_train)):
        if torch.cuda.is_available():
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        script.main(of[phase])
        found[phase] = speed_of(Path(of[phase].output_dir), of[phase])
    return found


def speed_of(folder: Path, config: Any) -> dict[str, Any]:
    """Medians over the steps of a finished run, the first one left out."""
    rows = [
        row for row in read_jsonl(folder / "metrics.jsonl") if "speed/tokens_per_second" in row
    ][1:]
    names = [
        name
        for name in rows[0]
        if name.startswith(("time/", "speed/", "memory/", "policy/sampler", "policy/opt"))
    ]
    middle = {name: max if name.startswith("memory/") else statistics.median for name in names}
    found = {name: middle[name](row[name] for row in rows if name in row) for name in names}
    seconds = sum(value for name, value in found.items() if name.startswith("time/"))
    found["seconds_a_step"] = seconds
    count = getattr(config, "episodes_per_update", None) or config.batch_size
    found["rows_per_second"] = count / seconds
    facts = json.loads((folder / "run.json").read_text())
    kept = ("micro_batch_tokens", "rollout_rows", "rollout_weights", "dtype")
    return found | {name: facts[name] for name in kept if name in facts}


# ---------------------------------------------------------------- decoding


def open_policy(of: dict[str, Any]):
    """The shared base as `ppo_train.py` loads it, with a policy that is not its reference."""
    gc.collect()  # the last script's base is held by a cycle
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    config = of["ppo"]
    sft = read_run(config.sft_checkpoint, "sft")
    prompt_format = load_format(config.sft_checkpoint, sft)
    shared, _ = ppo_train.load_models(config, sft, prompt_format)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in shared.parameters("policy"):
            weight.normal_(std=0.01)
    shared.restack()
    return shared, prompt_format, config


def made_up(
    shared, layers, rows: int, prompt: int, new: int, graphs: Graphs, lag: int = LAG
) -> Decoding:
    """Rows that have read as many tokens of nothing."""
    decoding = Decoding(shared.decoder, "policy", layers, rows, prompt, new, 1.0, graphs, lag)
    decoding.lengths.fill_(prompt)
    decoding.draws.uniform_()
    return decoding


@torch.no_grad()
def decode(config: Config) -> dict[str, Any]:
    """Milliseconds a step by rows and weights, with and without graphs.

    Beside them what reading the weights' bytes alone would take.
    """
    of = settings(config, WORK / "phases_whole")
    shared, _, _ = open_policy(of)
    bandwidth = measure_bandwidth(shared.device, 1 << (22 if config.tiny else 30))
    found: dict[str, Any] = {
        "bandwidth_gb_per_second": bandwidth / 1e9,
        "launch_us": measure_launch(shared.device),
    }
    shared.merge("policy")
    prompt, new = (40, 16) if config.tiny else (PROMPT, RESPONSE)
    head = shared.lm_head_weight().nbytes
    for weights, layers in (("base", shared.decoder.layers), ("merged", shared.merged.layers)):
        size = head + sum(bytes_of(linear) for layer in layers for linear in layer.maps)
        found[weights] = {"weights_gb": size / 1e9, "weights_floor_ms": 1000 * size / bandwidth}
        for rows in (4, 8) if config.tiny else ROWS:
            try:
                timed = time_steps(shared, layers, rows, prompt, new)
                timed["floor_ms"] = 1000 * (size + timed["keys_and_values_gb"] * 1e9) / bandwidth
                found[weights][f"{rows} rows"] = timed
            except torch.OutOfMemoryError:
                found[weights][f"{rows} rows"] = "out of memory"
            shared.graphs.clear()
            gc.collect()
    return found


def time_steps(shared, layers, rows: int, prompt: int, new: int) -> dict[str, float]:
    result = {}
    on_card = shared.device.type == "cuda"
    for how, graphs in (("eager", Graphs(False)), ("graph", Graphs(on_card))):
        decoding = made_up(shared, layers, rows, prompt, new, graphs)
        for _ in range(3):
            decoding.step()
        synchronize()
        started = time.perf_counter()
        steps = 4 if how == "eager" else min(20, new - 4)
        for _ in range(steps):
            decoding.step()
        synchronize()
        result[f"{how}_ms"] = 1000 * (time.perf_counter() - started) / steps
        result["keys_and_values_gb"] = (
            sum(part.nbytes for part in decoding.keys + decoding.values) / 1e9
        )
        if how == "eager" and on_card:
            result["kernels"] = count_kernels(decoding)
        # 0 if a capture failed, and the graph's time is none
        result["graphs"] = len(graphs.captured)
        graphs.clear()
        del decoding
    result["tokens_per_second"] = 1000 * rows / result["graph_ms"]
    return result


def bytes_of(linear) -> int:
    """Of a linear map's weight, quantised or not."""
    base = getattr(linear, "linear", linear)
    if base is not linear or linear.weight is not None:
        return linear.weight.nbytes
    state = linear.quantised.state
    return linear.quantised.data.nbytes + state.absmax.nbytes


def count_kernels(decoding: Decoding) -> int:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        decoding.step()
        synchronize()
    return sum(event.count for event in profiler.key_averages() if event.self_device_time_total > 0)


def measure_bandwidth(device: torch.device, size: int) -> float:
    """Bytes a second that the memory moves in a copy, reading and writing."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(8):
        synchronize()
        started = time.perf_counter()
        target.copy_(source)
        synchronize()
        seconds.append(time.perf_counter() - started)
    return 2 * size / statistics.median(seconds)


def measure_launch(device: torch.device, count: int = 2000) -> float:
    """Microseconds of the CPU to have one small kernel start."""
    x = torch.zeros(8, device=device)
    for _ in range(count // 10):
        x.add_(1)
    synchronize()
    started = time.perf_counter()
    for _ in range(count):
        x.add_(1)
    seconds = time.perf_counter() - started
    synchronize()
    return 1e6 * seconds / count


# ---------------------------------------------------------------- is it right there?


def check(config: Config, precision: str, dtype: str) -> dict[str, Any]:
    """All phases with a policy that trains; then tokens with CUDA graphs beside those without.

    That the ratio is 1 before the first step `ppo_train.py` checks itself.
    """
    folder = WORK / f"check_{precision.replace(' ', '')}_{dtype}"
    of = settings(config, folder, precision == "nf4", dtype)
    # One update of the critic alone, and one with the policy.
    of["ppo"] = replace(of["ppo"], critic_warmup_updates=1)
    found = run_phases({phase: replace(of_phase, max_steps=2) for phase, of_phase in of.items()})
    found = {
        phase: {"seconds_a_step": values["seconds_a_step"]} | policy_of(values)
        for phase, values in found.items()
    }
    shared, prompt_format, _ = open_policy(of)
    shared.merge("policy")
    for weights, layers in (("base", shared.decoder.layers), ("merged", shared.merged.layers)):
        found[f"graph_{weights}"] = compare_graph(
            shared, prompt_format, layers, 4 if config.tiny else 24
        )
    return found


def policy_of(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name.startswith("policy/")}


@torch.no_grad()
def compare_graph(shared, prompt_format, layers, rows: int) -> dict[str, Any]:
    prompts = [prompt_format.prompt_ids((("user", "Hi " * (1 + 3 * row)),)) for row in range(rows)]
    written = []
    for graphs in (Graphs(False), Graphs(shared.device.type == "cuda")):
        draws = torch.rand(
            rows, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(2)
        )
        longest = max(map(len, prompts))
        decoding = Decoding(shared.decoder, "policy", layers, rows, longest, 24, 1.0, graphs, 23)
        decoding.read(prompts, draws, 2048)
        decoding.send()
        for _ in range(23):
            decoding.step()
            decoding.send()
        written.append([decoding.receive()[:rows] for _ in range(24)])
        captured = len(graphs.captured)
        graphs.clear()
    same = sum(
        a == b
        for ours, theirs in zip(*written, strict=True)
        for a, b in zip(ours, theirs, strict=True)
    )
    return {"tokens": 24 * rows, "same": same, "graphs": captured}


def check_resume(config: Config) -> dict[str, Any]:
    """A PPO run killed once its first state is there and resumed, beside two left alone.

    Backward passes on a card add in any order, so two runs that are left alone may differ there
    too.
    """
    of = settings(config, WORK / "phases_whole")["ppo"]
    alone = replace(of, output_dir=str(WORK / "resume" / "alone"), save_steps=1)
    again = replace(alone, output_dir=str(WORK / "resume" / "again"))
    cut = replace(alone, output_dir=str(WORK / "resume" / "cut"))
    (WORK / "resume").mkdir(exist_ok=True)
    for left in (alone, again):
        subprocess.run(command(left), check=True, stdout=subprocess.DEVNULL)
    process = subprocess.Popen(command(cut), stdout=subprocess.DEVNULL)
    state = Path(f"{cut.output_dir}.partial") / "step-00000001" / "manifest.json"
    while process.poll() is None and not state.exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    resumed = [*(part for part in command(cut) if part != "--overwrite"), "--resume"]
    subprocess.run(resumed, check=True, stdout=subprocess.DEVNULL)
    first, second, third = (
        load_file(Path(run.output_dir) / "adapter_model.safetensors") for run in (alone, again, cut)
    )
    found = {}
    for name, other in (("left alone twice", second), ("killed and resumed", third)):
        worst = max((first[key] - other[key]).abs().max().item() for key in first)
        found[name] = {"largest_difference": worst, "bit_identical": worst == 0}
    return found


def command(config: Any) -> list[str]:
    """`ppo_train.py` with the flags of all that is not its default."""
    flags = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value == field.default:
            continue
        flag = field.name.replace("_", "-")
        flags += (
            [f"--{flag}" if value else f"--no-{flag}"]
            if isinstance(value, bool)
            else [f"--{flag}", str(value)]
        )
    return [sys.executable, str(ROOT / "ppo_train.py"), *flags]


# ---------------------------------------------------------------- TRL


def trl(config: Config, what: str) -> dict[str, Any]:
    """TRL at the same settings, in micro-batches of 4.

    Its own SFT and reward trainers, and the PPO trainer of 1.12.
    """
    return trl_ppo(config) if what == "ppo" else trl_trainer(config, what)


def trl_trainer(config: Config, what: str) -> dict[str, Any]:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(model_of(config))
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.unk_token or tokenizer.eos_token
    rows = read_jsonl(WORK / "data" / "train.jsonl")
    steps = 2 if config.tiny else 8
    options: dict[str, Any] = {"dtype": torch.bfloat16, **quantised(config)}
    arguments = {
        "output_dir": str(WORK / f"trl_{what}"),
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 4,
        "max_steps": steps,
        "learning_rate": 2e-4,
        "max_length": 512,
        "bf16": True,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": not torch.cuda.is_available(),
    }
    lora = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
    if what == "sft":
        data = [{"prompt": row["prompt"], "completion": " " + row["chosen"]} for row in rows]
        model = AutoModelForCausalLM.from_pretrained(model_of(config), **options)
        make = (SFTTrainer, SFTConfig)
        peft = LoraConfig(**lora, task_type="CAUSAL_LM")
    else:
        data = [
            {side: f"{row['prompt']} {row[side]}" for side in ("chosen", "rejected")}
            for row in rows
        ]
        model = AutoModelForSequenceClassification.from_pretrained(
            model_of(config), num_labels=1, **options
        )
        model.config.pad_token_id = tokenizer.pad_token_id
        make = (RewardTrainer, RewardConfig)
        peft = LoraConfig(**lora, task_type="SEQ_CLS")
    trainer = make[0](
        model=model,
        args=make[1](**arguments),
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(data),
        peft_config=peft,
    )
    times: list[float] = []
    step = trainer.training_step

    def timed(*args, **kwargs):
        result = step(*args, **kwargs)
        synchronize()
        times.append(time.perf_counter())
        return result

    trainer.training_step = timed
    trainer.train()
    # From the end of the first step to the end of the last one.
    seconds = (times[-1] - times[3]) / (steps - 1)
    found = {"seconds_a_step": seconds, "rows_per_second": 16 / seconds}
    if torch.cuda.is_available():
        found["memory_allocated_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return found


def quantised(config: Config) -> dict[str, Any]:
    if not torch.cuda.is_available():
        return {}
    from transformers import BitsAndBytesConfig

    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    nf4 |= {"bnb_4bit_compute_dtype": torch.bfloat16, "llm_int8_skip_modules": ["lm_head", "score"]}
    return {"quantization_config": BitsAndBytesConfig(**nf4), "device_map": {"": 0}}


def trl_ppo(config: Config) -> dict[str, Any]:
    folder = Path(config.trl_1_12)
    if not (folder / "trl").exists() and install(folder, "trl==1.12.0"):
        return {"skipped": f"TRL 1.12.0 is not in {folder}, and pip cannot install it there"}
    sft = read_run(str(WORK / "phases_whole" / "sft"), "sft")
    prompt_format = load_format(str(WORK / "phases_whole" / "sft"), sft)
    prompts = [
        prompt_format.prompt_ids((("user", row["prompt"].split("Human: ")[1].split("\n\n")[0]),))[
            -PROMPT:
        ]
        for row in read_jsonl(WORK / "data" / "train.jsonl")
    ]
    (WORK / "prompts.json").write_text(json.dumps(prompts))
    out = WORK / "trl_ppo"
    (out / "metrics.jsonl").unlink(missing_ok=True)
    updates, episodes = (2, 8) if config.tiny else (3, 64)
    card = {
        "in_4bit": torch.cuda.is_available(),
        "use_cpu": not torch.cuda.is_available(),
        "tokenizer": str(WORK / "phases_whole" / "sft"),
        "updates": updates,
        "episodes": episodes,
        "num_mini_batches": 1 if config.tiny else 4,
        "num_ppo_epochs": 2,
        "rollout_rows": min(32, episodes),
        "response_length": 8 if config.tiny else RESPONSE,
        "temperature": 1.0,
    }
    own = {
        "policy": model_of(config),
        "reward": model_of(config),
        "prompts": str(WORK / "prompts.json"),
        "seed": 0,
    }
    own |= {
        "value": "lora",
        "learning_rate": 5e-5,
        "value_learning_rate": 5e-5,
        "output_dir": str(out),
    }
    (WORK / "settings.json").write_text(json.dumps(own | card))
    script = [sys.executable, str(ROOT / "benchmarks" / "trl_ppo.py"), str(WORK / "settings.json")]
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    }
    done = subprocess.run(script, env=env, capture_output=True, text=True)
    if done.returncode:
        return {"failed": done.stderr[-500:]}
    rows = read_jsonl(out / "metrics.jsonl")[1:]
    found = {
        name: statistics.median(row[name] for row in rows)
        for name in rows[0]
        if name.startswith("time/")
    }
    memory = {
        name: max(row[name] for row in rows) for name in rows[0] if name.startswith("memory/")
    }
    return found | memory | {"rows_per_second": episodes / sum(found.values())}


if __name__ == "__main__":
    run(main, Config, {}, __doc__)
