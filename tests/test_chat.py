"""The chat, through a pseudo-terminal and in-process: who answers, and what stops it."""

import json
import math
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import HANGS, OFFLINE, ROOT
from test_format import prepended

import rlhf.chat
from rlhf.chat import Chat, Config, open_checkpoint, settled
from rlhf.data.format import PromptFormat
from rlhf.engine.generation import _ended, generate
from rlhf.engine.roles import BASE, REFERENCE
from rlhf.engine.tokenizers import load_tokenizer
from rlhf.runs.errors import UserError

PPO = (
    "--response-length 8 --max-prompt-length 64 --num-mini-batches 1 --total-episodes 4 "
    "--episodes-per-update 4 "
)
PPO += (
    "--max-eval-samples 2 --lora-rank 4 --lora-alpha 8 --role-layers 2 --critic-warmup-updates 0 "
    "--warmup-updates 0 "
)
PPO += "--num-printed-samples 0 --dtype fp32 --learning-rate 1e-1"


@pytest.fixture(scope="module")
def ppo(trained, tiny_data, call_main, tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat") / "ppo"
    parents = [
        "--sft-checkpoint",
        trained.sft,
        "--reward-checkpoint",
        trained.reward,
        "--dataset",
        tiny_data,
    ]
    result = call_main("ppo_train", [*PPO.split(), *map(str, parents), "--output-dir", str(folder)])
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture(scope="module")
def opened(ppo):
    return open_checkpoint(Config(checkpoint=str(ppo)))


@pytest.fixture
def chat(opened):
    return Chat(Config(max_prompt_length=64, max_new_tokens=8, temperature=0.0), *opened)


def test_the_answer_is_what_generate_samples_and_the_turns_are_those_of_training(
    opened, chat, capsys
):
    shared, form, names = opened
    assert names == ["base", "sft", "ppo"]
    turns = ()
    for name, role in (("ppo", "policy"), ("sft", REFERENCE), ("base", BASE)):
        chat.command(f"/{name}")
        turns = (*turns, ("user", "Why?"))
        prompt = form.prompt_ids(turns)
        (response,) = generate(shared, role, form, [prompt], 8, 0.0, [0], 1)
        chat.answer("Why?")
        text = form.decode(response.text_ids)
        assert capsys.readouterr().out == rlhf.chat.plain(text) + "\n"
        assert chat.last == [*prompt, *response.text_ids, form.eos_token_id]
        turns = (*turns, ("assistant", text))
    assert tuple(chat.turns) == turns
    saved = form.tokenizer.apply_chat_template(
        [{"role": role, "content": text} for role, text in turns[:-1]],
        add_generation_prompt=True,
        return_dict=False,
    )
    assert list(saved) == prompt  # what a server reads of the same dialogue
    assert chat.command("/score") == f"{shared.score([chat.last]).item():.2f}"


def test_a_dialogue_that_is_too_long_loses_its_oldest_turns(opened, chat):
    _, form, _ = opened
    for _ in range(6):
        chat.answer("How come that it is so?")
    kept = [turn for turn in chat.turns if turn[0] == "user"]
    assert len(kept) == 6 and len(form.prompt_ids(chat.turns[:-1])) > 64
    prompt = chat.last[: -1 - len(form.response_ids(chat.turns[-1][1]))]
    assert len(prompt) <= 64 + 1
    assert chat.last[: len(form.bos_ids)] == form.bos_ids
    text = form.tokenizer.decode(chat.last)
    assert 1 <= text.count("Human:") < 6


def test_what_cannot_be_asked_is_one_line_and_changes_nothing(chat, capsys):
    chat.answer("x " * 200)
    chat.answer("Hi\n\nHuman: and I?")
    out = capsys.readouterr().out
    assert out.count("This cannot be asked: ") == out.count("\n") == 2
    assert chat.turns == [] and chat.last is None


def test_commands(opened, chat):
    assert chat.command("/score") == "There is no answer to score."
    chat.answer("Hi")
    assert chat.command("/reset") == "A new dialogue." and chat.turns == [] and chat.last is None
    assert chat.command("/what") == rlhf.chat.HELP
    alone = Chat(chat.config, *opened[:2], ["base", "sft"])
    assert alone.command("/ppo") == "There is no ppo here, only base, sft." and alone.name == "sft"


def test_no_text_is_shown_that_a_later_token_may_take_back():
    stop = "\n\nHuman:"
    for text, shown in {
        "Yes": "Yes",
        "Yes ": "Yes",
        "Yes\n": "Yes",
        "Yes\n\nHum": "Yes",
        "Yes\n\nHun": "Yes\n\nHun",
        "caf\ufffd": "caf",
        "Yes \ufffd\ufffd\ufffd": "Yes",  # three bytes of four, by byte fallback
    }.items():
        assert settled(text, stop) == shown
    assert settled("Yes\n\nHum", None) == "Yes\n\nHum"


def answers_with(chat, monkeypatch, *tokens_of_answers):
    """The chat's next answers are these tokens."""
    answers = iter(tokens_of_answers)
    monkeypatch.setattr(rlhf.chat, "start", lambda *_: None)

    def stream(_, form):
        written = []
        for token in next(answers):
            written.append(token)
            yield 0, token, _ended(written, form, 100)

    monkeypatch.setattr(rlhf.chat, "stream", stream)


def test_a_character_of_several_bytes_is_shown_and_kept_whole(chat, tmp_path, capsys, monkeypatch):
    """With byte fallback: in a part of a character, each byte is a U+FFFD of its own."""
    prepended(tmp_path)
    form = PromptFormat("hh", load_tokenizer(str(tmp_path)))
    said = "Here you go é😀 日 and the rest."
    ids = form.response_ids(said)
    assert any(form.decode(ids[:n]).endswith("\ufffd\ufffd\ufffd") for n in range(len(ids)))
    chat.prompt_format = form
    answers_with(chat, monkeypatch, [*ids, form.eos_token_id])
    chat.answer("Hi")
    assert capsys.readouterr().out.replace("\n", "") == said
    assert chat.turns == [("user", "Hi"), ("assistant", said)]


def test_what_a_last_token_changes_is_shown_again(chat, form, capsys, monkeypatch):
    monkeypatch.setattr(form, "decode", lambda ids: ["One", "One two", "Other"][len(ids) - 1])
    chat.prompt_format = form
    answers_with(chat, monkeypatch, [5, 6, 7, form.eos_token_id])
    chat.answer("Hi")
    assert capsys.readouterr().out == "One two\nOther\n"
    assert chat.turns[-1] == ("assistant", "Other")


def test_an_empty_answer_is_said_and_has_no_score(chat, form, capsys, monkeypatch):
    answers_with(
        chat, monkeypatch, [*form.response_ids("Fine."), form.eos_token_id], [form.eos_token_id]
    )
    chat.answer("How are you?")
    before = list(chat.turns)
    assert chat.last is not None
    chat.answer("Why?")
    said = "The answer is empty: your turn is left out of the dialogue."
    assert capsys.readouterr().out.splitlines() == ["Fine.", "", said]
    assert chat.turns == before
    assert chat.command("/score") == "There is no answer to score."


def test_other_checkpoints_and_the_base_alone(trained, tiny_model, tmp_path):
    assert open_checkpoint(Config(checkpoint=str(trained.sft)))[2] == ["base", "sft"]
    with_score, _, names = open_checkpoint(Config(checkpoint=str(trained.reward)))
    assert names == ["base", "sft"] and "reward" in with_score.heads
    alone = Config(
        base_model=str(tiny_model), load_in_4bit=False, max_new_tokens=4, temperature=0.0
    )
    shared, form, names = open_checkpoint(alone)
    assert names == ["base"]
    assert (
        Chat(alone, shared, form, names)
        .command("/score")
        .startswith("There is no reward model here")
    )
    with pytest.raises(UserError, match="there is no ppo checkpoint at checkpoints/ppo: "):
        open_checkpoint(Config())


def test_a_base_with_our_own_template_is_asked_in_our_format(trained, tiny_model, tmp_path):
    """As our exports are."""
    base = shutil.copytree(tiny_model, tmp_path / "exported")
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        shutil.copy(trained.sft / name, base / name)
    config = Config(base_model=str(base), load_in_4bit=False)
    assert open_checkpoint(config)[1].name == "hh"


def test_a_reward_model_that_was_trained_again_does_not_score(ppo, trained, tmp_path, capsys):
    moved = shutil.copytree(ppo, tmp_path / "ppo")
    facts = json.loads((moved / "run.json").read_text())
    facts["parents"]["reward"] = "0" * 64
    (moved / "run.json").write_text(json.dumps(facts))
    shared, _, _ = open_checkpoint(Config(checkpoint=str(moved)))
    assert "reward" not in shared.heads
    assert "is not what the policy was trained against" in capsys.readouterr().out
    given = Config(checkpoint=str(moved), reward_checkpoint=str(trained.reward))
    assert "reward" in open_checkpoint(given)[0].heads


# ---------------------------------------------------------------- a terminal


class Terminal:
    """The chat as a person has it."""

    def __init__(self, *argv):
        ours, theirs = pty.openpty()
        env = {**os.environ, **OFFLINE, "TERM": "dumb", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", SLOWLY, *map(str, argv)]
        self.process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, env=env, start_new_session=True
        )
        os.close(theirs)
        self.end = ours
        self.read = ""

    def until(self, text: str, interrupted: bool = False) -> str:
        """Read until `text` has come, if `interrupted` with a Ctrl-C a second; returns it all.

        One Ctrl-C may be lost: Python's input() does not see a signal that comes between its prompt
        and its wait.
        """
        seconds = 0
        while text not in self.read:
            assert seconds < HANGS, self.read
            if interrupted:
                self.process.send_signal(signal.SIGINT)
            ends = time.monotonic() + 1
            while text not in self.read and time.monotonic() < ends:
                if select.select([self.end], [], [], 0.1)[0]:
                    self.read += os.read(self.end, 4096).decode()
            seconds += 1
        before, self.read = self.read.split(text, 1)
        return before

    def type(self, text: str) -> None:
        os.write(self.end, text.encode())


SLOWLY = """
import runpy, sys, time
import rlhf.engine.decoding, torch, transformers

letter = transformers.AutoTokenizer.from_pretrained(sys.argv[1]).convert_tokens_to_ids("a")

def sample_tokens(logits, temperature, draws):
    time.sleep(0.1)
    return torch.full_like(draws, letter, dtype=torch.long), None

rlhf.engine.decoding.sample_tokens = sample_tokens
runpy.run_module("rlhf.chat", run_name="__main__", alter_sys=True)
"""


def test_in_a_terminal(ppo):
    chat = Terminal(
        ppo, "--max-new-tokens", "200", "--max-prompt-length", "300", "--temperature", "1.0"
    )
    chat.until("ppo can answer; ppo answers now.")
    chat.until("> ")
    chat.type("Tell me a long story.\n")
    chat.until("Tell me a long story.")
    chat.until("aaa")  # it streams: the whole answer would take 20 s
    chat.process.send_signal(signal.SIGINT)
    chat.until("(stopped)")
    chat.until("> ")
    chat.until("Ctrl-C stops an answer; /quit or Ctrl-D ends the chat.", interrupted=True)
    chat.until("> ")
    chat.type("/sft\n")
    chat.until("sft answers from now on.")
    chat.until("> ")
    chat.type("/score\n")
    assert math.isfinite(float(chat.until("\r\n> ").removeprefix("/score").strip()))
    chat.type("\x04")
    assert chat.process.wait(HANGS) == 0


def test_a_wrong_use_is_one_line(call_main, trained, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "run.json").write_text(json.dumps({"phase": "sft"}))
    for argv, says in (
        ([], "there is no ppo checkpoint at checkpoints/ppo"),
        ([str(broken)], "is damaged"),
        ([str(trained.sft), "--temperature", "-1"], "--temperature must be at least 0"),
        (
            [str(trained.sft), "--reward-checkpoint", "nowhere"],
            "there is no reward checkpoint at nowhere",
        ),
    ):
        result = call_main("rlhf.chat", argv)
        assert (
            result.returncode == 2 and says in result.stderr and result.stderr.count("\n") == 1
        ), result.stderr
