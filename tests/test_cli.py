"""How flags get their help from the comments of a config."""

from dataclasses import dataclass

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
