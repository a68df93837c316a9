"""300 PPO updates of the tiny model: do memory, open files or the files of a run grow?

    make soak

Exit code 1 if resident memory at the end is not within 5 % of that after update 30, or if anything
else grew.
"""

import sys
import tempfile
from pathlib import Path

sys.path[:0] = map(str, Path(__file__).resolve().parents[:2])

import rlhf  # noqa: F401  before the libraries that it sets up

import psutil
from conftest import make_model, read_demo, run_main, write_jsonl
from torture import FLAGS, SMALL, finish, script, start

import rlhf.ppo.state

UPDATES = 300
SETTLED = 30


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        seen = soak(Path(folder))
    settled = seen[SETTLED]
    end = seen[UPDATES]
    memory, descriptors, files = zip(settled, end, strict=True)
    growth = memory[1] / memory[0] - 1
    print(
        f"updates {UPDATES}, resident MB {memory[0] / 1e6:.0f} after {SETTLED} and "
        f"{memory[1] / 1e6:.0f} at the end ({growth:+.1%}), open files {descriptors[0]} and "
        f"{descriptors[1]}, files of the run {files[0]} and {files[1]}"
    )
    sys.exit(int(abs(growth) > 0.05 or descriptors[1] > descriptors[0] or files[1] > files[0]))


def soak(work: Path) -> dict[int, tuple[int, int, int]]:
    """For each update: bytes of resident memory, open descriptors, files in the run's folder."""
    data = work / "data"
    base = work / "base"
    data.mkdir()
    write_jsonl(data / "train.jsonl", read_demo("train")[:24])
    write_jsonl(data / "test.jsonl", read_demo("test")[:8])
    finish(start(make_model, base))
    places = {
        "data": data,
        "base": base,
        "alone": work,
        "dtype": "fp32",
        "steps": 4,
        "episodes": 8 * UPDATES,
    }
    commands = {
        phase: (SMALL + flags).format(**places, folder=work / phase)
        for phase, flags in FLAGS.items()
    }
    for phase in ("sft", "reward"):
        finish(start(script, phase, commands[phase].split()))

    seen = {}
    process = psutil.Process()
    done = rlhf.ppo.state.State.done

    def watched(self, update, kl_coef):
        done(self, update, kl_coef)
        files = sum(path.is_file() for path in self.folder.rglob("*"))
        seen[update] = process.memory_info().rss, process.num_fds(), files

    rlhf.ppo.state.State.done = watched
    result = run_main("ppo_train", commands["ppo"].split(), seconds=3600)
    if result.returncode:
        raise SystemExit(result.stderr)
    return seen


if __name__ == "__main__":
    main()
