"""Turns a row of any accepted shape into a `Pair`, or raises `BadRow` with a reason.

A row holds a dialogue that ends with the user's turn, the answer to learn, and a worse answer.
Either answer may be missing; each phase says what it needs (`Needs`). The columns are

    the answer          `chosen`, or `completion`, `response`, `output`
    the worse one       `rejected`
    the dialogue        `prompt`, or `instruction` with its `input` and `history`, or `messages` (or
                        `conversations`), or what both answers begin with
    the system turn     `system`

A further column also goes into `missing_column` and `ACCEPTED` in files.py.

Without a column for the answer, `messages` is the whole dialogue, and its last turn is the answer
if it is the assistant's. Without that either, the row is a prompt alone.

Turns that stand both in the prompt and before the answers are read once. A cell is one of

- text: a bare question or answer, or turns that start with `\\n\\nHuman:` and `\\n\\nAssistant:`,
  with any line ends (the first blank line may be missing);
- a list of messages, or a single one: `{"role", "content"}`, where the content is text or a list
  of text parts, or ShareGPT's `{"from", "value"}`;
- such a list spelled out as text in a CSV file, as JSON or as Python prints it.
"""

import ast
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

SPEAKERS = {"system": "System", "user": "Human", "assistant": "Assistant"}
HUMAN = "\n\nHuman:"
ASSISTANT = "\n\nAssistant:"
ROLES = {"Human": "user", "Assistant": "assistant"}
CUES = {"user": HUMAN, "assistant": ASSISTANT}
SHAREGPT = {"human": "user", "gpt": "assistant"}  # its names for the roles
TOOLS = ("tool", "function", "function_call", "observation")
# Of these columns, the first that is there is read.
ANSWERS = ("chosen", "completion", "response", "output")
TALKS = ("messages", "conversations")
LABELS = ("label", "kto_tag")  # whether a row's only answer is a good one
COLUMNS = ("system", "prompt", "instruction", "input", "history", *TALKS, *ANSWERS, "rejected")
COLUMNS += LABELS
LINE_END = re.compile(r"\r+\n|\r")  # of Windows, even doubled on the way, and of the old Mac
STARTS_WITH_CUE = re.compile(r"\s*(Human|Assistant):")
# After "Assistant:", HH writes one space and the answer. By a slip, " Human: Yes." is an answer in
# some twenty of rm-static's rows. After a new line it would be a turn.
ANSWER_IS_TURNS = re.compile(r"(\s*\n\s*)?(Human|Assistant):")
LINE_STARTS_WITH_CUE = re.compile(r"^(Human|Assistant):", re.MULTILINE)
LATER_LINE_STARTS_WITH_CUE = re.compile(r"\n(Human|Assistant):")
SPELLED = re.compile(
    r"""\s*\[\s*\{\s*['"](?:role|content)['"]\s*:"""
    r"""|\s*\[?\s*\{\s*['"](?:role|from)['"]\s*:\s*['"](?:human|gpt|system|user|assistant)['"]"""
)
# Escaped twice on the way: a backslash and an n where a line should end.
SPELLED_LINE_END = re.compile(r"\\n\s*(Human|Assistant):")
# Labels of a row's only answer, texts in lower case. True is 1 and False is 0, as keys too.
GOOD = {1: True, "1": True, "1.0": True, "true": True}
GOOD |= {0: False, "0": False, "0.0": False, "false": False}

Turns = tuple[tuple[str, str], ...]  # (role, text); roles are system, user, assistant
Needs = Literal["prompt", "answer", "pair"]  # of a row: a prompt alone, with an answer, with two


@dataclass(frozen=True)
class Pair:
    """A dialogue that ends with the user's turn, and its answers. All texts are stripped."""

    turns: Turns
    chosen: str | None = None
    rejected: str | None = None


class BadRow(Exception):
    """A row that cannot be used. Rows are counted by the text, which is the reason."""


def parse_row(row: dict[str, Any], needs: Needs = "pair") -> Pair:
    """Read a row of any accepted shape that has what is needed.

    Raises:
        BadRow: the row cannot be used; says why.
    """
    pair = read_row(row)
    reason = why_unusable(pair, needs)
    if reason:
        raise BadRow(reason)
    return pair


def why_unusable(pair: Pair, needs: Needs) -> str:
    """Why a pair lacks what is needed, or ""."""
    if needs == "prompt":
        return "" if is_text(text for _, text in pair.turns) else "half a surrogate pair"
    if pair.chosen is None:
        return "no chosen answer"
    if needs == "pair" and pair.rejected is None:
        return "no rejected answer"
    return flaw_of(pair)


def flaw_of(pair: Pair) -> str:
    """What is wrong with a pair, or ""."""
    answers = [answer for answer in (pair.chosen, pair.rejected) if answer is not None]
    if not all(answers):
        return "blank answer"
    if len(answers) == 2 and pair.chosen == pair.rejected:
        return "chosen and rejected are identical"
    if not is_text([*answers, *(text for _, text in pair.turns)]):
        return "half a surrogate pair"
    if pair.chosen and LATER_LINE_STARTS_WITH_CUE.search(pair.chosen):
        return "chosen runs on into another turn"
    return ""


def is_text(texts: Iterable[str]) -> bool:
    """Whether texts can be encoded. JSON can spell half a surrogate pair, which cannot."""
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        return False
    return True


def read_row(row: dict[str, Any]) -> Pair:
    """Read a row of any accepted shape, whatever answers it has and whatever is wrong with them.

    Raises:
        BadRow: the row has no dialogue that can be read; says why.
    """
    if None in row:
        raise BadRow("more cells than the header has columns")
    cells = {part: read_cell(row, name) for part, name in columns_of(row).items()}
    prompt = with_input(cells.get("prompt"), cells.get("input"))
    shared, chosen, rejected = split_answers(prompt, cells.get("chosen"), cells.get("rejected"))
    no_prompt = (
        prompt is None
        or prompt == []
        or (shared and isinstance(prompt, str) and not prompt.strip())
    )
    asked = [] if no_prompt else earlier_turns(cells.get("history")) + parse_turns(prompt)
    if chosen is None and isinstance(prompt, list) and asked and asked[-1][0] == "assistant":
        chosen = asked.pop()[1]
    if chosen is not None and rejected is None and not is_good(cells.get("label")):
        rejected = chosen
        chosen = None
    system = cells.get("system")
    if system and not isinstance(system, str):
        raise BadRow("system is not text")
    if system and system.strip():
        asked = join_turns([("system", system.strip())], asked)
    turns = checked_turns(join_turns(asked, shared))
    # A transcript may have two answers in a row, as some of rm-static do, and says where each ends.
    answer = cells.get("chosen") or cells.get("rejected")
    if turns[-1][0] != "user" and (isinstance(prompt, list) or isinstance(answer, list)):
        raise BadRow("messages that end with the assistant's, before the answer")
    return Pair(turns, *(text if text is None else text.strip() for text in (chosen, rejected)))


def is_good(label: Any) -> bool:
    """Whether a row's only answer is one to learn, by its label; None and "" are no label.

    Raises:
        BadRow: the label could mean anything.
    """
    if label is None or label == "":
        return True
    key = label.strip().lower() if isinstance(label, str) else label
    if not isinstance(key, (bool, int, float, str)) or key not in GOOD:
        raise BadRow("label is neither true nor false")
    return GOOD[key]


# ---------------------------------------------------------------- columns and cells


def columns_of(row: dict[str, Any]) -> dict[str, str]:
    """The columns to read a row from, by what they hold: system, prompt, chosen, ..."""

    def first(*names: str) -> str | None:
        return next((name for name in names if row.get(name) is not None), None)

    prompt = first("prompt")
    answer = first(*ANSWERS)
    rejected = first("rejected")
    talk = next((name for name in TALKS if row.get(name)), None)
    if talk and not answer:
        prompt = talk
    elif not prompt and not (answer and is_whole(row[answer])):
        prompt = first("instruction") or talk
    alpaca = prompt == "instruction"
    parts = {
        "system": first("system"),
        "history": first("history") if alpaca else None,
        "prompt": prompt,
        "input": first("input") if alpaca else None,
        "chosen": answer,
        "rejected": rejected,
        "label": None if rejected else first(*LABELS),
    }
    return {part: name for part, name in parts.items() if name}


def is_empty(cell: Any) -> bool:
    """Whether a cell holds nothing, so that nothing is lost if it is not read."""
    return cell in (None, "", [])


def is_whole(answer: Any) -> bool:
    """Whether an answer is a whole dialogue, question included."""
    answer = unspelled(answer)
    if isinstance(answer, str):
        return bool(STARTS_WITH_CUE.match(answer))
    return isinstance(answer, list) and any(role_of(message) == "user" for message in answer)


def read_cell(row: dict[str, Any], name: str) -> Any:
    """A cell, with `\\n` for every line end and messages as a list.

    Raises:
        BadRow: a message list that was spelled out as text cannot be read back.
    """
    cell = unix_lines(unspelled(row[name]))
    if name in TALKS and not isinstance(cell, list):
        raise BadRow("messages are not a list")
    is_message = isinstance(cell, dict) and name in ("prompt", *ANSWERS, "rejected")
    return [cell] if is_message else cell


def with_input(instruction: Any, more: Any) -> Any:
    """Alpaca's instruction, with its input (if any) as a second paragraph; or any other prompt."""
    if more is None or more == "":
        return instruction
    if not isinstance(instruction, str) or not isinstance(more, str):
        raise BadRow("instruction or input is not text")
    return f"{instruction.strip()}\n\n{more.strip()}"


def earlier_turns(history: Any) -> list[tuple[str, str]]:
    """The turns of Alpaca's history, a list of questions and answers."""
    turns = []
    try:
        for question, answer in history or ():
            turns += [("user", require_text(question)), ("assistant", require_text(answer))]
    except (TypeError, ValueError):
        raise BadRow("history is not a list of questions and answers") from None
    return turns


def split_answers(
    prompt: Any, chosen: Any, rejected: Any
) -> tuple[list[tuple[str, str]], str | None, str | None]:
    """The turns that both answers begin with, and the answers after them; None stays None."""
    if chosen is None and rejected is None:
        return [], None, None
    if rejected is None:
        shared, chosen, _ = split_answers(prompt, chosen, chosen)
        return shared, chosen, None
    if chosen is None:
        shared, _, rejected = split_answers(prompt, rejected, rejected)
        return shared, None, rejected
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise BadRow("chosen and rejected have different types")
    if not isinstance(chosen, str):
        return split_messages(chosen, rejected)
    if prompt is None or ANSWER_IS_TURNS.match(chosen) or repeats(prompt, chosen):
        return split_transcripts(chosen, rejected)
    if ANSWER_IS_TURNS.match(rejected):
        raise BadRow("rejected starts with another turn")
    return [], chosen, rejected


def unix_lines(value: Any) -> Any:
    """A cell with `\\n` for every line end in its texts, however deep they are."""
    if isinstance(value, str):
        return LINE_END.sub("\n", value) if "\r" in value else value
    if isinstance(value, list):
        return [unix_lines(inner) for inner in value]
    if isinstance(value, dict):
        return {key: unix_lines(inner) for key, inner in value.items()}
    return value


def unspelled(value: Any) -> Any:
    """The message list that a text spells out, as JSON or Python; any other value as it is.

    Raises:
        BadRow: the list cannot be read, such as one printed by numpy, without commas.
    """
    if not isinstance(value, str) or not SPELLED.match(value):
        return value
    for read in (json.loads, ast.literal_eval):
        try:
            return read(value.strip())
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            continue
    raise BadRow("a message list that became text and cannot be read back")


# ---------------------------------------------------------------- turns


def parse_turns(value: Any) -> list[tuple[str, str]]:
    """The turns in a cell, which is text or a list of messages."""
    return list(parse_dialogue(value)) if isinstance(value, str) else parse_messages(value)


def parse_dialogue(prompt: str) -> Turns:
    """Split `\\n\\nHuman: ...\\n\\nAssistant:` into turns; text before the first is the system's.

    Text without a cue is a bare question.

    Raises:
        BadRow: no text, no `Assistant:` at the end, or a turn without a blank line before it.
    """
    turns = split_at_cues(prompt)
    if not turns:
        if LINE_STARTS_WITH_CUE.search(prompt):
            raise BadRow("'Human:' or 'Assistant:' without a blank line before it")
        if SPELLED_LINE_END.search(prompt):
            raise BadRow("line ends spelled out as '\\n'")
        return (("user", require_text(prompt)),)
    if any(LATER_LINE_STARTS_WITH_CUE.search(text) for _, text in turns):
        raise BadRow("'Human:' or 'Assistant:' without a blank line before it")
    if turns[-1] != ("assistant", ""):
        raise BadRow("prompt does not end with 'Assistant:'")
    return checked_turns(turns[:-1])


def split_at_cues(text: str) -> list[tuple[str, str]]:
    """The turns of a transcript, blank ones included; none if it has no cue."""
    text = with_blank_line(unix_lines(text))
    head, *rest = re.split(r"\n\n(Human|Assistant):", text)
    turns = [("system", head.strip())] if rest and head.strip() else []
    return turns + [
        (ROLES[name], said.strip()) for name, said in zip(rest[::2], rest[1::2], strict=True)
    ]


def hh_prompt(turns: Iterable[tuple[str, str]]) -> str:
    """`\\n\\nHuman: ...\\n\\nAssistant:`, as in rm-static's `prompt` column."""
    written = (text if role == "system" else f"{CUES[role]} {text}" for role, text in turns)
    return "".join(written) + ASSISTANT


def repeats(prompt: Any, answer: str) -> bool:
    """Whether an answer begins with the whole dialogue in `prompt`."""
    return (
        isinstance(prompt, str)
        and ASSISTANT in prompt
        and answer.lstrip().startswith(prompt.strip())
    )


def with_blank_line(text: str) -> str:
    """A transcript with the blank line before its first cue, which strip() may have removed."""
    return "\n\n" + text.lstrip() if STARTS_WITH_CUE.match(text) else text


def split_transcripts(chosen: str, rejected: str) -> tuple[list[tuple[str, str]], str, str]:
    """Split two transcripts at the last answer of `chosen`; everything before it must be equal."""
    chosen = with_blank_line(chosen)
    rejected = with_blank_line(rejected)
    end = chosen.rfind(ASSISTANT) + len(ASSISTANT)
    if end < len(ASSISTANT):
        raise BadRow("transcript without 'Assistant:'")
    start = chosen[:end]
    if not rejected.startswith(start):
        raise BadRow("transcripts differ before the last answer")
    shared = [] if start == ASSISTANT else list(parse_dialogue(start))
    return shared, chosen[end:], rejected[end:]


def split_messages(chosen: Any, rejected: Any) -> tuple[list[tuple[str, str]], str, str]:
    """Split two message lists into the turns that they share and the answer at the end of each."""
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
    if any(map(is_of_tool, messages)):
        raise BadRow("message of a tool, or that calls one")
    turns = []
    for message in messages:
        role = role_of(message)
        if role not in ("system", "user", "assistant"):
            raise BadRow("message without a role of system, user or assistant")
        said = message.get("content")
        said = message.get("value") if said is None else said
        turns.append((role, require_text(text_of(said))))
    return turns


def role_of(message: Any) -> Any:
    """The role of a message, by our name for it; None if it is no message."""
    if not isinstance(message, dict):
        return None
    role = message.get("role") or message.get("from")
    return SHAREGPT.get(role, role) if isinstance(role, str) else role


def is_of_tool(message: Any) -> bool:
    return isinstance(message, dict) and (
        role_of(message) in TOOLS or bool(message.get("tool_calls"))
    )


def text_of(content: Any) -> Any:
    """A message's content; a list of text parts is joined."""
    if not isinstance(content, list):
        return content
    for part in content:
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            raise BadRow("content with a part that is not text")
    return "".join(part["text"] for part in content)


def join_turns(
    asked: list[tuple[str, str]], shared: list[tuple[str, str]]
) -> list[tuple[str, str]]:
    """The dialogue that begins with `asked` and that `shared` continues or repeats."""
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


# ---------------------------------------------------------------- what is not allowed


def checked_turns(turns: Iterable[tuple[str, str]]) -> Turns:
    """The turns as they are.

    Raises:
        BadRow: one is blank or holds another, no user speaks, or the system does not speak first.
    """
    turns = tuple(turns)
    if any(role == "system" for role, _ in turns[1:]):
        raise BadRow("system turn that is not the first")
    if not any(role == "user" for role, _ in turns):
        raise BadRow("no user turn")
    if any(not text for _, text in turns):
        raise BadRow("blank turn")
    if any(LINE_STARTS_WITH_CUE.search(text) for _, text in turns):
        raise BadRow("turn that holds another turn")
    return turns


def require_text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise BadRow("blank turn")
    return value.strip()
