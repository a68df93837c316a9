"""Human feedback as a loop: a scripted voter in a real browser, then train again and compare.

    make feedback-demo

Needs what `make demo` left in runs/demo, and Chromium. Works in runs/demo/feedback.
"""

import itertools
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "runs" / "demo"
WORK = DEMO / "feedback"
PROMPTS = 120
VOTES = 240
PORT = 7865
CHROMIUMS = ("chromium", "chromium-browser", "google-chrome")


def main() -> int:
    chromium = next(filter(None, map(shutil.which, CHROMIUMS)), None)
    if not chromium or not (DEMO / "ppo").exists():
        what = (
            "run `make demo` first" if chromium else f"install a browser ({', '.join(CHROMIUMS)})"
        )
        print(f"error: {what}", file=sys.stderr)
        return 2
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir()
    with (ROOT / "demo" / "data" / "train.jsonl").open(encoding="utf-8") as rows:
        (WORK / "prompts.jsonl").write_text(
            "".join(itertools.islice(rows, PROMPTS)), encoding="utf-8"
        )

    print("1. Base, SFT and PPO answer.", flush=True)
    asked = [
        "--prompts",
        f"{WORK}/prompts.jsonl",
        "--temperature",
        "0.7",
        "--show",
        "0",
        "--output-dir",
        str(WORK),
    ]
    script("compare_outputs.py", *asked)

    print(
        f"2. A scripted voter prefers the shorter answer, {VOTES} times, by keyboard.", flush=True
    )
    command = [
        "-m",
        "feedback.vote",
        "--report",
        f"{WORK}/compare.json",
        "--votes",
        f"{WORK}/votes.jsonl",
    ]
    server = subprocess.Popen(
        [sys.executable, *command, "--port", str(PORT), "--voter", "script"], cwd=ROOT
    )
    try:
        vote(chromium, f"http://127.0.0.1:{PORT}")
    finally:
        server.terminate()
        server.wait()

    print("3. The reward model as it was, on the votes that are held out.", flush=True)
    shutil.copytree(DEMO / "reward", WORK / "before")
    votes = ["--extra-data", f"{WORK}/votes.jsonl"]
    script(
        "reward_train.py", "--eval-only", "--overwrite", *votes, "--output-dir", f"{WORK}/before"
    )

    print("4. The reward model trained again, with the votes.", flush=True)
    script("reward_train.py", *votes, "--output-dir", f"{WORK}/after")

    before, after = (
        json.loads((WORK / name / "evaluation.json").read_text()) for name in ("before", "after")
    )
    print(f"On {after['votes_pairs']} held-out pairs the reward model prefers the shorter answer")
    for name, numbers in (("before", before), ("after", after)):
        low, high = (100 * numbers[f"votes_accuracy_{end}"] for end in ("low", "high"))
        print(
            f"  {name:6} {100 * numbers['votes_accuracy']:.0f} % of the time (95 % interval "
            f"{low:.0f} to {high:.0f}); accuracy on the demo's test pairs "
            f"{numbers['eval_accuracy']:.3f}"
        )
    return 0


def script(name: str, *flags: str) -> None:
    subprocess.run([sys.executable, name, "--preset", "demo", *flags], cwd=ROOT, check=True)


def vote(chromium: str, url: str) -> None:
    """Press A or B for the shorter answer, T when they are alike."""
    from playwright.sync_api import Error, sync_playwright

    with sync_playwright() as driver:
        tab = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"]).new_page()
        for _ in range(600):
            try:
                tab.goto(url)
                break
            except Error:  # the server is not up yet
                time.sleep(0.5)
        progress = "text => document.querySelector('#progress')?.innerText.startsWith(text)"
        for count in range(VOTES + 1):
            tab.wait_for_function(progress, arg=f"{count} of ", timeout=60_000)
            if count < VOTES:
                a, b = (len(tab.locator(f"#answer-{side} .text").inner_text()) for side in "AB")
                tab.keyboard.press("a" if a < b else "b" if b < a else "t")
        tab.get_by_text("Results so far").click()
        tab.wait_for_selector("#results td")
        print(tab.locator("#results").inner_text())


if __name__ == "__main__":
    sys.exit(main())
