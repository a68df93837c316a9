"""Votes: the file that they are kept in, what is counted, and how the reward model gets them."""

import json
import threading

import pytest

from rlhf.data.sources import load_pairs
from rlhf.data.splits import in_test_split
from rlhf.data.votes import Vote, VoteFile, agreement, load_votes, read_votes, win_rates
from rlhf.runs.errors import UserError

PROMPT = "\n\nHuman: Why is the sky blue?\n\nAssistant:"


def vote(
    ballot="b1",
    choice="A",
    voter="ann",
    prompt=PROMPT,
    scores=(0.5, -0.5),
    models=("SFT", "PPO"),
    answers=("One.", "Two."),
):
    sides = [dict(zip("AB", pair, strict=True)) for pair in (answers, models)]
    return Vote(
        ballot,
        voter,
        choice,
        prompt,
        *sides,
        dict(zip("AB", scores, strict=True)) if scores else None,
    )


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---------------------------------------------------------------- the file


def test_a_line_has_the_columns_of_rm_static_and_who_saw_what(tmp_path):
    file = VoteFile(tmp_path / "sub" / "votes.jsonl")
    file.add(vote(choice="B"))
    file.add(vote("b2", choice="tie", scores=None))
    first, second = lines(file.path)
    assert first.pop("time").endswith("+00:00")
    assert first == {
        "prompt": PROMPT,
        "response": "Two.",
        "chosen": "Two.",
        "rejected": "One.",
        "vote": "B",
        "ballot": "b1",
        "voter": "ann",
        "answers": {"A": "One.", "B": "Two."},
        "models": {"A": "SFT", "B": "PPO"},
        "scores": {"A": 0.5, "B": -0.5},
        "checkpoints": None,
    }
    assert (second["chosen"], second["rejected"], second["vote"], second["scores"]) == (
        None,
        None,
        "tie",
        None,
    )
    assert [v.choice for v in read_votes(file.path)[0].values()] == ["B", "tie"]


def test_a_ballot_has_one_vote_which_its_voter_can_take_back(tmp_path):
    file = VoteFile(tmp_path / "votes.jsonl")
    file.add(vote(choice="A"))
    file.add(vote(choice="B"))
    file.undo("b1", "bob")
    assert [v.choice for v in file.standing()] == ["A"]
    file.undo("b1", "ann")
    file.undo("b1", "ann")
    assert file.standing() == []
    file.add(vote(choice="B"))
    assert [row.get("vote", "undone") for row in lines(file.path)] == ["A", "undone", "B"]
    votes, undone = read_votes(file.path)
    assert ([v.choice for v in votes.values()], undone) == (["B"], 1)


@pytest.mark.parametrize("cut", [1, 20, 150])
def test_an_unfinished_last_line_is_cut_off(tmp_path, cut):
    path = tmp_path / "votes.jsonl"
    file = VoteFile(path)
    file.add(vote())
    whole = path.read_bytes()
    file.add(vote("b2"))
    file.file.close()
    path.write_bytes(path.read_bytes()[: len(whole) + cut])
    again = VoteFile(path)
    assert path.read_bytes() == whole
    again.add(vote("b3"))
    assert list(read_votes(path)[0]) == ["b1", "b3"]


def test_a_last_line_without_a_newline_is_kept(tmp_path):
    path = tmp_path / "votes.jsonl"
    path.write_text(json.dumps(vote().row()))
    VoteFile(path).add(vote("b2"))
    assert list(read_votes(path)[0]) == ["b1", "b2"]


def test_what_could_not_be_synced_is_neither_kept_nor_counted(tmp_path, monkeypatch):
    file = VoteFile(tmp_path / "votes.jsonl")
    file.add(vote())
    before = file.path.read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(OSError, match="No space"):
            file.add(vote("b2"))
    assert (file.path.read_bytes(), len(file.standing())) == (before, 1)
    file.add(vote("b2"))
    assert list(read_votes(file.path)[0]) == ["b1", "b2"]


def test_a_second_server_is_refused(tmp_path):
    file = VoteFile(tmp_path / "votes.jsonl")
    with pytest.raises(UserError, match="another server"):
        VoteFile(file.path)


def test_threads_do_not_tear_lines(tmp_path):
    file = VoteFile(tmp_path / "votes.jsonl")
    work = [
        threading.Thread(
            target=lambda t=t: [
                file.add(vote(f"{t}-{i}", answers=("x" * 5000, "y"))) for i in range(25)
            ]
        )
        for t in range(8)
    ]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    assert {row["ballot"] for row in lines(file.path)} == {
        f"{t}-{i}" for t in range(8) for i in range(25)
    }
    assert len(lines(file.path)) == 200


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "JSON"),
        ("[1]", "not an object"),
        ('{"prompt": "Hi", "chosen": "Hello!"}', "it has no ballot, voter, vote, answers, models"),
        ('{"undo": "b7"}', "b7"),
        (json.dumps(vote().row()), "a ballot that has a vote"),
        (json.dumps(vote("b2").row() | {"vote": "C"}), "none of A, B, tie, both bad"),
        (json.dumps(vote("b2").row() | {"chosen": "Three."}), "chosen"),
        (json.dumps(vote("b2").row() | {"voter": 3}), "not text"),
        (json.dumps(vote("b2").row() | {"answers": {"A": "One."}}), "sides"),
        (json.dumps(vote("b2").row() | {"scores": {"A": float("nan"), "B": 0}}), "score"),
        ("[" * 100_000, "RecursionError"),
    ],
)
def test_a_line_that_is_no_vote_is_named(tmp_path, line, says):
    path = tmp_path / "votes.jsonl"
    path.write_text(json.dumps(vote().row()) + "\n\n" + line + "\n")
    with pytest.raises(UserError, match="line 3") as error:
        read_votes(path)
    assert says in str(error.value)


# ---------------------------------------------------------------- what they say


def test_win_rates_and_agreement():
    votes = [
        vote("1", "A"),  # SFT; scores agree
        vote("2", "B"),  # PPO; they do not
        vote("3", "B"),
        vote("4", "tie"),
        vote("5", "both bad"),
        vote("6", "A", models=("PPO", "SFT"), scores=(1.0, 1.0)),  # PPO; half
        vote("7", "A", models=("base", "SFT"), scores=None),
    ]
    first, second = win_rates(votes)
    assert (first["first"], first["second"], first["votes"]) == ("PPO", "SFT", 6)
    assert first["win_rate"] == pytest.approx((0 + 1 + 1 + 0.5 + 0.5 + 1) / 6)
    assert first["win_rate_low"] < 0.5 < first["win_rate_high"]
    assert (second["first"], second["second"], second["votes"], second["win_rate"]) == (
        "SFT",
        "base",
        1,
        0.0,
    )
    agreed = agreement(votes)
    assert (agreed["votes"], agreed["agreement"]) == (4, pytest.approx((1 + 0 + 0 + 0.5) / 4))
    assert agreement([vote(choice="tie")]) is None


# ---------------------------------------------------------------- as preference data


def many_votes(path, count=60, choose=lambda a, b: "A" if len(a) < len(b) else "B"):
    """Votes on as many prompts; by default for the shorter answer, shown on either side."""
    file = VoteFile(path)
    for i in range(count):
        long = ("It depends. ", "Let me explain. ", "That is a good question. ")
        answers = [
            ("Yes.", "No.", "I see.", "Maybe.")[i % 4],
            long[i % 3] + "There is a lot that one could say about it.",
        ]
        answers = answers[:: -1 if i % 2 else 1]
        file.add(
            vote(
                f"b{i}",
                choose(*answers),
                prompt=f"\n\nHuman: Question {i}?\n\nAssistant:",
                answers=answers,
            )
        )
    return file


def test_one_prompt_in_five_is_held_out_and_ties_teach_nothing(tmp_path, capsys):
    file = many_votes(tmp_path / "votes.jsonl", 200)
    file.add(vote("t", "tie"))
    file.add(vote("x", "both bad"))
    file.add(vote("same", answers=("Same.", "Same.")))
    file.undo("b7", "ann")
    votes = load_votes(str(file.path))
    assert votes.counts | {"train": 0, "held_out": 0} == {
        "votes": 202,
        "ties": 1,
        "both_bad": 1,
        "undone": 1,
        "unusable": 1,
        "train": 0,
        "held_out": 0,
    }
    assert len(votes.train) + len(votes.held_out) == 199
    assert 20 < len(votes.held_out) < 60
    assert all(len(pair.chosen) < len(pair.rejected) for pair in votes.train + votes.held_out)
    assert "1 ties, 1 both bad, 1 chosen and rejected are identical" in capsys.readouterr().out
    again = VoteFile(tmp_path / "more.jsonl")  # the same prompts stay held out, whoever votes
    for i, pair in enumerate(votes.held_out):
        again.add(vote(f"c{i}", "B", "bob", f"\n\nHuman: {pair.turns[0][1]}\n\nAssistant:"))
    assert load_votes(str(again.path)).train == []


def test_votes_are_a_data_set_too(tmp_path):
    file = many_votes(tmp_path / "votes.jsonl")
    file.add(vote("t", "tie"))
    file.undo("b3", "ann")
    pairs = [*load_pairs(str(file.path), "train"), *load_pairs(str(file.path), "test")]
    assert len(pairs) == 60  # what is no pair is dropped; a vote that was taken back stays one
    assert any(map(in_test_split, pairs))


def test_only_ties_are_nothing_to_learn_from(tmp_path):
    file = VoteFile(tmp_path / "votes.jsonl")
    file.add(vote(choice="tie"))
    with pytest.raises(UserError, match="no vote there prefers"):
        load_votes(str(file.path))


def test_voters_move_the_reward_model_to_their_taste(call_main, flags, trained, tmp_path):
    """Some like it short, some long; both models are judged by held-out votes of the first."""
    file = many_votes(tmp_path / "votes.jsonl", 120)
    long = many_votes(tmp_path / "long.jsonl", 120, lambda a, b: "A" if len(a) > len(b) else "B")
    held_out = len(load_votes(str(file.path)).held_out)
    more = [
        *flags["reward_train"],
        "--sft-checkpoint",
        trained.sft,
        "--learning-rate",
        "3e-3",
        "--max-steps",
        "60",
    ]
    found = {}
    for name, votes in {"short": file.path, "long": long.path}.items():
        folder = tmp_path / name
        extra = ["--extra-data", votes, "--extra-weight", "2"]
        result = call_main("reward_train", [*more, *extra, "--output-dir", folder])
        assert result.returncode == 0, result.stderr
        judged = ["--eval-only", "--overwrite", "--extra-data", file.path, "--output-dir", folder]
        result = call_main("reward_train", [*more, *judged])
        assert result.returncode == 0, result.stderr
        assert f"held-out votes {held_out}: accuracy" in result.stdout
        found[name] = json.loads((folder / "evaluation.json").read_text())["votes_accuracy"]
    assert found["short"] > 0.8
    assert found["long"] < 0.2
    run = json.loads((tmp_path / "short" / "run.json").read_text())
    assert run["metrics"]["votes_accuracy"] == found["short"]
    assert run["data"]["votes"] == {
        "votes": 120,
        "ties": 0,
        "both_bad": 0,
        "undone": 0,
        "unusable": 0,
        "train": 120 - held_out,
        "held_out": held_out,
        "source": str(file.path),
        "weight": 2,
    }
    without = json.loads((trained.reward / "run.json").read_text())
    assert run["data"]["train_rows"] == without["data"]["train_rows"] + 2 * (120 - held_out)
    assert "votes" not in without["data"]
