"""What a checkpoint was trained on is known by content: independent judges, prompts held out."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import read_demo, write_jsonl

from rlhf.runs.checkpoints import check_other_pairs
from rlhf.runs.errors import UserError
from rlhf.runs.trained_prompts import (
    FILE,
    prompt_hashes,
    read_trained_prompts,
    report_overlap,
    write_trained_prompts,
)

QUESTIONS = [(("user", f"Question {n}, “é”?"),) for n in range(4)]


def folder_of(path: Path, prompts) -> str:
    """A checkpoint of which only the trained prompts are there."""
    path.mkdir()
    write_trained_prompts(path, prompt_hashes(prompts))
    return str(path)


def test_a_prompt_keeps_its_hash_and_another_has_another(tmp_path):
    hashes = prompt_hashes([(("user", "Why?"),), (("user", "Why?"),)])
    assert hashes.tolist() == [-3021919976156686646]  # files of earlier versions hold it
    other = [(("system", "Why?"),), (("user", "Why? "),), (("user", "Why"), ("user", "?"))]
    assert len(prompt_hashes([*other, (("user", "Why?"),)])) == 4
    folder = folder_of(tmp_path / "sft", QUESTIONS)
    back = read_trained_prompts(folder)
    assert back.dtype == np.int64 and back.tolist() == sorted(prompt_hashes(QUESTIONS).tolist())


def test_held_out_prompts_that_were_trained_on_are_counted_and_named(capsys):
    trained = {
        "sft": prompt_hashes(QUESTIONS[:2]),
        "reward": prompt_hashes(QUESTIONS[1:2]),
        "ppo": prompt_hashes(QUESTIONS[3:]),
    }
    held_out = [QUESTIONS[2], QUESTIONS[1], QUESTIONS[1], QUESTIONS[0]]
    warning = (
        "2 of 3 held-out prompts are also in the training data (of SFT, reward model), so the "
        "figures are too good"
    )
    assert report_overlap(held_out, trained) == [warning]
    said = " ".join(capsys.readouterr().out.split())
    assert said == f'warning: {warning} (the first: "Question 1, “é”?")'
    assert report_overlap(QUESTIONS[2:3], trained) == []
    assert report_overlap(QUESTIONS, {}) == []
    assert capsys.readouterr().out == ""


def test_a_judge_that_shares_a_prompt_is_refused_whatever_its_data_are_called(tmp_path):
    gold = folder_of(tmp_path / "gold", QUESTIONS[1:])
    reward = folder_of(tmp_path / "reward", QUESTIONS[:2])
    other = folder_of(tmp_path / "other", QUESTIONS[:1])
    halves = {"data": {"half": "second"}}, {"data": {"half": "first"}}
    with pytest.raises(UserError, match="trained on 1 of its 3 prompts; .* --half first"):
        check_other_pairs({"data": {"source": "a/"}}, gold, {"data": {"source": "a"}}, reward)
    with pytest.raises(UserError, match="without --extra-data"):
        check_other_pairs(halves[0], gold, halves[1], reward)
    check_other_pairs({"data": {"source": "a"}}, gold, {"data": {"source": "a"}}, other)


def test_checkpoints_of_an_earlier_version_are_known_by_their_names(tmp_path):
    gold = folder_of(tmp_path / "gold", QUESTIONS)
    earlier = str(tmp_path)
    theirs = {"data": {"source": "a", "sha256": "1"}}
    with pytest.raises(UserError, match="may have trained on the pairs"):
        check_other_pairs(theirs, gold, {"data": {"source": "a", "sha256": "2"}}, earlier)
    check_other_pairs(theirs, gold, {"data": {"source": "b", "sha256": "2"}}, earlier)


@pytest.mark.parametrize("content", [b"", b"\x08\0\0\0\0\0\0\0{}      "])
def test_a_damaged_file_is_one_line(content, tmp_path):
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(UserError, match=f"{FILE} is damaged .*: train that phase again"):
        read_trained_prompts(str(tmp_path))


# ---------------------------------------------------------------- the scripts


def test_a_judge_of_the_same_rows_under_another_name_is_refused(
    trained, tiny_data, call_main, tmp_path
):
    """The reward model is of some rows of a folder, the judge of all, and of `folder/`."""
    argv = [*trained.reward_flags, "--max-steps", 1, "--max-eval-samples", 4]
    few = ["--max-train-samples", 8, "--output-dir", tmp_path / "reward"]
    assert call_main("reward_train", [*argv, *few]).returncode == 0
    again = ["--dataset", f"{tiny_data}/", "--output-dir", tmp_path / "gold"]
    assert call_main("reward_train", [*argv, *again]).returncode == 0
    folders = ["--sft-checkpoint", trained.sft, "--reward-checkpoint", tmp_path / "reward"]
    folders += ["--gold-checkpoint", tmp_path / "gold", "--dataset", tiny_data, "--role-layers", 2]
    refused = call_main("ppo_train", folders)
    assert refused.returncode == 2
    assert "was trained on 8 of its 24 prompts; train one with" in refused.stderr


def vote(number: int, row: dict[str, str]) -> dict:
    answers = {"A": row["chosen"].strip() + " Yes.", "B": row["rejected"].strip()}
    return {
        "prompt": row["prompt"],
        "response": answers["A"],
        "chosen": answers["A"],
        "rejected": answers["B"],
        "vote": "A",
        "ballot": f"b{number}",
        "voter": "me",
        "answers": answers,
        "models": {"A": "SFT", "B": "base"},
    }


def test_votes_on_test_prompts_are_noticed_now_and_later(trained, tiny_data, call_main, tmp_path):
    rows = read_demo("test")[:8]
    votes = write_jsonl(tmp_path / "votes.jsonl", [vote(n, row) for n, row in enumerate(rows)])
    argv = [*trained.reward_flags, "--max-steps", 1, "--output-dir", tmp_path / "reward"]
    alone = call_main("reward_train", argv)
    assert alone.returncode == 0 and "also in the training data" not in alone.stdout
    with_votes = call_main("reward_train", [*argv, "--extra-data", votes, "--overwrite"])
    assert with_votes.returncode == 0
    warning = (
        f"{trained_on(votes, rows)} of 8 held-out prompts are also in the training data (of reward"
    )
    assert warning in " ".join(with_votes.stdout.split())
    again = call_main("reward_train", [*argv, "--eval-only", "--overwrite"])
    assert again.returncode == 0 and warning in " ".join(again.stdout.split())
    folders = ["--sft-checkpoint", trained.sft, "--reward-checkpoint", tmp_path / "reward"]
    ppo = call_main(
        "ppo_train", [*folders, "--dataset", tiny_data, "--role-layers", 2, "--dry-run"]
    )
    assert ppo.returncode == 0, ppo.stderr
    assert warning in " ".join(ppo.stdout.split())


def trained_on(votes: Path, rows: list) -> int:
    """How many of `rows` are prompts of votes to train on."""
    from rlhf.data.rows import parse_row
    from rlhf.data.votes import load_votes

    train = {pair.turns for pair in load_votes(str(votes)).train}
    count = sum(parse_row(row).turns in train for row in rows)
    assert 0 < count < len(rows)
    return count


def test_the_comparison_does_not_call_held_out_what_was_trained_on(
    trained, tiny_data, call_main, tmp_path
):
    sft = Path(shutil.copytree(trained.sft, tmp_path / "sft"))
    argv = ["--sft-checkpoint", sft, "--reward-checkpoint", trained.reward, "--dtype", "fp32"]
    argv += ["--ppo-checkpoint", "/nowhere", "--output-dir", "out", "--max-new-tokens", 4]
    argv += ["--show", 0, "--num-test-prompts", 50, "--overwrite"]
    warning = "held-out prompts are also in the training data (of SFT, reward model)"
    same = call_main("compare_outputs", [*argv, "--dataset", tiny_data / "train.jsonl"])
    assert same.returncode == 0, same.stderr
    assert (
        warning in " ".join(same.stdout.split()) and warning in Path("out/compare.md").read_text()
    )
    result = " ".join(same.stdout[same.stdout.index("By how much") :].split())
    assert " held-out " not in result
    other = call_main("compare_outputs", [*argv, "--dataset", tiny_data])
    assert other.returncode == 0 and "also in the training data" not in other.stdout
    assert "By how much: of 8 held-out prompts" in other.stdout
    (sft / FILE).unlink()  # as if an earlier version had made it
    less = call_main("compare_outputs", [*argv, "--dataset", tiny_data / "train.jsonl"])
    assert "are also in the training data (of reward model)" in " ".join(less.stdout.split())
