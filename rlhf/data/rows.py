"""A row of preference data, of any accepted shape, becomes a `Pair`, or a `BadRow` with a reason.

What stands before the answers comes from the column `prompt`, from the start that `chosen` and
`rejected` share, or from both, and is put down once. Each of the three is

- text: a bare question or answer, or turns that start with `\\n\\nHuman:` and `\\n\\nAssistant:`
  (the blank line may be missing before the first), with any line ends;
- a list of messages, `{"role", "content"}`, whose content is text or a list of text parts;
- such a list that became text in a CSV file, as JSON or as Python prints it.

A column `system` is the system turn.
"""

import ast
import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
ROLES = {"Human": "user", "Assistant": "assistant"}
CUES = {"user": HUMAN, "assistant": ASSISTANT}
TEST_SHARE = 20  # one first question in so many is held out of a file that has no splits
COLUMNS = ("system", "prompt", "chosen", "rejected")
LINE_END = re.compile(r"\r+\n|\r")  # Windows', also when doubled on the way, and the old Mac's
STARTS_WITH_CUE = re.compile(r"\s*(Human|Assistant):")
# After "Assistant:" HH writes one space and then the answer; " Human: Yes." is such an answer, a
# slip of the pen in some twenty of rm-static's thousands. With a new line it is a turn.
ANSWER_IS_TURNS = re.compile(r"(\s*\n\s*)?(Human|Assistant):")
LINE_STARTS_WITH_CUE = re.compile(r"^(Human|Assistant):", re.MULTILINE)
LATER_LINE_STARTS_WITH_CUE = re.compile(r"\n(Human|Assistant):")

Turns = tuple[tuple[str, str], ...]  # (role, text); roles are system, user, assistant


@dataclass(frozen=True)
class Pair:
    """A dialogue that ends with the user's turn, and two answers; no text has outer white space."""

    turns: Turns
    chosen: str
    rejected: str


class BadRow(Exception):
    """A row that cannot be used; the text is the reason under which it is counted."""


def parse_row(row: dict[str, Any]) -> Pair:
    """Make a Pair of a row of any accepted shape.

    Raises:
        BadRow: it cannot be used; says why.
    """
    if None in row:
        raise BadRow("more cells than the header has columns")
    system, prompt, chosen, rejected = (unix_lines(unspelled(row.get(name))) for name in COLUMNS)
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise BadRow("chosen and rejected have different types")
    if not isinstance(chosen, str):
        shared, chosen, rejected = split_messages(chosen, rejected)
    elif prompt is None or ANSWER_IS_TURNS.match(chosen) or repeats(prompt, chosen):
        shared, chosen, rejected = split_transcripts(chosen, rejected)
    elif ANSWER_IS_TURNS.match(rejected):
        raise BadRow("rejected starts with another turn")
    else:
        shared = []
    no_prompt = (
        prompt is None
        or prompt == []
        or (shared and isinstance(prompt, str) and not prompt.strip())
    )
    asked = [] if no_prompt else parse_turns(prompt)
    if system and not isinstance(system, str):
        raise BadRow("system is not text")
    if system and system.strip():
        asked = join_turns([("system", system.strip())], asked)
    turns = checked_turns(join_turns(asked, shared))
    return Pair(turns, *checked_answers(turns, chosen.strip(), rejected.strip()))


def unix_lines(value: Any) -> Any:
    """A cell whose texts, however deep, have `\\n` for every line end."""
    if isinstance(value, str):
        return LINE_END.sub("\n", value) if "\r" in value else value
    if isinstance(value, list):
        return [unix_lines(inner) for inner in value]
    if isinstance(value, dict):
        return {key: unix_lines(inner) for key, inner in value.items()}
    return value


def unspelled(value: Any) -> Any:
    """The message list that a text spells, as JSON or as Python prints it; anything else as it is.

    Raises:
        BadRow: a spelled list that cannot be read, such as numpy's, which has no commas.
    """
    if not isinstance(value, str) or not re.match(
        r"\s*\[\s*\{\s*['\"](role|content)['\"]\s*:", value
    ):
        return value
    for read in (json.loads, ast.literal_eval):
        try:
            return read(value.strip())
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            continue
    raise BadRow("a message list that became text and cannot be read back")


# ---------------------------------------------------------------- turns


def parse_turns(value: Any) -> list[tuple[str, str]]:
    """The turns of a cell: text or a list of messages."""
    return list(parse_dialogue(value)) if isinstance(value, str) else parse_messages(value)


def parse_dialogue(prompt: str) -> Turns:
    """Split `\\n\\nHuman: ...\\n\\nAssistant:` into turns; text before the first is the system's.

    Text without a cue is a bare question.

    Raises:
        BadRow: no text, no `Assistant:` at the end, or a turn that no blank line sets apart.
    """
    turns = split_at_cues(prompt)
    if not turns:
        if LINE_STARTS_WITH_CUE.search(prompt):
            raise BadRow("'Human:' or 'Assistant:' without a blank line before it")
        return (("user", require_text(prompt)),)
    if any(LATER_LINE_STARTS_WITH_CUE.search(text) for _, text in turns):
        raise BadRow("'Human:' or 'Assistant:' without a blank line before it")
    if turns[-1] != ("assistant", ""):
        raise BadRow("prompt does not end with 'Assistant:'")
    return checked_turns(turns[:-1])


def split_at_cues(text: str) -> list[tuple[str, str]]:
    """The turns of a transcript, also the blank ones; none if it has no cue."""
    text = with_blank_line(unix_lines(text))
    head, *rest = re.split(r"\n\n(Human|Assistant):", text)
    turns = [("system", head.strip())] if rest and head.strip() else []
    return turns + [
        (ROLES[name], said.strip()) for name, said in zip(rest[::2], rest[1::2], strict=True)
    ]


def repeats(prompt: Any, answer: str) -> bool:
    """Whether an answer has the whole dialogue that stands in `prompt` before it."""
    return (
        isinstance(prompt, str)
        and ASSISTANT in prompt
        and answer.lstrip().startswith(prompt.strip())
    )


def with_blank_line(text: str) -> str:
    """A transcript with the blank line before its first cue, which a strip() may have taken."""
    return "\n\n" + text.lstrip() if STARTS_WITH_CUE.match(text) else text


def split_transcripts(chosen: str, rejected: str) -> tuple[list[tuple[str, str]], str, str]:
    """Split two transcripts at the last answer of `chosen`; both must share all before it."""
    chosen, rejected = with_blank_line(chosen), with_blank_line(rejected)
    end = chosen.rfind(ASSISTANT) + len(ASSISTANT)
    if end < len(ASSISTANT):
        raise BadRow("transcript without 'Assistant:'")
    start = chosen[:end]
    if not rejected.startswith(start):
        raise BadRow("transcripts differ before the last answer")
    shared = [] if start == ASSISTANT else list(parse_dialogue(start))
    return shared, chosen[end:], rejected[end:]


def split_messages(chosen: Any, rejected: Any) -> tuple[list[tuple[str, str]], str, str]:
    """Take two message lists apart into what they share and the answer that ends each."""
    dialogues = []
    for messages in (chosen, rejected):
        turns = parse_messages(messages)
        if not turns or turns[-1][0] != "assistant":
            raise BadRow("answer does not end with an assistant message")
        dialogues.append(turns)
    (*start, (_, chosen)), (*other, (_, rejected)) = dialogues
    if start != other:
        raise BadRow("dialogues differ before the last answer")
    return start, chosen, rejected


def parse_messages(messages: Any) -> list[tuple[str, str]]:
    if not isinstance(messages, list):
        raise BadRow("messages are not a list")
    if any(
        isinstance(each, dict) and (each.get("role") == "tool" or each.get("tool_calls"))
        for each in messages
    ):
        raise BadRow("message of a tool, or that calls one")
    turns = []
    for message in messages:
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ("system", "user", "assistant"):
            raise BadRow("message without a role of system, user or assistant")
        turns.append((role, require_text(text_of(message.get("content")))))
    return turns


def text_of(content: Any) -> Any:
    """A message's content, whose text parts, if it is a list of these, are joined."""
    if not isinstance(content, list):
        return content
    for part in content:
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            raise BadRow("content with a part that is not text")
    return "".join(part["text"] for part in content)


def join_turns(
    asked: list[tuple[str, str]], shared: list[tuple[str, str]]
) -> list[tuple[str, str]]:
    """The dialogue whose start `asked` is, and that `shared` goes on with or has from its start."""
    systems = [turns[0] for turns in (asked, shared) if turns and turns[0][0] == "system"]
    if len(set(systems)) > 1:
        raise BadRow("two different system texts")
    asked, shared = (
        turns[1:] if turns and turns[0][0] == "system" else turns for turns in (asked, shared)
    )
    if shared[: len(asked)] == asked:
        return systems[:1] + shared
    if shared and shared[0][0] == "user" and asked[-1][0] == "user":
        raise BadRow("prompt is not how the dialogues start")
    return systems[:1] + asked + shared


# ---------------------------------------------------------------- what may not be


def checked_turns(turns: Iterable[tuple[str, str]]) -> Turns:
    """The turns before an answer. Raises BadRow if one is blank or holds another, or none asks."""
    turns = tuple(turns)
    if not any(role == "user" for role, _ in turns):
        raise BadRow("no user turn")
    if any(not text for _, text in turns):
        raise BadRow("blank turn")
    if any(LINE_STARTS_WITH_CUE.search(text) for _, text in turns):
        raise BadRow("turn that holds another turn")
    return turns


def checked_answers(turns: Turns, chosen: str, rejected: str) -> tuple[str, str]:
    if not chosen or not rejected:
        raise BadRow("blank answer")
    if chosen == rejected:
        raise BadRow("chosen and rejected are identical")
    try:
        "".join([chosen, rejected, *(text for _, text in turns)]).encode()
    except UnicodeEncodeError:
        raise BadRow("half a surrogate pair") from None
    if LATER_LINE_STARTS_WITH_CUE.search(chosen):
        raise BadRow("chosen runs on into another turn")
    return chosen, rejected


def require_text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise BadRow("blank turn")
    return value.strip()


# ---------------------------------------------------------------- which rows go where


def in_test_split(pair: Pair) -> bool:
    """True for about one first question in twenty, the same ones every time."""
    return is_test(first_turn_sha256(pair))


def half_of(pair: Pair) -> str:
    """ "first" or "second": the half of the data that a pair is in, the same one every time."""
    return which_half(first_turn_sha256(pair))


def is_test(digest: bytes) -> bool:
    return digest[0] < 256 // TEST_SHARE


def which_half(digest: bytes) -> str:
    return "first" if digest[1] < 128 else "second"


def first_turn_sha256(pair: Pair) -> bytes:
    """A hash of what the user said first, so that no dialogue is on both sides of a split."""
    first = next(text for role, text in pair.turns if role == "user")
    return hashlib.sha256(first.encode("utf-8", "replace")).digest()


def row_sha256(row: dict[str, Any]) -> bytes:
    """The same for a row that is no pair: it is counted on one side only."""
    return hashlib.sha256(repr(row).encode("utf-8", "replace")).digest()


def fingerprint(pairs: Iterable[Pair]) -> str:
    """SHA-256 over the pairs in order: two runs with the same value saw the same data."""
    digest = hashlib.sha256()
    for pair in pairs:
        digest.update(json.dumps([pair.turns, pair.chosen, pair.rejected]).encode())
    return digest.hexdigest()


def hh_prompt(turns: Iterable[tuple[str, str]]) -> str:
    """`\\n\\nHuman: ...\\n\\nAssistant:`, as rm-static's `prompt` column has it."""
    written = (text if role == "system" else f"{CUES[role]} {text}" for role, text in turns)
    return "".join(written) + ASSISTANT
