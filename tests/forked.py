"""Scripts in processes of their own that start at once: forked after all imports.

Importing torch, TRL and Gradio takes a script ten seconds, more than most tests do with it.
"""

import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

import pytest
from conftest import OFFLINE, ROOT

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["sft_train", "reward_train", "ppo_train", "compare_outputs", "feedback.vote", "rlhf.chat"]
)


class Run:
    """A script, or a module after "-m", in one or more processes; used like subprocess.Popen.

    As under torchrun, several know each other's address, and when one fails the others are ended.
    """

    def __init__(self, command, env=None, processes=1, log=None):
        folder = Path(tempfile.mkdtemp())
        start_server()
        self.out = Path(log or folder / "out")
        self.err = Path(log or folder / "err")
        self.returncode = None
        self.processes = []
        for rank in range(processes):
            told = {**OFFLINE, **ranks(rank, processes, self.processes), **(env or {})}
            what = list(map(str, command)), told, str(self.out), str(self.err)
            self.processes.append(FORKS.Process(target=be, args=what))
            self.processes[-1].told = told
        for process in self.processes:
            process.start()

    @property
    def pid(self) -> int:
        """Of the last process."""
        return self.processes[-1].pid

    def poll(self) -> int | None:
        codes = [process.exitcode for process in self.processes]
        if any(codes):
            for process in self.processes:
                process.kill()
                process.join()
            self.returncode = next(filter(None, codes))
        elif None not in codes:
            self.returncode = 0
        return self.returncode

    def wait(self, timeout: float) -> int:
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                self.kill()
                raise TimeoutError(f"no end after {timeout} s: {self.err.read_text()[-3000:]}")
            time.sleep(0.02)
        return self.returncode

    def communicate(self, timeout: float) -> tuple[str, str]:
        self.wait(timeout)
        return self.out.read_text(), self.err.read_text()

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        for process in self.processes:
            if process.exitcode is None:
                os.kill(process.pid, signal.SIGKILL)
            process.join()


def start_server() -> None:
    """Start the process that is forked, unless it is there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        multiprocessing.forkserver.ensure_running()


def ranks(rank: int, processes: int, earlier: list) -> dict[str, str]:
    """What torchrun tells a process of several."""
    if processes == 1:
        return {}
    port = earlier[0].told["MASTER_PORT"] if earlier else str(free_port())
    counts = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    mine = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **counts, **mine}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def be(command: list[str], env: dict[str, str], out: str, err: str) -> None:
    """Become `python *command`."""
    for path, number in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    assert "ppo_train" in sys.modules, "the process that is forked has imported nothing"
    os.environ.update(env)
    terminal = sys.modules["rlhf.runs.terminal"]
    terminal.console.quiet = env.get("RANK", "0") != "0"  # as it would be if imported now
    os.chdir(ROOT)
    if command[0] == "-m":
        sys.argv = command[1:]
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = command
        sys.path.insert(0, str(Path(command[0]).parent))
        runpy.run_path(command[0], run_name="__main__")
