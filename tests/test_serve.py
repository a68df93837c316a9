"""The exported folder behind `transformers serve`: a client reads what `generate` says."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from conftest import make_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf.engine.tokenizers import load_tokenizer

for name in ("openai", "fastapi", "uvicorn"):
    pytest.importorskip(
        name, reason=f'{name} is not installed: pip install "transformers[serving]"'
    )
import openai

STARTS = 120  # seconds, after which a server that says nothing is taken to hang
ONE = ([("user", "How do I boil an egg?")], "<bos>\n\nHuman: How do I boil an egg?\n\nAssistant:")
SYSTEM = (
    [("system", " You are brief. "), ("user", "Hi")],
    "<bos>You are brief.\n\nHuman: Hi\n\nAssistant:",
)
SEVERAL = (
    [("user", "Hi"), ("assistant", "Hello, what is it?"), ("user", "A poem, please\n")],
    "<bos>\n\nHuman: Hi\n\nAssistant: Hello, what is it?\n\nHuman: A poem, please\n\nAssistant:",
)
CHATS = {"one turn": ONE, "a system message": SYSTEM, "several turns": SEVERAL}


@contextlib.contextmanager
def serving():
    """The address of a server that loads what a request names; gone when the block ends."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        Path(sys.executable).parent / "transformers",
        "serve",
        "--device",
        "cpu",
        "--host",
        "127.0.0.1",
    ]
    process = subprocess.Popen(
        [*command, "--port", str(port)],
        env={**os.environ, "NO_COLOR": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        deadline = time.monotonic() + STARTS
        while not answers(f"http://127.0.0.1:{port}/health"):
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                pytest.fail(f"transformers serve does not start:\n{process.communicate()[0]}")
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


def answers(url: str) -> bool:
    try:
        return urllib.request.urlopen(url, timeout=5).status == 200
    except OSError:
        return False


@pytest.fixture(scope="module")
def client():
    with (
        serving() as url,
        openai.OpenAI(base_url=url, api_key="-", max_retries=0, timeout=60) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def exported(trained, call_main, tmp_path_factory) -> Path:
    """A random model, whose answers depend on all of the prompt."""
    folder = tmp_path_factory.mktemp("serving") / "exported"
    result = call_main("rlhf.export", [trained.sft, folder])
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture(scope="module")
def parrot(flags, call_main, tmp_path_factory):
    """`parrot(name, text)`: an exported model that says `text` whatever it is asked."""

    def parrot(name: str, text: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        base = make_model(folder / "base", hidden_size=512, layers=2)
        tokenizer = load_tokenizer(str(base))
        tokenizer.add_tokens(["\n\n"])
        tokenizer.save_pretrained(base)
        config = base / "config.json"
        config.write_text(
            config.read_text().replace(
                '"tie_word_embeddings": true', '"tie_word_embeddings": false'
            )
        )
        weights = load_file(base / "model.safetensors")
        for key, weight in weights.items():
            if "norm" not in key:
                weight.zero_()
        # a hidden state is its token, whatever stood before
        weights["model.embed_tokens.weight"].fill_diagonal_(1.0)
        weights["lm_head.weight"] = torch.zeros_like(weights["model.embed_tokens.weight"])
        said = tokenizer(f"Assistant:{text}", add_special_tokens=False)["input_ids"]
        said = said[said.index(tokenizer.convert_tokens_to_ids(":")) :]
        assert len(set(said[:-1])) == len(said) - 1, "each token must tell which is next"
        for token, following in zip(said, said[1:], strict=False):
            weights["lm_head.weight"][following, token] = 1.0
        save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
        sft = [
            *flags["sft_train"],
            "--base-model",
            base,
            "--learning-rate",
            "1e-9",
            "--output-dir",
            folder / "sft",
        ]
        for script, argv in (
            ("sft_train", sft),
            ("rlhf.export", [folder / "sft", folder / "exported"]),
        ):
            result = call_main(script, argv)
            assert result.returncode == 0, result.stderr
        return folder / "exported"

    return parrot


def ask(client, folder, chat, **options):
    """The answer's text, why it ended, prompt tokens; and the text again as it is streamed."""
    messages = [{"role": role, "content": text} for role, text in chat]
    options = {
        "model": str(folder),
        "messages": messages,
        "temperature": 0,
        "max_tokens": 32,
    } | options
    whole = client.chat.completions.create(**options)
    chunks = list(client.chat.completions.create(stream=True, **options))
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    choice = whole.choices[0]
    assert chunks[-1].choices[0].finish_reason == choice.finish_reason
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens
    return choice.message.content, choice.finish_reason, whole.usage.prompt_tokens, streamed


@pytest.mark.parametrize("chat", CHATS)
def test_a_served_answer_is_what_generate_says(client, exported, chat):
    """The prompt as a literal: one BOS, each role once, the system's text before the first turn."""
    turns, literal = CHATS[chat]
    tokenizer = AutoTokenizer.from_pretrained(exported)
    ids = tokenizer(literal, add_special_tokens=False, return_tensors="pt")["input_ids"]
    assert ids[0].tolist().count(tokenizer.bos_token_id) == 1
    model = AutoModelForCausalLM.from_pretrained(exported)
    expected = tokenizer.decode(
        model.generate(ids, do_sample=False, max_new_tokens=32)[0, ids.shape[1] :]
    )
    text, _, prompt_tokens, streamed = ask(client, exported, turns)
    assert text == expected.partition("<eos>")[0].partition("\n\nHuman:")[0].strip() != ""
    assert prompt_tokens == ids.shape[1]
    # A stream holds back a character whose last bytes the limit cuts off.
    assert streamed.strip() == text.rstrip("\N{REPLACEMENT CHARACTER}").strip()


def test_eos_ends_an_answer(client, parrot):
    text, reason, _, streamed = ask(client, parrot("polite", " Fine, thanks.<eos>:"), ONE[0])
    assert (text, reason, streamed) == ("Fine, thanks.", "stop", "Fine, thanks.")


def test_the_next_turn_is_no_part_of_an_answer(client, parrot):
    """A model that runs on: its answer ends where the next turn begins."""
    chatty = parrot("chatty", " Fine.\n\nHuman:")
    text, reason, _, streamed = ask(client, chatty, ONE[0])
    assert (text, reason, streamed) == ("Fine.", "length", "Fine.")
    text, reason, _, streamed = ask(client, chatty, ONE[0], stop=["\n\nHuman:"])
    assert (text, reason, streamed) == ("Fine.", "stop", "Fine.")
