"""Blind votes: a local page shows a prompt and two unnamed answers. The votes go to a file.

    python compare_outputs.py --prompts my_prompts.txt --temperature 0.7 --overwrite
    python -m feedback.vote
    python reward_train.py --extra-data feedback/votes.jsonl

The prompts and answers are those of compare_outputs.py's report. Whoever types a prompt of their
own gets answers from the same checkpoints, which are loaded then. Votes are kept as
rlhf/data/votes.py says. Needs requirements-feedback.txt.
"""

import contextlib
import hashlib
import hmac
import html
import itertools
import json
import math
import os
import secrets
import socket
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.data.format import tokenize_prompt
from rlhf.data.rows import SPEAKERS, BadRow, checked_turns, hh_prompt, parse_dialogue
from rlhf.data.votes import CHOICES, JUDGE, Vote, VoteFile, agreement, win_rates
from rlhf.engine.base import same_base
from rlhf.engine.loading import load_base
from rlhf.engine.tokenizers import load_format
from rlhf.reports.answers import (
    Answer,
    Report,
    Turns,
    answers_of,
    check_lengths,
    load_models,
    read_runs,
)
from rlhf.runs.checkpoints import SCRIPTS
from rlhf.runs.cli import fail, run
from rlhf.runs.device import choose_dtype, device
from rlhf.runs.errors import UserError
from rlhf.runs.terminal import plain

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before it is imported

try:
    import gradio as gr
except ImportError:
    fail("Gradio is not installed: run `pip install -r requirements-feedback.txt`")

ASKED_WITH = (  # flags of the comparison that own prompts are answered with
    *("sft_checkpoint", "reward_checkpoint", "ppo_checkpoint", "base_model", "dtype"),
    *("max_prompt_length", "max_new_tokens", "temperature", "seed", "batch_size"),
)
OWN_KEPT = 1000  # comparisons of people's own prompts at most


@dataclass(frozen=True)
class Config:
    report: str = "reports/compare.json"  # of compare_outputs.py
    votes: str = "feedback/votes.jsonl"  # votes are appended to it
    models: tuple[str, ...] = ()  # two or more of the report's (base, SFT, PPO); none: all
    # who votes on this machine; on the network, the log-in's name
    voter: str = os.environ.get("USER") or "me"
    port: int = 7860
    share_on_network: bool = False  # let other machines in, with the password it prints


@dataclass(frozen=True)
class Ballot:
    """Two answers in the order shown."""

    id: str
    turns: Turns
    models: dict[str, str]  # by position, "A" and "B"; as are
    answers: dict[str, Answer]
    checkpoints: dict[str, str]  # as in a vote

    def vote(self, choice: str, voter: str) -> Vote:
        scores = {side: answer["score"] for side, answer in self.answers.items()}
        texts = {side: answer["text"] for side, answer in self.answers.items()}
        return Vote(
            self.id,
            voter,
            choice,
            hh_prompt(self.turns),
            texts,
            self.models,
            None if None in scores.values() else scores,
            self.checkpoints,
        )


def main(config: Config) -> None:
    report, digest = read_report(Path(config.report))
    poll = Poll(
        report, digest, config.models or tuple(report["models"]), VoteFile(Path(config.votes))
    )
    host = "127.0.0.1"
    auth = None
    if config.share_on_network:
        host = "0.0.0.0"
        password = secrets.token_urlsafe(9)

        def auth(name: str, given: str) -> bool:
            return bool(name.strip()) and hmac.compare_digest(given.encode(), password.encode())

        print(
            f"Log in at http://{socket.gethostname()}:{config.port} with any name and the password "
            f"{password}"
        )
    check_port(host, config.port)
    make_page(poll, config.voter).launch(
        server_name=host,
        server_port=config.port,
        auth=auth,
        share=False,
        quiet=True,
        theme=THEME,
        css=CSS,
        head=HEAD,
        footer_links=[],
        ssr_mode=False,
        prevent_thread_lock=True,
    )
    print(f"Vote at http://127.0.0.1:{config.port}; votes go to {config.votes}. Stop with Ctrl-C.")
    with contextlib.suppress(KeyboardInterrupt):
        threading.Event().wait()
    print(f"Stopped; {len(poll.votes.standing())} votes stand in {config.votes}.")


def check_port(host: str, port: int) -> None:
    if not 1 <= port <= 65535:
        raise UserError(f"--port must be from 1 to 65535, not {port}")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UserError(
                f"--port {port} cannot be used ({error.strerror}): choose another"
            ) from None


# ---------------------------------------------------------------- what is asked


def read_report(path: Path) -> tuple[Report, str]:
    """A report of compare_outputs.py, and its SHA-256. Raises UserError if it is none."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"--report {path} cannot be read ({error.strerror}): `python compare_outputs.py` makes "
            "one"
        ) from None
    try:
        report = json.loads(content)
        names = list(report["models"])
        for entry in report["prompts"]:
            entry["turns"] = checked_turns(
                [(str(role), str(text)) for role, text in entry["turns"]]
            )
            for name in names:
                answer = entry["answers"][name]
                if not isinstance(answer["text"], str) or not (
                    answer["score"] is None or math.isfinite(answer["score"])
                ):
                    raise ValueError("an answer without a text or a score")
        checkpoints_of(report)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, BadRow) as error:
        raise UserError(
            f"--report {path} is not a report of compare_outputs.py ({type(error).__name__}: "
            f"{error})"
        ) from None
    return report, hashlib.sha256(content).hexdigest()


def checkpoints_of(report: Report) -> dict[str, str]:
    """Hashes of what stands behind a report's names of models and behind JUDGE, as it records."""
    facts = {}
    if "base" in report:
        base = report["base"]
        origin = base.get("copy_of", base)  # wherever it has been moved to
        files = {name: file.get("sha256") for name, file in (base.get("weights") or {}).items()}
        facts["base"] = [origin["model"], origin.get("revision"), files]
    for name, phase in (("SFT", "sft"), ("PPO", "ppo"), (JUDGE, "reward")):
        if phase in report["runs"]:
            facts[name] = [report["runs"][phase]["adapter_sha256"]]
    rule = [report["flags"].get(flag) for flag in ("reward_function", "reward_weight")]
    if rule[0] is not None:
        facts[JUDGE] = [*facts.get(JUDGE, []), *rule]
    return {
        name: hashlib.sha256(json.dumps(fact, sort_keys=True).encode()).hexdigest()[:16]
        for name, fact in facts.items()
    }


class Poll:
    """Deals ballots from a report and counts votes; any number of threads may ask.

    A ballot's id alone says what it shows, so a page that was open when the server went down
    can still vote.
    """

    def __init__(self, report: Report, digest: str, models: tuple[str, ...], votes: VoteFile):
        names = list(report["models"])
        if len(set(models)) < 2 or set(models) - set(names):
            raise UserError(f"--models are two or more of {', '.join(names)}")
        self.report = report
        self.digest = digest[:8]
        self.checkpoints = checkpoints_of(report)
        self.votes = votes
        self.models = tuple(dict.fromkeys(models))  # each once
        self.own: dict[str, Ballot] = {}
        self.live = LiveModels(report)
        # (prompt, first model, second model) of all models, so that ids do not depend on flags
        self.comparisons = [
            (i, *pair)
            for i in range(len(report["prompts"]))
            for pair in itertools.combinations(names, 2)
        ]
        self.open = [
            k
            for k, (i, *pair) in enumerate(self.comparisons)
            if set(pair) <= set(models) and self.differ(i, *pair)
        ]
        if not self.open:
            raise UserError(
                "the report has no prompt with two different answers: make one with --temperature "
                "0.7"
            )

    def differ(self, i: int, first: str, second: str) -> bool:
        a, b = (
            self.report["prompts"][i]["answers"][name]["text"].strip() for name in (first, second)
        )
        return bool(a and b and a != b)

    def ballot(self, id: str) -> Ballot | None:
        """What an id stands for; None if this server does not know it."""
        digest, _, rest = id.partition("-")
        number = rest.partition("-")[0]
        if id in self.own:
            return self.own[id]
        if digest != self.digest or not (
            number.isdecimal() and int(number) in range(len(self.comparisons))
        ):
            return None
        i, *pair = self.comparisons[int(number)]
        entry = self.report["prompts"][i]
        return self.shuffled(id, entry["turns"], {name: entry["answers"][name] for name in pair})

    def shuffled(self, id: str, turns: Turns, answers: dict[str, Answer]) -> Ballot:
        """A ballot in an order that follows from the id."""
        names = list(answers)[:: -1 if hashlib.sha256(id.encode()).digest()[0] & 1 else 1]
        return Ballot(
            id,
            turns,
            dict(zip("AB", names, strict=True)),
            {s: answers[n] for s, n in zip("AB", names, strict=True)},
            self.checkpoints,
        )

    def deal(self, voter: str) -> Ballot | None:
        """A comparison with the fewest votes that `voter` has not judged; None if none is left."""
        count = dict.fromkeys(self.open, 0)
        seen = set()
        for k, who in self.judged():
            if k in count:
                count[k] += 1
                seen |= {k} if who == voter else set()
        left = [k for k in self.open if k not in seen]
        if not left:
            return None
        fewest = min(count[k] for k in left)
        k = secrets.choice([k for k in left if count[k] == fewest])
        return self.ballot(f"{self.digest}-{k}-{secrets.token_hex(4)}")

    def judged(self) -> list[tuple[int, str]]:
        """(comparison, voter) for each vote on this report."""
        parts = [(vote.ballot.split("-"), vote.voter) for vote in self.votes.standing()]
        return [
            (int(id[1]), voter) for id, voter in parts if id[0] == self.digest and id[1].isdecimal()
        ]

    def counts(self, vote: Vote, *judge: str) -> bool:
        """Whether a vote is on the very models of this report, and scored by its JUDGE if named.

        Votes that do not record their checkpoints are on them if they are on this very report.
        """
        names = {*vote.models.values(), *judge}
        recorded = vote.checkpoints or {}
        if not names <= recorded.keys():
            return vote.ballot.startswith(f"{self.digest}-")
        return all(recorded[name] == self.checkpoints.get(name) for name in names)

    def ask(self, text: str) -> Ballot:
        """Two models' answers to a prompt that someone typed.

        Raises UserError or BadRow if there are none.
        """
        turns = parse_dialogue(text)
        pair = secrets.SystemRandom().sample(self.models, 2)
        answers = {name: self.live.answer(turns, name) for name in pair}
        ballot = self.shuffled(f"{self.digest}-own-{secrets.token_hex(8)}", turns, answers)
        self.own[ballot.id] = ballot
        while len(self.own) > OWN_KEPT:
            self.own.pop(next(iter(self.own)))
        return ballot


class LiveModels:
    """The report's models, loaded when someone types the first prompt of their own."""

    def __init__(self, report: Report):
        self.report = report
        self.lock = threading.Lock()
        self.shared = None

    def load(self) -> None:
        flags = self.report["flags"]
        missing = [name for name in ASKED_WITH if name not in flags]
        if missing:
            raise UserError(f"the report does not say {missing[0]}: make the report again")
        folders = {phase: flags[f"{phase}_checkpoint"] for phase in SCRIPTS}
        runs = read_runs(folders)
        for phase, run_facts in self.report["runs"].items():
            if phase not in runs or runs[phase]["adapter_sha256"] != run_facts["adapter_sha256"]:
                raise UserError(
                    f"the {phase} checkpoint is not the one of the report: make the report again"
                )
        dtype = choose_dtype(flags["dtype"], device())
        self.base = same_base(runs["sft"], folders["sft"], flags["base_model"])
        self.prompt_format = load_format(folders["sft"], runs["sft"])
        self.scored = "reward" in runs
        model = load_base(self.base, dtype, self.prompt_format.pad_token_id)
        self.shared = load_models(model, folders, runs, dtype)

    def answer(self, turns: Turns, name: str) -> Answer:
        with self.lock:
            if self.shared is None:
                self.load()
            flags = self.report["flags"]
            ids = tokenize_prompt(turns, self.prompt_format, flags["max_prompt_length"])
            check_lengths(self.base, [ids], flags["max_new_tokens"])
            answers = answers_of(
                self.shared,
                self.prompt_format,
                [ids],
                name,
                self.scored,
                flags["max_new_tokens"],
                flags["temperature"],
                flags["seed"],
                flags["batch_size"],
            )
            return answers[0]


# ---------------------------------------------------------------- the page

CSS = """
.gradio-container { width: 100% !important; max-width: 1100px !important; }
.gradio-container { margin: 0 auto !important; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.55; font-size: 1.02rem; }
.card > b { display: block; margin-top: .6rem; font-size: .85rem; opacity: .75; }
.card { border: 1px solid var(--border-color-primary); border-radius: 10px; }
.card { padding: 14px 18px; height: 100%; }
.card h2 { margin: 0 0 .5rem; font-size: 1rem; }
.html-container, .html-container > * { padding: 0 !important; }
h1 { margin: .2rem 0 0; font-size: 1.5rem; }
#progress { align-self: center; }
#vote-undo { flex: none; align-self: center; }
#results :is(table, tr, td, th) { border: none !important; }
#results :is(td, th) { padding: .25rem 1rem .25rem 0; text-align: left; font-weight: normal; }
button:focus-visible { outline: 3px solid var(--body-text-color); outline-offset: 2px; }
@media (max-width: 700px) {
  .row:has(#answer-A) { flex-direction: column; }
  .row:has(#vote-A) { display: grid !important; grid-template-columns: 1fr 1fr; }
  #vote-B { order: -1; } #vote-A { order: -2; }
}
"""
# No font from the network; white on a blue that is easy to read.
THEME = gr.themes.Default(
    primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["monospace"]
).set(
    button_primary_background_fill="*primary_700",
    button_primary_background_fill_dark="*primary_700",
    button_primary_background_fill_hover="*primary_800",
    button_primary_background_fill_hover_dark="*primary_800",
)
HEAD = """<script>
const buttons = {a: "vote-A", b: "vote-B", t: "vote-tie", x: "vote-both-bad", u: "vote-undo"};
addEventListener("keydown", event => {
  const typing = event.target.closest("input, textarea, [contenteditable]");
  if (typing || event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;
  document.getElementById(buttons[event.key.toLowerCase()])?.click();
});
</script>"""


class Booth:
    """What the page shows, and what its buttons do.

    Args:
        local_voter: who votes, if there is no log-in.
    """

    def __init__(self, poll: Poll, local_voter: str):
        self.poll = poll
        self.local_voter = local_voter

    def who(self, request: gr.Request) -> str:
        return (request.username or self.local_voter).strip()

    def view(self, ballot: Ballot | None, voter: str, note: str = "") -> list[Any]:
        """Values for everything on the page; `note` is an extra sentence."""
        judged = {k for k, name in self.poll.judged() if name == voter} & set(self.poll.open)
        votes = self.poll.votes.standing()
        progress = (
            f"{len(judged)} of {len(self.poll.open)} comparisons judged by {voter}; {len(votes)} "
            f"votes in all. {note}"
        )
        if ballot:
            shown = [dialogue(ballot.turns), *(card(ballot, side) for side in "AB")]
        else:
            thanks = "You have judged every comparison. Thank you! Ask something of your own below."
            shown = [card_of("Done", thanks), "", ""]
        buttons = [gr.update(interactive=ballot is not None)] * len(CHOICES)
        id = ballot.id if ballot else ""
        return [id, *shown, text_of(progress), results(self.poll), *buttons]

    def start(self, request: gr.Request):
        voter = self.who(request)
        return self.view(self.poll.deal(voter), voter)

    def vote(self, id: str, choice: str, request: gr.Request):
        ballot = self.poll.ballot(id)
        voter = self.who(request)
        if choice not in CHOICES:
            raise gr.Error(f"A vote is one of {', '.join(CHOICES)}.")
        if ballot is None:
            note = "The comparison before is no longer known: its vote was not counted."
            return self.view(self.poll.deal(voter), voter, note)
        self.poll.votes.add(ballot.vote(choice, voter))
        return self.view(self.poll.deal(voter), voter)

    def undo(self, id: str, request: gr.Request):
        voter = self.who(request)
        mine = [vote.ballot for vote in self.poll.votes.standing() if vote.voter == voter]
        last = self.poll.ballot(mine[-1]) if mine else None
        if last is None:
            return self.view(self.poll.ballot(id), voter, "There is nothing to undo.")
        self.poll.votes.undo(last.id, voter)
        return self.view(last, voter, "Your last vote is taken back: vote again.")

    def ask(self, id: str, text: str, request: gr.Request):
        voter = self.who(request)
        try:
            return [*self.view(self.poll.ask(text), voter), ""]
        except (BadRow, UserError) as reason:
            note = f"No answers to that: {reason}."
            return [*self.view(self.poll.ballot(id), voter, note), text]


LABELS = {"A": "A is better (A)", "tie": "Tie (T)", "both bad": "Both bad (X)"}
LABELS |= {"B": "B is better (B)"}


def make_page(poll: Poll, local_voter: str) -> gr.Blocks:
    """The page. Its buttons are also an API (`/start`, `/vote`, `/undo`, `/ask`)."""
    booth = Booth(poll, local_voter)
    with gr.Blocks(title="Blind votes", analytics_enabled=False) as page:
        gr.HTML("<h1>Which answer is better?</h1>")
        ballot = gr.Textbox(visible=False)
        said = gr.Textbox(visible=False)
        prompt = gr.HTML(elem_id="prompt")
        with gr.Row(equal_height=True):
            a, b = (gr.HTML(elem_id=f"answer-{side}", min_width=300) for side in "AB")
        with gr.Row():
            buttons = {choice: vote_button(choice, label) for choice, label in LABELS.items()}
        with gr.Row(equal_height=True):
            progress = gr.HTML(elem_id="progress", min_width=300)
            back = gr.Button("Undo (U)", elem_id="vote-undo", size="sm", scale=0, min_width=120)
        with gr.Accordion("Ask something of your own", open=False):
            text = gr.Textbox(label="Your prompt", lines=3, max_length=20_000, elem_id="own-prompt")
            send = gr.Button("Show two answers", elem_id="ask")
        with gr.Accordion("Results so far", open=False):
            result = gr.HTML(elem_id="results")
        shown = [ballot, prompt, a, b, progress, result, *buttons.values()]
        quick = {"show_progress": "hidden", "concurrency_limit": None}
        page.load(booth.start, None, shown, api_name="start", **quick)
        for choice, button in buttons.items():
            name = "vote" if choice == "A" else None  # of the API, which needs only one of the four
            js = f"id => [id, {json.dumps(choice)}]"
            button.click(booth.vote, [ballot, said], shown, js=js, api_name=name, **quick)
        back.click(booth.undo, [ballot], shown, api_name="undo", **quick)
        send.click(booth.ask, [ballot, text], [*shown, text], api_name="ask", concurrency_limit=1)
    return page


def vote_button(choice: str, label: str) -> gr.Button:
    variant = "primary" if choice in "AB" else "secondary"
    return gr.Button(label, elem_id=f"vote-{choice.replace(' ', '-')}", variant=variant)


def text_of(text: str) -> str:
    """Text of a model, a data set or a person as inert HTML."""
    return f'<div class="text" dir="auto">{html.escape(plain(text))}</div>'


def card_of(title: str, text: str) -> str:
    return f'<div class="card"><h2>{html.escape(title)}</h2>{text_of(text)}</div>'


def card(ballot: Ballot, side: str) -> str:
    return card_of(f"Answer {side}", ballot.answers[side]["text"])


def dialogue(turns: Turns) -> str:
    parts = [f"<b>{SPEAKERS[role]}</b>{text_of(text)}" for role, text in turns]
    return f'<div class="card"><h2>Prompt</h2>{"".join(parts)}</div>'


def results(poll: Poll) -> str:
    """Win rates by people, and how often the reward model agrees with them, as a table.

    Both are of the report's own models. Votes on earlier ones are counted below it.
    """
    standing = poll.votes.standing()
    votes = [vote for vote in standing if poll.counts(vote)]
    earlier = len(standing) - len(votes)
    lines = [
        (
            f"{r['first']} over {r['second']}, win rate by people",
            r["votes"],
            r["win_rate"],
            r["win_rate_low"],
            r["win_rate_high"],
        )
        for r in win_rates(votes)
    ]
    agreed = agreement(vote for vote in votes if poll.counts(vote, JUDGE))
    if agreed:
        lines.append(("reward model prefers the same answer", *agreed.values()))
    rows = "".join(
        f"<tr><th scope='row'>{html.escape(name)}</th><td>{100 * rate:.0f} %</td>"
        f"<td>{100 * low:.0f} to {100 * high:.0f} %</td><td>{count}</td></tr>"
        for name, count, rate, low, high in lines
    )
    head = (
        "<tr><th scope='col'></th><th scope='col'>Share</th><th scope='col'>95 % interval</th><th "
        "scope='col'>Votes</th></tr>"
    )
    note = "<p>A tie and &ldquo;both bad&rdquo; count half in a win rate.</p>"
    if earlier:
        note += f"<p>Left out: {earlier} earlier vote{'s' * (earlier != 1)} on other models.</p>"
    if not lines:
        return f"<p>No votes yet.</p>{note if earlier else ''}"
    return f'<div class="results"><table>{head}{rows}</table>{note}</div>'


if __name__ == "__main__":
    run(main, Config, {}, __doc__)
