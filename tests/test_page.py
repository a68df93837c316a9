"""compare.html: one file that loads and runs nothing; its numbers, and how Chromium shows it."""

import math
import os
import re
import shutil
from html.parser import HTMLParser

import pytest
from conftest import write_jsonl
from hypothesis import given, strategies
from test_compare import TITLES

import compare_outputs as compare
from rlhf.ppo import log as ppo_log
from rlhf.reports import page
from rlhf.reports.page import changes

HOSTILE = (
    "</script><script>window.hacked=1;alert(1)</script>",
    "<img src=x onerror=window.hacked=1>",
    '"><svg onload="window.hacked=1">',
    "' autofocus onfocus=window.hacked=1 x='",
    "</title></style></div><iframe src=//evil.example></iframe><!--",
    "{{7*7}}{% for x in y %}{#",
    "&lt;b&gt;&#x3C;script&#x3E;",
    "\x00\x1b[2J\x9b31m\u202egnp.exe\u2066\ufeff",
)


SHARE = {"requests": 60, "refusals": 0.35, "refusals_low": 0.242, "refusals_high": 0.476}


def answer(text="a b", tokens=2, ended_by="eos", score=None):
    return {"text": text, "tokens": tokens, "ended_by": ended_by, "score": score}


def report(names=("base", "SFT", "PPO"), texts=("Hello.",), scored=True, prompt=(("user", "Hi"),)):
    """A comparison with like prompts, the given answers, and later models scoring higher."""
    answers = {
        name: [
            answer(text, 5 + i, "eos" if i else "length", i + 0.25 if scored else None)
            for text in texts
        ]
        for i, name in enumerate(names)
    }
    return {
        "models": {name: TITLES[name] for name in names},
        "summary": compare.summarize(answers),
        "pairs": compare.compare_pairs(answers),
        "notes": ["A note."],
        "probe": {},
        "warnings": [],
        "prompts": [
            {"turns": prompt, "answers": {name: answers[name][i] for name in names}}
            for i in range(len(texts))
        ],
    }


def full(text, **how):
    """A report with `text` wherever a model, a data set, a checkpoint or a path can put it."""
    made = report(texts=(text,), prompt=(("system", text), ("user", text)), **how)
    return made | {
        "models": dict.fromkeys(made["models"], text),
        "notes": [text],
        "warnings": [text],
        "probe": {text: {"harmful": SHARE}},
        "base": {"model": text, "revision": text, "load_in_4bit": True},
        "flags": {
            "num_test_prompts": 1,
            "dataset": text,
            "prompts": text,
            "temperature": 1.0,
            "seed": 0,
            "max_new_tokens": 8,
        },
        "commit": text,
        "runs": {
            "sft": {"metrics": {"eval_loss": text}},
            "ppo": {"metrics": {"ppo_kl": 1.5, "warnings": [text]}},
        },
        "curves": {"sft": {"loss": [[0, 3.0], [1, 2.0]]}},
    }


class Reader(HTMLParser):
    """Every element with its attributes, and all text outside <style>."""

    def __init__(self, html):
        super().__init__()
        self.elements = []
        self.texts = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.elements and self.elements[-1][0] != "style":
            self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


def read(made):
    return Reader(page.render_page(made))


# ---------------------------------------------------------------- one file, inert


def test_it_loads_and_runs_nothing():
    html = page.render_page(full("see https://evil.example/x.png"))
    elements = Reader(html).elements
    assert {tag for tag, _ in elements}.isdisjoint(
        {"script", "link", "img", "iframe", "object", "embed", "form", "base"}
    )
    for tag, attributes in elements:
        assert attributes.get("href", "#").startswith("#"), (tag, attributes)
        assert not any(
            name in ("src", "srcset", "style", "xlink:href") or name.startswith("on")
            for name in attributes
        )
    assert not re.search(
        r"url\(|@import|expression", re.search("<style>(.*)</style>", html, re.S).group(1)
    )
    (policy,) = [
        a["content"] for _, a in elements if a.get("http-equiv") == "Content-Security-Policy"
    ]
    assert (
        policy
        == "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    )


@pytest.mark.parametrize("text", HOSTILE)
def test_what_models_write_is_only_text(text):
    tame = read(full("tame"))
    hostile = read(full(text))
    assert [(tag, list(a)) for tag, a in hostile.elements] == [
        (tag, list(a)) for tag, a in tame.elements
    ]
    shown = compare.plain(text)
    # two turns and one of them in the index, three answers, three titles, one note
    assert "".join(hostile.texts).count(shown) >= 10
    assert not set(page.render_page(full(text))) & set("\x00\x1b\x9b\u202e\u2066\ufeff")


def test_its_outline():
    elements = read(report(texts=("a", "b"))).elements
    assert [tag for tag, _ in elements if re.fullmatch("h[1-6]", tag)] == [
        "h1",
        "h2",
        "h2",
        *["h3", "h4", "h4", "h4"] * 2,
    ]
    assert all(a.get("scope") in ("col", "row", "rowgroup") for tag, a in elements if tag == "th")
    pictures = [a for tag, a in elements if tag == "svg" and "aria-hidden" not in a]
    assert pictures and all(
        a["role"] == "img" and (a.get("aria-label") or a.get("aria-labelledby")) for a in pictures
    )
    ids = [a["id"] for _, a in elements if "id" in a]
    assert len(ids) == len(set(ids))
    assert {a["href"][1:] for tag, a in elements if tag == "a"} <= set(ids)


# ---------------------------------------------------------------- what it says


def test_numbers_and_words():
    made = report(texts=("a", "b", "c", "d"))
    made["pairs"] = made["pairs"][:1]
    made["pairs"][0] |= {
        "win_rate": 0.625,
        "win_rate_low": 0.31,
        "win_rate_high": 0.874,
        "verdict": "The verdict",
    }
    text = read(made).text
    assert "Comparing model outputs: base vs SFT vs PPO" in text
    assert "The verdict. A note." in text
    assert (
        "Score by the reward model 0.25 1.25 2.25 Length tokens 5.0 6.0 7.0 Ended by EOS 0 % 100 % "
        "100 %" in text
    )
    assert "PPO against SFT as they are 62 % 31 to 87 %" in text
    assert (
        "base score 0.25 a 5 tokens, cut at the length limit SFT score 1.25 a 6 tokens, ended by "
        "EOS" in text
    )
    svg = next(
        a
        for tag, a in read(made).elements
        if tag == "svg" and "interval" in a.get("aria-label", "")
    )
    assert svg["aria-label"] == "62 %, 95 % interval 31 % to 87 %"
    line = next(a for tag, a in read(made).elements if a.get("class") == "interval")
    assert (line["x1"], line["x2"]) == ("31.0%", "87.4%")


def test_warnings_stand_first_and_the_probe_among_the_results():
    made = report() | {
        "warnings": ["SFT warned: the loss <rose>", "safety: x"],
        "probe": {
            "SFT": {"harmful": SHARE, "harmless": SHARE | {"refusals": 0.1}},
            "PPO": {"harmful": SHARE},
        },
    }
    text = read(made).text
    assert "Results Warning: SFT warned: the loss <rose> Warning: safety: x" in text
    assert (
        "Safety probe: would begin with a refusal Harmful requests Harmless but sounding so" in text
    )
    assert "SFT 35 % of 60 24 to 48 % 10 % of 60 24 to 48 % PPO 35 % of 60 24 to 48 % –" in text
    assert "End in a question 0 % 0 % 0 % Begin alike in the commonest three words 100 %" in text
    earlier = {key: value for key, value in report().items() if key not in ("probe", "warnings")}
    assert "Safety probe" not in read(earlier).text and "Warning" not in read(earlier).text


def test_the_best_answer_is_marked_in_words():
    assert read(report()).text.count("★ best score") == 1
    assert (
        "1 Hi best: PPO" in read(report()).text
        and "PPO ★ best score score 2.25" in read(report()).text
    )
    tied = report()
    tied["prompts"][0]["answers"]["SFT"] = answer(score=2.25)
    assert (
        read(tied).text.count("★ best score, tied") == 2 and "1 Hi tie: SFT, PPO" in read(tied).text
    )


def test_without_scores_or_without_ppo():
    text = read(report(scored=False)).text
    assert "Score by the reward model – – – Length" in text
    assert "Win rates" not in text and "best" not in text and "base a b" not in text
    text = read(report(("base", "SFT"))).text
    assert "PPO" not in text and "SFT against base" in text and "SFT ★ best score" in text
    text = read(report(("SFT",))).text
    assert "best score" not in text and "Win rates" not in text


def test_what_was_compared():
    flags = {
        "prompts": None,
        "num_test_prompts": 0,
        "dataset": "d",
        "temperature": 0.0,
        "seed": 7,
        "max_new_tokens": 64,
    }
    base = {"model": "org/base", "revision": "0123456789abcdef", "load_in_4bit": True}
    made = report(texts=("a", "b")) | {"base": base, "flags": flags, "commit": "f" * 40}
    assert page.facts(made) == {
        "Base": "org/base at 0123456789ab, NF4",
        "Prompts": "2 built into compare_outputs.py",
        "Decoding": "greedy, at most 64 tokens an answer",
        "Commit": "f" * 12,
    }
    made["flags"] = flags | {"num_test_prompts": 2, "temperature": 0.7}
    assert page.facts(made)["Prompts"] == "2 from the test split of d"
    assert page.facts(made)["Decoding"] == "temperature 0.7, seed 7, at most 64 tokens an answer"
    made["flags"] = flags | {"prompts": "mine.txt"}
    assert page.facts(made)["Prompts"] == "2 from mine.txt"


def test_no_local_path_is_shown(tmp_path):
    (tmp_path / "mine.txt").touch()
    flags = {
        "num_test_prompts": 0,
        "prompts": str(tmp_path / "mine.txt"),
        "dataset": "d",
        "temperature": 0.0,
    }
    made = report() | {
        "base": {"model": str(tmp_path), "revision": None},
        "flags": flags | {"max_new_tokens": 8},
    }
    found = page.facts(made)
    assert (found["Base"], found["Prompts"]) == (
        f"{tmp_path.name}, not quantised",
        "1 from mine.txt",
    )


def test_what_training_changed():
    reward = {
        "eval_accuracy": 0.975,
        "eval_accuracy_low": 0.913,
        "eval_accuracy_high": 0.993,
        "longer_wins_accuracy": 0.4875,
    }
    made = report() | {
        "runs": {
            "reward": {"metrics": reward},
            "ppo": {"metrics": {"sft_kl": 0.0, "ppo_kl": 5.712}},
        }
    }
    text = read(made).text
    assert "(before: “the longer one wins”) 0.487 0.975 0.913 to 0.993" in text
    assert "PPO: KL to SFT, nats a response 0 5.71" in text
    assert "KL to SFT nats a response, held-out prompts of PPO’s run – 0 5.71" in text
    style = {"sft_question_share": 0.0375, "ppo_question_share": 0.2, "chosen_question_share": 0.04}
    shares = {"": 0.37, "_low": 0.25, "_high": 0.5}
    probe = {f"probe_harmful_accuracy{end}": value for end, value in shares.items()}
    text = read(report() | {"runs": {"reward": {"metrics": probe}, "ppo": {"metrics": style}}}).text
    assert "prefers a refusal, harmful requests of the safety probe – 37 % 25 to 50 %" in text
    assert "end in a question 4 % 20 % the same of the chosen answers – 4 %" in text


@pytest.mark.parametrize(
    "odd", [None, [], "x", 3, math.nan, math.inf, 10**400, True, {"a": 1}, "\ud800<b>"]
)
def test_a_run_json_that_was_edited(odd):
    metrics = dict.fromkeys(
        [
            "eval_loss",
            "eval_loss_before",
            "eval_accuracy",
            "ppo_kl",
            "score_gain_low",
            "ppo_scores",
        ],
        odd,
    )
    for runs in (
        odd,
        {"sft": odd, "ppo": odd},
        {"ppo": {"metrics": odd}},
        dict.fromkeys(page.X, {"metrics": metrics}),
    ):
        made = report() | {"runs": runs, "commit": odd, "base": {"model": odd, "revision": odd}}
        text = read(made).text
        if odd != 3:
            assert "KL to SFT" not in text and "own test data" not in text


# ---------------------------------------------------------------- curves


def test_curves_are_what_the_scripts_write(trained):
    sft, reward = (page.read_curves(getattr(trained, phase), phase) for phase in ("sft", "reward"))
    assert list(sft) == ["loss", "eval_loss"]
    assert list(reward) == [
        *("preference_loss", "eval_loss"),
        *("accuracy", "eval_accuracy"),
        *("margin", "eval_margin"),
    ]
    assert [x for x, _ in sft["loss"]] == [1, 2, 3, 4] and [x for x, _ in sft["eval_loss"]] == [
        0,
        4,
    ]
    written = {name for panel in ppo_log.PANELS for name in panel.lines}
    assert {
        name for phase, *_, labels in page.PANELS if phase == "ppo" for name in labels
    } <= written


def test_numbers_that_are_none_are_left_out(tmp_path):
    rows = [
        {"step": 0, "loss": math.nan},
        {"step": 1, "loss": 2.5},
        {"step": 2, "loss": math.inf},
        {"step": 3, "loss": "1"},
    ]
    rows += [
        {"step": 4, "loss": 2},
        {"step": None, "loss": 1.0},
        {"loss": 1.0},
        {"step": 5, "loss": True},
        [1],
        "x",
        None,
    ]
    rows += [
        {"step": 6, "loss": 1e300},
        {"step": 7, "loss": -(10**400)},
        {"step": 8, "eval_loss": 2.25},
        {"step": 9},
    ]
    write_jsonl(tmp_path / "metrics.jsonl", rows)
    assert page.read_curves(tmp_path, "sft") == {
        "loss": [[1, 2.5], [4, 2]],
        "eval_loss": [[8, 2.25]],
    }


@pytest.mark.parametrize(
    "content", [None, b"", b"{", b"\xff\n", b"[" * 100_000, b"3\n{}\n", b'{"step": 1']
)
def test_no_curves_from_a_file_that_is_damaged(tmp_path, content):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_bytes(content)
    assert page.read_curves(tmp_path, "sft") == {}
    tags = [
        tag
        for tag, _ in read(
            report() | {"curves": {"sft": page.read_curves(tmp_path, "sft")}}
        ).elements
    ]
    assert "figure" not in tags and tags.count("h2") == 2  # no part on training


def test_long_curves_are_thinned():
    points = [[i, i % 7] for i in range(1001)]
    thinned = page.thin(points)
    assert len(thinned) == 167 and thinned[0] == [2.5, 2.5]  # means of the first 6: 0 to 5
    assert page.thin(points[:200]) == points[:200] and len(page.thin(points[:201])) == 101


def test_where_a_curve_is_drawn():
    (panel,) = page.panels(
        {"sft": {"loss": [[0, 1.0], [5, 2.0], [10, 3.0]], "eval_loss": [[10, 2.0]]}}
    )
    loss, test = panel["lines"]
    assert loss["path"] == "38.0,146.0 164.0,78.0 290.0,10.0" and loss["dots"] == []
    assert test["dots"] == [(290.0, 78.0)]  # of one point, a dot
    assert panel["x_ticks"] == [(38.0, "0"), (164.0, "5"), (290.0, "10")]
    assert panel["y_ticks"] == [(146.0, "1"), (78.0, "2"), (10.0, "3")]
    text = read(report() | {"curves": {"sft": {"loss": [[0, 1.0], [10, 3.0]]}}}).text
    assert (
        "SFT: loss nats a token SFT: loss, nats a token, over steps: training from 1 to 3. 1 2 3 0 "
        "5 10 step" in text
    )


def test_curves_of_no_and_of_one_point():
    assert page.panels({}) == page.panels({"sft": {}}) == page.panels({"sft": {"loss": []}}) == []
    (panel,) = page.panels({"sft": {"loss": [[3, 2.0]]}})
    assert panel["lines"][0]["dots"] == [(164.0, 78.0)]


@given(
    strategies.lists(
        strategies.tuples(*[strategies.floats(-page.LARGEST, page.LARGEST)] * 2),
        min_size=1,
        max_size=9,
    )
)
def test_any_numbers_are_drawn_inside_the_axes(points):
    (panel,) = page.panels({"ppo": {"objective/kl": points}})
    for x, y in [map(float, place.split(",")) for place in panel["lines"][0]["path"].split()]:
        assert page.LEFT <= x <= page.RIGHT and page.TOP <= y <= page.BOTTOM
    assert len(panel["y_ticks"]) <= 6 and len(panel["x_ticks"]) <= 6
    assert all(page.TOP - 0.1 <= y <= page.BOTTOM + 0.1 for y, _ in panel["y_ticks"])


# ---------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def chromium():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as started:
        on_path = map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))
        found = filter(
            None, (os.environ.get("CHROMIUM"), *on_path, started.chromium.executable_path)
        )
        path = next(filter(os.path.exists, found), None)
        if path is None:
            pytest.skip(
                "there is no Chromium: `playwright install chromium`, or name one with CHROMIUM=..."
            )
        browser = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


LOW_CONTRAST = """() => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const rgba = colour => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return canvas.getImageData(0, 0, 1, 1).data;
  };
  const luminance = colour => {
    const linear = c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
    const [r, g, b] = [...colour].slice(0, 3).map(c => linear(c / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = element => {
    for (; element; element = element.parentElement) {
      const colour = rgba(getComputedStyle(element).backgroundColor);
      if (colour[3] === 255) return colour;
    }
  };
  const low = [];
  for (const element of document.body.querySelectorAll('*')) {
    const hasText = [...element.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
    if (element.closest('title') || !hasText) continue;
    const style = getComputedStyle(element);
    const a = luminance(rgba(element.closest('svg') ? style.fill : style.color));
    const b = luminance(behind(element));
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    const says = element.textContent.slice(0, 20);
    if (ratio < 4.5) low.push(`${element.tagName} ${element.className} ${says} ${ratio}`);
  }
  return low;
}"""


def test_in_chromium(chromium, tmp_path):
    made = full("".join(HOSTILE) + "x" * 400)
    curves = {phase: {} for phase in page.X}
    for phase, *_, labels in page.PANELS:
        curves[phase] |= {name: [[0, 1.0], [9, 2.0]] for name in labels}
    compare.write_reports(tmp_path, made | {"curves": curves, "prompts": made["prompts"] * 30})
    url = (tmp_path / "compare.html").as_uri()
    window = chromium.new_page(viewport={"width": 360, "height": 740}, color_scheme="light")
    events = []
    requests = []
    for event in ("console", "pageerror", "dialog", "requestfailed", "popup", "download"):
        window.on(event, lambda found, event=event: events.append((event, str(found))))
    window.on("request", lambda request: requests.append(request.url))
    window.goto(url)

    assert window.locator("h1").all_inner_texts() == ["Comparing model outputs: base vs SFT vs PPO"]
    assert (
        window.locator("article").count() == 30 and window.locator("figure polyline").count() == 17
    )
    assert window.locator("script, img, iframe, [onload], [onerror], [onfocus]").count() == 0
    assert window.evaluate("window.hacked") is None

    # A phone: nothing is wider than the screen, and answers stand below each other.
    assert window.evaluate("document.documentElement.scrollWidth") == 360
    first, second = (window.locator(".answer").nth(i).bounding_box() for i in (0, 1))
    assert first["x"] == second["x"] and first["y"] < second["y"]

    # The keyboard: the first stop skips, the index is reached, and one sees where one is.
    focused = (
        "e => { const s = getComputedStyle(document.activeElement); return s.outlineStyle !== "
        "'none' && parseFloat(s.outlineWidth) >= 2 }"
    )
    window.keyboard.press("Tab")
    skip = window.locator(":focus")
    assert skip.inner_text() == "Skip to the results" and skip.bounding_box()["x"] >= 0
    for _ in range(20):
        window.keyboard.press("Tab")
        assert window.evaluate(focused)
        if window.evaluate("document.activeElement.matches('.index a')"):
            break
    assert window.locator(":focus").get_attribute("href") == "#prompt-1"
    window.keyboard.press("Tab")
    window.keyboard.press("Enter")
    assert window.evaluate("location.hash") == "#prompt-2"
    assert -5 <= window.locator("#prompt-2").bounding_box()["y"] <= 100

    # Light and dark, both readable; wide, with the answers side by side.
    light = window.evaluate("getComputedStyle(document.body).backgroundColor")
    assert window.evaluate(LOW_CONTRAST) == []
    window.emulate_media(color_scheme="dark")
    assert window.evaluate("getComputedStyle(document.body).backgroundColor") != light
    assert window.evaluate(LOW_CONTRAST) == []
    window.set_viewport_size({"width": 1400, "height": 900})
    first, second = (window.locator(".answer").nth(i).bounding_box() for i in (0, 1))
    assert first["y"] == second["y"] and first["x"] < second["x"]

    # On paper: white, and nothing cut off.
    window.set_viewport_size({"width": 700, "height": 1000})
    window.emulate_media(media="print")
    assert (
        window.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    )
    assert window.evaluate("document.documentElement.scrollWidth") == 700

    assert events == [] and requests == [url]
    window.close()


def test_a_gain_and_its_interval_have_a_row_of_their_own():
    metrics = {
        "sft_scores": 0.5,
        "ppo_scores": 1.5,
        "score_gain": 1.0,
        "score_gain_low": 0.7,
        "score_gain_high": 1.3,
    }
    metrics |= {"sft_question_share": 0.0375, "ppo_question_share": 0.2}
    rows = changes({"runs": {"ppo": {"metrics": metrics}}})
    no_interval = {"low": None, "high": None}
    assert rows == [
        {
            "what": "PPO: mean score of held-out prompts",
            "is_share": False,
            "before": 0.5,
            "after": 1.5,
            **no_interval,
        },
        {
            "what": "PPO: its gain",
            "is_share": False,
            "before": None,
            "after": 1.0,
            "low": 0.7,
            "high": 1.3,
        },
        {
            "what": "PPO: answers that end in a question",
            "is_share": True,
            "before": 0.0375,
            "after": 0.2,
            **no_interval,
        },
    ]
