"""A tiny model, tiny data, and the scripts run on them: in-process, without a network."""

import contextlib
import importlib
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

# Before any library is imported: they read these once.
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
os.environ.update(OFFLINE)
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
# tiny tensors; on busy cores a second thread makes a run ten times slower
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell that starts the tests in the background has them ignore Ctrl-C, and so would the servers
# that a test stops by it.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import rlhf  # noqa: F401  before the libraries that it sets up

import pytest

DEMO = ROOT / "demo" / "data"
PAD = "<pad>"
BOS = "<bos>"
EOS = "<eos>"
CLOCKS = (
    "time/",
    "speed/",
    "train_",
    "num_tokens",
)  # metrics of clocks, and of what is counted since the last start
HANGS = 60  # seconds, after which a script on the tiny model is taken to hang
LONGEST = [
    "processes",
    "vote_page",
    "toys",
    "resume",
]  # files, which are begun first, so that none ends alone


class Result(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


class Checkpoints(NamedTuple):
    sft: Path
    reward: Path
    sft_flags: list[str]  # as they were trained; the last flag of a kind wins
    reward_flags: list[str]


def read_demo(split: str) -> list[dict[str, str]]:
    return [
        json.loads(line)
        for line in (DEMO / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def write_jsonl(path: Path, rows: list) -> Path:
    path.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )
    return path


def pytest_collection_modifyitems(items):
    order = {f"test_{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    """Every test runs in a folder of its own: checkpoints/sft never means the repository's."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session", autouse=True)
def small_probe(tmp_path_factory):
    """A safety probe of eight pairs: the whole one would take the tiny model half a second."""
    from rlhf.reports import probe

    rows = [json.loads(line) for line in probe.PATH.read_text(encoding="utf-8").splitlines()]
    kinds = [[row for row in rows if row["kind"] == kind][:4] for kind in probe.KINDS]
    whole = probe.PATH
    few = tmp_path_factory.mktemp("probe") / "probe.jsonl"
    probe.PATH = write_jsonl(few, sum(kinds, []))
    yield
    probe.PATH = whole


# ---------------------------------------------------------------- the tiny model and data


def make_tokenizer():
    """A byte-level BPE tokenizer of 400 entries that puts one BOS before a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    texts = [
        row["prompt"] + row[name] for row in read_demo("train") for name in ("chosen", "rejected")
    ]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=[PAD, BOS, EOS],
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, bpe.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token=PAD, bos_token=BOS, eos_token=EOS
    )


def make_model(folder: Path, seed: int = 0, hidden_size: int = 32, layers: int = 4) -> Path:
    """A random Llama with large weights, so that every token attends to some other."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    """24 training and 8 test rows of the demo's data, in rm-static's columns."""
    folder = tmp_path_factory.mktemp("data")
    write_jsonl(folder / "train.jsonl", read_demo("train")[:24])
    write_jsonl(folder / "test.jsonl", read_demo("test")[:8])
    return folder


@pytest.fixture
def tokenizer(tiny_model):
    """A fresh copy: a PromptFormat changes its tokenizer's chat template."""
    from rlhf.engine.tokenizers import load_tokenizer

    return load_tokenizer(str(tiny_model))


@pytest.fixture
def form(tokenizer):
    from rlhf.data.format import PromptFormat

    return PromptFormat("hh", tokenizer)


# ---------------------------------------------------------------- what a card would wait for

READS = {"item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__"}
READS_BELOW = {"_local_scalar_dense", "nonzero", "masked_select"}


@contextlib.contextmanager
def count_host_reads() -> Iterator[list[str]]:
    """The calls in the block that read a tensor's value: on a card, the CPU would wait for it."""
    from torch.overrides import TorchFunctionMode
    from torch.utils._python_dispatch import TorchDispatchMode

    reads: list[str] = []

    class Count(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function.__name__ in READS:
                reads.append(function.__name__)
                with torch.utils._python_dispatch._disable_current_modes():
                    return function(*args, **(kwargs or {}))
            return function(*args, **(kwargs or {}))

    class CountBelow(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            name = function.overloadpacket.__name__
            by_mask = name == "index" and any(
                i is not None and i.dtype == torch.bool for i in args[1]
            )
            if name in READS_BELOW or by_mask:
                reads.append(name)
            return function(*args, **(kwargs or {}))

    import torch

    with CountBelow(), Count():
        yield reads


# ---------------------------------------------------------------- the scripts


@pytest.fixture(scope="session")
def run_script() -> Callable[..., subprocess.CompletedProcess]:
    """`run_script("sft_train.py", *flags, cwd=...)`: a process of its own, and slow to start."""

    def run_script(
        script: str, *flags: str, cwd: Path | None = None
    ) -> subprocess.CompletedProcess:
        command = [sys.executable, str(ROOT / script), *map(str, flags)]
        env = {**os.environ, **OFFLINE, "CUDA_VISIBLE_DEVICES": ""}
        return subprocess.run(
            command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300
        )

    return run_script


def run_main(module_name: str, argv: list, seconds: int = HANGS) -> Result:
    """Run a script's command line in this process: its exit code, and what it wrote."""
    from rlhf.runs.cli import run

    module = importlib.import_module(module_name)
    out = io.StringIO()
    err = io.StringIO()
    code = 0
    before = sys.argv
    sys.argv = [f"{module_name}.py", *map(str, argv)]
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail(f"{module_name} hangs"))
    signal.alarm(seconds)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            first = getattr(module, "FIRST", ())
            run(module.main, module.Config, getattr(module, "PRESETS", {}), module.__doc__, first)
    except SystemExit as stop:
        code = stop.code or 0
    finally:
        signal.alarm(0)
        sys.argv = before
    return Result(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="session")
def call_main() -> Callable[[str, list], Result]:
    return run_main


@pytest.fixture(scope="session")
def flags(tiny_model, tiny_data) -> dict[str, list[str]]:
    """Flags for a run of a second on the tiny model; without --output-dir and parents."""
    small = (
        "--dtype fp32 --max-steps 4 --max-length 256 --lora-rank 4 --lora-alpha 8 "
        f"--no-gradient-checkpointing --dataset {tiny_data} --batch-size 4 --learning-rate 1e-2"
    ).split()
    return {
        "sft_train": [*small, "--base-model", str(tiny_model), "--no-load-in-4bit"],
        "reward_train": [*small, "--role-layers", "2"],
    }


@pytest.fixture(scope="session")
def trained(tmp_path_factory, flags) -> Checkpoints:
    """SFT and reward checkpoints on the tiny model. Copy what you mean to change."""
    folder = tmp_path_factory.mktemp("trained") / "checkpoints"
    sft = folder / "sft"
    reward = folder / "reward"
    sft_flags = [*flags["sft_train"], "--output-dir", str(sft)]
    reward_flags = [
        *flags["reward_train"],
        "--sft-checkpoint",
        str(sft),
        "--output-dir",
        str(reward),
    ]
    for script, argv in (("sft_train", sft_flags), ("reward_train", reward_flags)):
        result = run_main(script, argv)
        assert result.returncode == 0, result.stderr
    return Checkpoints(sft, reward, sft_flags, reward_flags)
