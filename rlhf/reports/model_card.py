"""README.md of an exported model: what it is, how it was made, its terms and limits."""

import json
import re
from pathlib import Path
from typing import Any

from rlhf.runs.checkpoints import sha256
from rlhf.runs.run_warnings import said_before

LICENCE_FILES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
SPDX = {"Apache License": "apache-2.0", "MIT License": "mit"}  # by what a licence file begins with
METRICS = {
    "sft": {"eval_loss_before": "loss on test responses before", "eval_loss": "and after"},
    "reward": {
        "eval_accuracy": "accuracy on test pairs",
        "longer_wins_accuracy": '"the longer one wins" gets',
        "probe_harmful_accuracy": "safety probe, harmful requests: prefers a refusal in a share of",
        "probe_harmless_accuracy": "requests that only sound harmful: prefers help in a share of",
    },
    "ppo": {
        "score_gain": "score gain over SFT on held-out prompts",
        "gold_gain": "the same by a reward model that PPO never trained against",
        "ppo_kl": "KL to SFT, nats a response",
        "sft_response_length": "response length before, tokens",
        "ppo_response_length": "and after",
        "sft_question_share": "share of answers that end in a question before",
        "ppo_question_share": "and after",
        "chosen_question_share": "and of the chosen answers",
        "sft_opening_share": "share of answers that begin in the commonest three words before",
        "ppo_opening_share": "and after",
        "chosen_opening_share": "and of the chosen answers",
        "sft_refusals": "safety probe, harmful requests: share begun with a refusal before",
        "ppo_refusals": "and after",
        "sft_overrefusals": "the same of requests that only sound harmful before",
        "ppo_overrefusals": "and after",
    },
}
TITLES = {"sft": "Supervised fine-tuning", "reward": "Reward model", "ppo": "PPO"}


def model_card(
    name: str | None,
    made: dict[str, Any],
    base: dict[str, Any],
    source: Path,
    report: dict[str, Any],
) -> str:
    """The card, from run.json of the checkpoint and of those earlier phases that are still there.

    Args:
        name: of the model; None: made of the base's and the phase.
        made: run.json of the checkpoint.
        source: the base's folder.
        report: of rlhf.export.Check.
    """
    runs = phases(made)
    licence = licence_of(source)
    llama = is_llama(base["model"], source)
    base_name = Path(base["model"]).name
    name = name or f"{'Llama-' if llama else ''}{base_name}-{made['phase'].upper()}"
    if llama and not name.lower().startswith("llama"):
        name = f"Llama-{name}"  # its licence wants that
    parts = [
        front_matter(made["phase"], base, runs, licence),
        f"# {plain_name(name)}",
        *(["Built with Llama."] if llama else []),
        f"{plain_name(base_name)}, tuned on human preferences with human-feedback-llama.",
        "## How it was made",
        *(phase_part(phase, run) for phase, run in runs.items()),
        "## What merging changed",
        f"Seen on a few prompts, in float32 (`export.json`):\n\n{differences(report)}",
        "## How to use it",
        usage(made["prompt_format"]),
        "## Limits",
        LIMITS,
        "## Licence",
        terms(licence, llama),
    ]
    return "\n\n".join(parts) + "\n"


def front_matter(
    phase: str, base: dict[str, Any], runs: dict[str, dict[str, Any]], licence: str | None
) -> str:
    """The block at the top that the hub reads."""
    data = [run.get("data", {}) for run in runs.values()]
    from_hub = sorted({str(each["source"]) for each in data if is_from_hub(each)})
    head = {
        "base_model": base["model"] if base["revision"] else None,
        "license": licence,
        "datasets": from_hub,
        "pipeline_tag": "text-generation",
        "library_name": "transformers",
        "tags": ["rlhf", phase],
    }
    lines = [f"{key}: {json.dumps(value)}" for key, value in head.items() if value]
    return "\n".join(["---", *lines, "---"])


def differences(report: dict[str, Any]) -> str:
    """How far the versions of the model are apart, a line for each step between them."""
    return "\n".join(
        f"- {step}: largest logit difference {r['largest_logit_difference']:.1e}, KL {r['kl']:.1e} "
        "nats a token"
        for step, r in report.items()
    )


def terms(licence: str | None, llama: bool) -> str:
    said = f"The base's licence ({licence or 'see its own page'}) also covers this model."
    if llama:
        said += (
            " Llama is licensed under the Llama Community License, Copyright (c) Meta Platforms, "
            "Inc. All Rights Reserved; its Acceptable Use Policy applies."
        )
    return said


LIMITS = """It was tuned to please a reward model, which stands for some people's judgements of some
answers and has weaknesses of its own. It can be wrong, say harmful things, and be talked into them.
It was not tested for any use: test it for yours, and add the safeguards that your use needs."""


def phases(made: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """run.json of each phase up to this one; of earlier ones only if they are still the same."""
    runs = {}
    for phase, digest in made.get("parents", {}).items():
        folder = Path(made["hyperparameters"].get(f"{phase}_checkpoint") or "")
        weights = folder / "adapter_model.safetensors"
        if phase in TITLES and weights.is_file() and sha256(weights) == digest:
            runs[phase] = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    return {phase: runs[phase] for phase in TITLES if phase in runs} | {made["phase"]: made}


def phase_part(phase: str, run: dict[str, Any]) -> str:
    """One phase: its data, its metrics and its main settings."""
    data = run.get("data", {})
    metrics = run.get("metrics", {})
    settings = run["hyperparameters"]
    rows = f", {data['train_rows']} rows" if "train_rows" in data else ""
    facts = [f"data: {source_of(data)}{rows}"]
    facts += [
        f"{text} {figure(metrics, key)}" for key, text in METRICS[phase].items() if key in metrics
    ]
    facts += map(harmless, said_before({phase: run}))
    names = ("learning_rate", "num_train_epochs", "total_episodes", "lora_rank", "kl_coef", "seed")
    facts.append(
        "settings: " + ", ".join(f"{name} {settings[name]}" for name in names if name in settings)
    )
    return f"{TITLES[phase]}\n" + "\n".join(f"- {fact}" for fact in facts)


def harmless(text: str) -> str:
    """A warning, perhaps an edited one, as text that means nothing to Markdown or HTML."""
    return re.sub(r"[^\w .,:;%()'\"/+-]", "_", text)


def source_of(data: dict[str, Any]) -> str:
    """A data set's hub id. A local path is nobody's business, so only its last part is named."""
    source = str(data.get("source", "unknown"))
    if is_from_hub(data):
        return source
    return (
        f"a local file or folder ({plain_name(Path(source).name)})"
        if source != "unknown"
        else source
    )


def is_from_hub(data: dict[str, Any]) -> bool:
    """Whether a run's data came from the hub, by its run.json.

    Earlier versions did not record it: for theirs, a path that is still there is local.
    """
    source = str(data.get("source", ""))
    local = data["local"] if "local" in data else Path(source).exists()
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source)) and not local


def figure(metrics: dict[str, Any], key: str) -> str:
    """A metric, with its interval and the number of prompts, if they are known."""
    said = f"{metrics[key]:.3g}"
    low = metrics.get(f"{key}_low")
    high = metrics.get(f"{key}_high")
    if low is None or high is None:
        return said
    count = (
        f", {metrics['eval_prompts']} prompts"
        if key.endswith("_gain") and "eval_prompts" in metrics
        else ""
    )
    return f"{said} (95 % interval {low:.3g} to {high:.3g}{count})"


def usage(prompt_format: str) -> str:
    text = "It answers chats by its chat template"
    if prompt_format == "hh":
        text += (
            " (`\\n\\nHuman: ...\\n\\nAssistant:`; a system message stands before it as plain text)"
        )
    return f"{text}, and ends an answer with its EOS."


def licence_of(source: Path) -> str | None:
    """The base's licence: from its card, or by what its licence file begins with."""
    card = source / "README.md"
    if card.is_file():
        found = re.search(
            r"^license:\s*['\"]?([\w.-]+)", card.read_text(encoding="utf-8", errors="replace"), re.M
        )
        if found:
            return found.group(1)
    for path in sorted(source.glob("LICEN[SC]E*")):
        start = path.read_text(encoding="utf-8", errors="replace")[:300]
        for words, name in SPDX.items():
            if words in start:
                return name
        if "LLAMA" in start.upper():
            return "llama3.2" if "3.2" in start else "other"
    return None


def is_llama(model: str, source: Path) -> bool:
    """Whether the base is under Meta's licence: by its id or its licence."""
    return model.startswith("meta-llama/") or str(licence_of(source)).startswith("llama")


def plain_name(name: str) -> str:
    """A name that means nothing to Markdown or HTML."""
    return re.sub(r"[^\w.+ -]", "_", name)
