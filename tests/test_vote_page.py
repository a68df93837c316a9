"""The page of feedback.vote, in a real browser: what it deals and shows, and no vote lost."""

import contextlib
import dataclasses
import json
import random
import shutil
import signal
import socket
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from forked import Run, free_port

from rlhf.data.votes import VoteFile, read_votes
from rlhf.runs.errors import UserError

pytest.importorskip("gradio", reason="Gradio is not installed (requirements-feedback.txt)")
from feedback import vote as page

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
HOSTILE = (
    "</div></textarea><script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>"
    "${window.hacked = 3}{{window.hacked = 4}}<a href='javascript:window.hacked = "
    "5'>x</a>\x1b[31m\u202eabc"
)


def report(
    prompts=12,
    models=("base", "SFT", "PPO"),
    text=lambda name, i: f"{name} says {i}" + " and so on" * i,
):
    def answer(name, i):
        return {"text": text(name, i), "tokens": 4, "ended_by": "eos", "score": len(name) / 10}

    return {
        "models": {name: f"the {name} model" for name in models},
        "flags": {},
        "runs": {},
        "prompts": [
            {
                "turns": [["user", f"Question {i}?"]],
                "answers": {name: answer(name, i) for name in models},
            }
            for i in range(prompts)
        ],
    }


def write_report(path, *args, **changes):
    path.write_text(json.dumps(report(*args, **changes)))
    return path


def make_poll(folder, models=(), **changes):
    read, digest = page.read_report(write_report(folder / "compare.json", **changes))
    return page.Poll(
        read, digest, models or tuple(read["models"]), VoteFile(folder / "votes.jsonl")
    )


# ---------------------------------------------------------------- what is dealt


def test_everyone_gets_each_comparison_once(tmp_path):
    poll = make_poll(tmp_path, prompts=4)
    seen = []
    for _ in range(20):
        ballot = poll.deal("ann")
        if ballot is None:
            break
        seen.append((ballot.turns, frozenset(ballot.models.values())))
        poll.votes.add(ballot.vote("A", "ann"))
    assert len(seen) == len(set(seen)) == 4 * 3
    assert poll.deal("bob") is not None


def test_what_has_the_fewest_votes_comes_first(tmp_path):
    poll = make_poll(tmp_path, models=("SFT", "PPO"), prompts=5)
    for voter in ("ann", "bob"):
        for _ in range(3):
            poll.votes.add(poll.deal(voter).vote("A", voter))
    count = Counter(k for k, _ in poll.judged())
    assert sorted(count.values()) == [1, 1, 1, 1, 2]


def test_sides_are_drawn_and_belong_to_the_id(tmp_path):
    poll = make_poll(tmp_path, models=("SFT", "PPO"), prompts=1)
    left = Counter()
    for _ in range(400):
        ballot = poll.deal("ann")
        left[ballot.models["A"]] += 1
        assert {
            side: answer["text"].split()[0] for side, answer in ballot.answers.items()
        } == ballot.models
        assert poll.ballot(ballot.id) == ballot
    assert 140 < left["PPO"] < 260  # 6 standard deviations


def round_of_votes(folder, name, ppo, reward, choose, prompts=8):
    """Everyone of a round, by model, in one file of votes; the report may have other prompts."""
    made = report(prompts, models=("SFT", "PPO"))
    shas = {"sft": "1", "ppo": ppo, "reward": reward}
    made["runs"] = {phase: {"adapter_sha256": sha} for phase, sha in shas.items()}
    (folder / name).write_text(json.dumps(made))
    read, digest = page.read_report(folder / name)
    poll = page.Poll(read, digest, ("SFT", "PPO"), VoteFile(folder / "votes.jsonl"))
    for _ in range(prompts):
        ballot = poll.deal("ann")
        side = next(side for side, model in ballot.models.items() if model == choose)
        poll.votes.add(ballot.vote(side, "ann"))
    poll.votes.file.close()
    return page.results(poll)


def test_results_are_of_the_models_in_the_report(tmp_path):
    """A new PPO is not an old one; other prompts to the same checkpoints are the same models."""
    first = round_of_votes(tmp_path, "1.json", "old", "judge", "SFT")
    assert "<td>0 %</td><td>0 to 32 %</td><td>8</td>" in first and "Left out" not in first
    second = round_of_votes(tmp_path, "2.json", "new", "judge", "PPO")
    assert "<td>100 %</td><td>68 to 100 %</td><td>8</td>" in second
    assert "Left out: 8 earlier votes on other models." in second
    assert "prefers the same answer" in second and "<td>16</td>" not in second
    more = round_of_votes(tmp_path, "3.json", "new", "another", "PPO", prompts=5)
    assert "<td>100 %</td><td>77 to 100 %</td><td>13</td>" in more
    assert more.count("<td>5</td>") == 1  # of the new judge
    assert "Left out: 8 earlier votes on other models." in more


def test_votes_that_do_not_record_checkpoints_count_for_their_own_report(tmp_path):
    poll = make_poll(tmp_path, prompts=2)
    vote = poll.deal("ann").vote("A", "ann")
    older = dataclasses.replace(vote, checkpoints=None)
    assert poll.counts(older)
    assert not poll.counts(dataclasses.replace(older, ballot=f"00000000-{vote.ballot[9:]}"))


def test_a_ballot_of_another_report_is_unknown(tmp_path):
    poll = make_poll(tmp_path, prompts=2)
    ballot = poll.deal("ann")
    for id in (
        "",
        "x",
        "x-1-2",
        ballot.id.replace(poll.digest, "00000000"),
        f"{poll.digest}-99-ab",
        f"{poll.digest}-²-ab",
    ):
        assert poll.ballot(id) is None
    vote = ballot.vote("B", "ann")
    assert vote.prompt.startswith("\n\nHuman: Question ")
    assert vote.scores == {side: len(name) / 10 for side, name in vote.models.items()}


def test_answers_that_are_the_same_are_not_asked_about(tmp_path):
    poll = make_poll(
        tmp_path, prompts=3, text=lambda name, i: "The same." if name != "PPO" else f"PPO {i}"
    )
    assert {
        tuple(sorted(poll.ballot(f"{poll.digest}-{k}-0").models.values())) for k in poll.open
    } == {
        ("PPO", "SFT"),
        ("PPO", "base"),
    }
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match="no prompt with two different answers"):
        make_poll(tmp_path / "other", text=lambda name, i: "The same.")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "cannot be read"),
        ("{", "JSON"),
        ("[]", "TypeError"),
        ("{}", "models"),
        ('{"models": {"a": ""}, "prompts": [{"turns": [], "answers": {}}]}', "no user turn"),
        ('{"models": {"a": ""}, "prompts": [{"turns": [["user", "Hi"]], "answers": {}}]}', "'a'"),
    ],
)
def test_what_is_no_report_is_named(tmp_path, content, says):
    path = tmp_path / "compare.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match="--report") as error:
        page.read_report(path)
    assert says in str(error.value)


# ---------------------------------------------------------------- a server


class Server:
    """`python -m feedback.vote` as people start it."""

    def __init__(self, folder: Path, *flags: str):
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}/"
        self.votes = folder / "votes.jsonl"
        files = ["--report", folder / "compare.json", "--votes", self.votes]
        self.command = ["-m", "feedback.vote", *files, "--port", self.port, *flags]
        self.log = folder / "server.log"
        self.start()

    def start(self):
        self.process = Run(self.command, log=self.log)
        for _ in range(600):
            time.sleep(0.2)
            assert self.process.poll() is None, self.log.read_text()
            with (
                contextlib.suppress(OSError),
                socket.create_connection(("127.0.0.1", self.port), 0.2),
            ):
                return
        raise AssertionError(f"the server does not answer: {self.log.read_text()}")

    def kill(self):
        self.process.kill()


@pytest.fixture
def serve(tmp_path):
    servers = []

    def serve(*flags, **changes):
        write_report(tmp_path / "compare.json", **changes)
        servers.append(Server(tmp_path, *flags))
        return servers[-1]

    yield serve
    for server in servers:
        server.kill()


def client_votes(server: Server, count: int, acknowledged: list[str]) -> None:
    """Vote `count` times; after a lost reply, ask again with the same ballot until it is kept."""
    from gradio_client import Client

    client = None
    ballot = None
    done = 0
    give_up = time.monotonic() + 600
    while done < count:
        assert time.monotonic() < give_up
        try:
            if client is None:
                client = Client(server.url, verbose=False)
            if ballot is None:
                ballot = client.submit(api_name="/start").result(timeout=20)[0]
            following = client.submit(ballot, random.choice(page.CHOICES), api_name="/vote").result(
                timeout=20
            )[0]
        except Exception:  # the server is down
            client = None
            time.sleep(0.2)
            continue
        acknowledged.append(ballot)
        ballot = following
        done = done + 1


@pytest.mark.parametrize(
    ("clients", "votes", "kills"), [(2, 6, 1), pytest.param(8, 125, 2, marks=pytest.mark.slow)]
)
def test_every_acknowledged_vote_is_in_the_file_once(serve, clients, votes, kills):
    server = serve(prompts=500)
    acknowledged = [[] for _ in range(clients)]
    work = [
        threading.Thread(target=client_votes, args=(server, votes, acks), daemon=True)
        for acks in acknowledged
    ]
    for thread in work:
        thread.start()
    for kill in range(kills):
        while sum(map(len, acknowledged)) < clients * votes * (kill + 1) / (kills + 1):
            time.sleep(0.05)
            assert any(thread.is_alive() for thread in work)
        server.kill()
        server.start()
    for thread in work:
        thread.join()
    assert [len(acks) for acks in acknowledged] == [votes] * clients
    rows = [json.loads(line) for line in server.votes.read_text().splitlines()]
    times = Counter(row["ballot"] for row in rows)
    assert set(times.values()) == {1}
    assert set(sum(acknowledged, [])) <= set(times)
    assert len(read_votes(server.votes)[0]) == len(times)
    print(f"acknowledged {clients * votes}, in the file {len(times)}, kills {kills}, torn lines 0")


def test_only_this_machine_unless_told_and_then_with_a_password(serve):
    server = serve()
    with socket.socket() as probe:  # 0.0.0.0 would answer at any loopback address
        assert probe.connect_ex(("127.0.0.2", server.port)) != 0
    while "Vote at" not in server.log.read_text():
        time.sleep(0.1)
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(60) == 0
    assert server.log.read_text().splitlines()[-1] == f"Stopped; 0 votes stand in {server.votes}."
    open_server = serve("--share-on-network")
    with socket.create_connection(("127.0.0.2", open_server.port), 5):
        pass
    import httpx

    while "password" not in open_server.log.read_text():
        time.sleep(0.1)
    password = open_server.log.read_text().split("the password ")[1].split()[0]
    assert httpx.get(open_server.url + "config").status_code == 401
    assert (
        httpx.post(
            open_server.url + "login", data={"username": "eve", "password": "wrong"}
        ).status_code
        == 400
    )
    with httpx.Client() as session:
        assert (
            session.post(
                open_server.url + "login", data={"username": "ann", "password": password}
            ).status_code
            == 200
        )
        assert session.get(open_server.url + "config").status_code == 200


# ---------------------------------------------------------------- a browser


@pytest.fixture
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM:
        pytest.skip("there is no Chromium")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


def wait_for(tab, text):
    tab.wait_for_function(
        "text => document.querySelector('#progress')?.innerText.includes(text)",
        arg=text,
        timeout=120_000,
    )


def test_a_person_votes_with_the_keyboard(serve, browser):
    server = serve("--models", "SFT", "PPO", "--voter", "ann", prompts=3)
    tab = browser.new_page(viewport={"width": 360, "height": 800})
    problems = []
    requests = []
    tab.on(
        "console",
        lambda message: problems.append(message.text) if message.type == "error" else None,
    )
    tab.on("pageerror", lambda error: problems.append(str(error)))
    tab.on("request", lambda request: requests.append(request.url))
    tab.goto(server.url)
    wait_for(tab, "0 of 3")
    shown = tab.locator("#answer-A .text").inner_text(), tab.locator("#answer-B .text").inner_text()
    assert not any(name in tab.locator("body").inner_text() for name in ("SFT model", "PPO model"))
    tab.keyboard.press("b")
    wait_for(tab, "1 of 3")
    tab.keyboard.press("u")
    wait_for(tab, "0 of 3")
    assert (
        tab.locator("#answer-A .text").inner_text(),
        tab.locator("#answer-B .text").inner_text(),
    ) == shown
    server.kill()  # the page stays open, and goes on where it was
    server.start()
    for keys, progress in (("a", "1 of 3"), ("t", "2 of 3"), ("x", "3 of 3")):
        tab.keyboard.press(keys)
        wait_for(tab, progress)
    assert "judged every comparison" in tab.locator("#prompt").inner_text()
    assert tab.locator("#vote-A").is_disabled()
    rows = [json.loads(line) for line in server.votes.read_text().splitlines()]
    assert [row.get("vote", "undone") for row in rows] == ["B", "undone", "A", "tie", "both bad"]
    assert (rows[2]["chosen"], rows[2]["rejected"]) == shown
    assert {row["voter"] for row in rows} == {"ann"}
    for _ in range(4):  # the results open by keyboard, too
        tab.keyboard.press("Tab")
        if "Results" in tab.evaluate("document.activeElement.innerText"):
            break
    tab.keyboard.press("Enter")
    tab.wait_for_selector("#results td")
    assert "PPO over SFT" in tab.locator("#results").inner_text()
    assert tab.evaluate("document.documentElement.scrollWidth") <= 360
    assert [url for url in requests if not url.startswith((server.url, "data:", "blob:"))] == []
    assert [text for text in problems if "ERR_CONNECTION_REFUSED" not in text] == []


def test_hostile_text_is_inert(serve, browser):
    server = serve("--voter", HOSTILE, prompts=1, text=lambda name, i: f"{name} {HOSTILE}")
    tab = browser.new_page()
    tab.on("dialog", lambda dialog: pytest.fail("a dialog opened"))
    tab.goto(server.url)
    wait_for(tab, "0 of 3")
    tab.keyboard.press("a")
    wait_for(tab, "1 of 3")
    assert tab.evaluate("window.hacked") is None
    assert tab.locator("#answer-A .text").inner_text().endswith("\ufffd[31m\ufffdabc")
    assert "<script>window.hacked = 1</script>" in tab.locator("#answer-A .text").inner_text()
    assert tab.locator("#answer-A :is(script, img, a)").count() == 0


def test_an_own_prompt_is_answered_by_the_checkpoints(
    serve, browser, call_main, flags, trained, tmp_path
):
    where = [
        "--sft-checkpoint",
        trained.sft,
        "--reward-checkpoint",
        trained.reward,
        "--ppo-checkpoint",
        tmp_path / "none",
    ]
    done = call_main(
        "compare_outputs",
        ["--dtype", "fp32", *where, "--max-new-tokens", "8", "--output-dir", tmp_path / "reports"],
    )
    assert done.returncode == 0, done.stderr
    made = json.loads((tmp_path / "reports" / "compare.json").read_text())
    made["prompts"] = made["prompts"][:1]
    for name, text in zip(made["models"], ("One.", "Two."), strict=True):
        made["prompts"][0]["answers"][name]["text"] = text
    server = serve("--voter", "ann")
    server.kill()
    (tmp_path / "compare.json").write_text(json.dumps(made))
    server.start()
    tab = browser.new_page()
    tab.goto(server.url)
    wait_for(tab, "0 of 1")
    tab.get_by_text("Ask something of your own").click()
    tab.locator("#own-prompt textarea").fill("What about <b>tea</b>?")
    tab.locator("#ask").click()
    tab.wait_for_function(
        "document.querySelector('#prompt').innerText.includes('tea')", timeout=180_000
    )
    assert "What about <b>tea</b>?" in tab.locator("#prompt").inner_text()
    tab.locator("#vote-B").click()
    tab.wait_for_function("!document.querySelector('#prompt').innerText.includes('tea')")
    (row,) = [json.loads(line) for line in server.votes.read_text().splitlines()]
    assert row["prompt"] == "\n\nHuman: What about <b>tea</b>?\n\nAssistant:"
    assert set(row["models"].values()) == {"base", "SFT"}
    assert all(isinstance(score, float) for score in row["scores"].values())
