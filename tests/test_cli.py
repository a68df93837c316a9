"""How flags get their help from the comments of a config."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from rlhf.runs.cli import help_texts, parse


@dataclass(frozen=True)
class Config:
    """Knobs."""

    folder: str = "#1"  # where to write: "#1" is no comment
    # two lines
    # above the field
    steps: int = 3
    rate: float = 1e-3
    # not of `last`, as a blank line follows

    last: bool = False  # behind wins


def test_the_help_is_the_comment_behind_a_field_or_above_it():
    assert help_texts(Config) == {
        "folder": 'where to write: "#1" is no comment',
        "steps": "two lines above the field",
        "rate": "",
        "last": "behind wins",
    }


@pytest.mark.parametrize("first", [(), ("steps",)])
def test_flags_are_shown_with_their_help(first, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit):
        parse(Config, {}, "A script.", ["--help"], first)
    said = capsys.readouterr().out
    assert "A script." in said and "two lines above the field" in said
    assert parse(Config, {}, "A script.", ["--steps", "4", "--folder=~/x"], first).steps == 4


def test_ppo_and_the_comparison_do_not_import_datasets():
    """It takes 80 MB of each process, and rows of a local file do not need it."""
    code = (
        "import sys, rlhf, ppo_train, compare_outputs\n"
        "from rlhf.runs.cli import quiet_libraries\n"
        "quiet_libraries()\n"
        "ppo_train.load_splits('demo/data', 'prompt', None, 8, 8)\n"
        "assert 'datasets' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
        check=False,
    )
    assert done.returncode == 0, done.stderr
