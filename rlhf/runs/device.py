"""What a process computes on, in which number format, and how much memory it took."""

import sys
from pathlib import Path

import torch

from rlhf.runs.errors import UserError, one_line
from rlhf.runs.processes import this_process

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def peak_memory_gib() -> float:
    """The most memory that this process has held: on the card if it uses one, else in all."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return round(torch.cuda.max_memory_allocated() / 2**30, 2)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB on Linux
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30, 2)


def device() -> torch.device:
    """This process's device: a CUDA card if there is one, unless accelerate is told otherwise.

    Raises:
        UserError: it is neither a CUDA card nor a CPU.
    """
    device = this_process().device
    if device.type not in ("cuda", "cpu"):
        raise UserError(
            f"{device.type} is not supported: set ACCELERATE_USE_CPU=1 to compute on the CPU"
        )
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype that the base computes in: the one asked for, or for "auto" the device's best.

    Adapters, heads and optimizer states are always float32.

    Raises:
        UserError: the device cannot compute in it.
    """
    if device.type == "cuda":
        card = torch.cuda.get_device_name(device)
        capability = torch.cuda.get_device_capability(device)
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        fp16 = capability >= (6, 0)
        where = f"{card} (compute capability {capability[0]}.{capability[1]})"
    else:
        have = torch.cpu.get_capabilities()
        bf16 = bool(have.get("avx512_bf16") or have.get("amx_bf16"))
        fp16 = False
        where = "a CPU"
    if name == "auto":
        if device.type != "cuda":
            return torch.bfloat16 if bf16 else torch.float32
        if not (bf16 or fp16):
            raise UserError(
                f"{where} has neither bf16 nor usable fp16: use a newer card, or --dtype fp32 on a "
                "small model"
            )
        return torch.bfloat16 if bf16 else torch.float16
    if (name == "bf16" and device.type == "cuda" and not bf16) or (name == "fp16" and not fp16):
        raise UserError(f"--dtype {name} does not work on {where}: leave it at auto")
    return DTYPES[name]


def has_flash_attention(device: torch.device) -> bool:
    """Whether attention in 16 bit needs neither a mask nor each key once for each query head."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def check_4bit(device: torch.device) -> None:
    """Raise UserError unless `device` can make and use NF4 weights. Tries one small layer."""
    try:
        import bitsandbytes as bnb

        layer = bnb.nn.Linear4bit(64, 64, quant_type="nf4", compute_dtype=torch.float32).to(device)
        layer(torch.ones(1, 64, device=device))
    except Exception as error:
        raise UserError(
            f"4-bit weights do not work on {device.type} here ({one_line(error)}): pass "
            "--no-load-in-4bit"
        ) from None


def hardware() -> str:
    """What a measurement on a CPU was made with: threads, processor and torch version."""
    return f"{torch.get_num_threads()} threads, {cpu_name()}, torch {torch.__version__}"


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = (line.split(":")[1].strip() for line in lines if "model name" in line)
    return next(names, "unknown CPU")
