"""Preference data: where it comes from, the shapes it may have, and how it becomes tokens.

Every phase reads the same `Pair`s and tokenises them by the same functions, so what the SFT model learns to write, the
reward model learns to read and PPO samples is one format. Trainers get token ids, never text.

Sources: a hub id, a folder (`train.*` and `test.*`, or a clone of a hub data set), or one .jsonl, .json, .csv or .parquet
file. Rows: rm-static's columns (`prompt`, `chosen`, `rejected`), raw HH-RLHF (two transcripts, `chosen` and
`rejected`), or the same names holding lists of `{"role", "content"}` messages.
"""

import csv
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.cli import UserError

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

NO_CLOCK = (
    "{%- macro strftime_now(format) -%}26 Jul 2024{%- endmacro -%}"  # the day that Llama 3's template falls back to
)
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
ROLES = {"Human": "user", "Assistant": "assistant"}
CUES = {"user": HUMAN, "assistant": ASSISTANT}
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
SPLITS = {"train": ("train",), "test": ("test", "validation", "eval")}
ACCEPTED = (
    "accepted are the columns prompt, chosen, rejected (text or message lists), or chosen and rejected "
    "transcripts that start with '\\n\\nHuman:'"
)

# A literal newline after a Jinja `%}` is trimmed, so the newlines stand inside the expressions.
HH_CHAT_TEMPLATE = (
    "{%- if bos -%}{{ bos_token }}{%- endif -%}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}{{ message['content'] | trim }}"
    "{%- elif message['role'] == 'user' -%}{{ '\\n\\nHuman: ' + message['content'] | trim }}"
    "{%- else -%}{{ '\\n\\nAssistant: ' + message['content'] | trim }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '\\n\\nAssistant:' }}{%- endif -%}"
)


@dataclass(frozen=True)
class Pair:
    """A dialogue that ends with the user's turn, and two answers to it, stripped of outer white space."""

    turns: tuple[tuple[str, str], ...]  # (role, text); roles are system, user, assistant
    chosen: str
    rejected: str


@dataclass(frozen=True)
class TokenPair:
    """A pair as token ids. A response that was cut to fit has no EOS; the others end with it."""

    pair: Pair
    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]


class BadRow(Exception):
    """A row that cannot be used; the text is the reason under which it is counted."""


# ---------------------------------------------------------------- sources


def load_pairs(source: str, split: str, max_samples: int | None = None, half: str = "both") -> list[Pair]:
    """Read the usable pairs of a split ("train" or "test"), at most the first `max_samples`; of one `half` if it says so.

    One file without splits gives every twentieth prompt, chosen by a hash of its text, to the test split. Bad rows
    are dropped; one line on the terminal says how many and why.

    Raises:
        UserError: no such source, a file that cannot be read, a missing column, no usable row.
    """
    drops: Counter[str] = Counter()
    pairs: list[Pair] = []
    for row in read_rows(source, split):
        try:
            pair = parse_row(row)
        except BadRow as reason:
            drops[str(reason)] += 1
            continue
        if Path(source).is_file() and in_test_split(pair) != (split == "test"):
            continue
        if half != "both" and half != half_of(pair):
            continue
        pairs.append(pair)
        if len(pairs) == max_samples:
            break
    report_drops(f"{source}, {split}" + (f", {half} half" if half != "both" else ""), len(pairs), drops)
    if not pairs:
        raise UserError(f"{source} has no usable row in its {split} split; {ACCEPTED}")
    return pairs


def read_rows(source: str, split: str) -> Iterator[dict[str, Any]]:
    path = Path(source)
    if path.is_dir():
        candidates = [
            [f for folder in (path, path / "data") for f in sorted(folder.glob(f"{name}*")) if f.suffix in SUFFIXES]
            for name in SPLITS[split]
        ]
        files = next(filter(None, candidates), [])
        if not files:
            raise UserError(
                f"--dataset {source or repr(source)}: this folder has no {SPLITS[split][0]} file ({', '.join(SUFFIXES)})"
            )
    elif path.is_file():
        files = [path]
    else:
        if path.suffix in SUFFIXES or not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
            raise UserError(f"--dataset {source}: there is no such file or folder, and it is not a hub id (owner/name)")
        yield from read_hub(source, split)
        return
    for file in files:
        rows = checked_columns(READERS[file.suffix](file), str(file)) if file.suffix in READERS else None
        if rows is None:
            raise UserError(f"{file} is not one of {', '.join(SUFFIXES)}")
        yield from rows


def checked_columns(rows: Iterable[dict[str, Any]], where: str) -> Iterator[dict[str, Any]]:
    """Pass rows on, after the first one was seen to be an object with the columns that every shape has."""
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise UserError(f"{where}, row {number + 1}: not an object with columns; {ACCEPTED}")
        if number == 0:
            for column in ("chosen", "rejected"):
                if column not in row:
                    raise UserError(f"{where} has no column '{column}' (it has {', '.join(map(str, row))}); {ACCEPTED}")
            if (
                "prompt" not in row
                and isinstance(row["chosen"], str)
                and not row["chosen"].lstrip().startswith("Human:")
            ):
                raise UserError(f"{where} has no column 'prompt' and 'chosen' is not a transcript; {ACCEPTED}")
        yield row


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    with open_text(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    yield json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise UserError(f"{path}, line {number} is not JSON ({error}): mend or remove that line") from None


def read_json(path: Path) -> Iterator[dict[str, Any]]:
    with open_text(path) as file:
        try:
            rows = json.load(file)
        except UnicodeDecodeError:
            raise
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} is not JSON ({error})") from None
    if not isinstance(rows, list):
        raise UserError(f"{path} must hold a list of rows; one object a line belongs in a .jsonl file")
    yield from rows


def read_csv(path: Path) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(1 << 24)
    with open_text(path, newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            yield from reader
        except csv.Error as error:
            raise UserError(f"{path}, line {reader.reader.line_num}: {error}") from None


def read_parquet(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a readable Parquet file ({error})") from None


READERS = {".jsonl": read_jsonl, ".json": read_json, ".csv": read_csv, ".parquet": read_parquet}


class open_text:
    """`open` for UTF-8 text; bytes that are not UTF-8 raise UserError naming the file."""

    def __init__(self, path: Path, newline: str | None = None):
        try:
            self.path, self.file = path, path.open(encoding="utf-8-sig", newline=newline)
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror})") from None

    def __enter__(self):
        return self.file

    def __exit__(self, kind, error, trace):
        self.file.close()
        if isinstance(error, UnicodeDecodeError):
            raise UserError(f"{self.path} is not UTF-8 text ({error}): save it as UTF-8") from None


def read_hub(name: str, split: str) -> Iterator[dict[str, Any]]:
    from rlhf.hub import hub_errors

    import datasets

    with hub_errors(name, "data set", "--dataset"):
        available = datasets.get_dataset_split_names(name)
        wanted = next((s for s in SPLITS[split] if s in available), None)
        if wanted is None:
            raise UserError(f"data set {name} has no {split} split (it has {', '.join(available)})")
        rows = datasets.load_dataset(name, split=wanted)
    yield from checked_columns(rows, f"data set {name}, {wanted}")


# ---------------------------------------------------------------- rows


def parse_row(row: dict[str, Any]) -> Pair:
    """Make a Pair of a row of any accepted shape. Raises BadRow with the reason it cannot be used."""
    prompt, chosen, rejected = row.get("prompt"), row.get("chosen"), row.get("rejected")
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise BadRow("chosen and rejected have different types")
    if isinstance(chosen, str):
        if prompt is None:
            prompt, chosen, rejected = split_transcripts(chosen, rejected)
        if not isinstance(prompt, str):
            raise BadRow("prompt is not text")
        turns = parse_dialogue(prompt)
    else:
        turns, chosen, rejected = split_messages(prompt, chosen, rejected)
    chosen, rejected = chosen.strip(), rejected.strip()
    if not chosen or not rejected:
        raise BadRow("blank answer")
    if chosen == rejected:
        raise BadRow("chosen and rejected are identical")
    try:
        "".join([chosen, rejected, *(text for _, text in turns)]).encode()
    except UnicodeEncodeError:
        raise BadRow("half a surrogate pair") from None
    if HUMAN in chosen or ASSISTANT in chosen:
        raise BadRow("chosen runs on into another turn")
    return Pair(turns, chosen, rejected)


def parse_dialogue(prompt: str) -> tuple[tuple[str, str], ...]:
    """Split `\\n\\nHuman: ...\\n\\nAssistant:` into (role, text) turns; text before the first cue is the system's."""
    head, *rest = re.split(r"\n\n(Human|Assistant):", prompt)
    if not rest:
        return (("user", require_text(prompt)),)  # a bare question
    turns = [("system", head.strip())] if head.strip() else []
    turns += [(ROLES[role], text.strip()) for role, text in zip(rest[::2], rest[1::2], strict=True)]
    if turns[-1] != ("assistant", ""):
        raise BadRow("prompt does not end with 'Assistant:'")
    return checked_turns(turns[:-1])


def split_transcripts(chosen: str, rejected: str) -> tuple[str, str, str]:
    """Split two raw HH transcripts at their last answer; both must share all that comes before it."""
    end = chosen.rfind(ASSISTANT) + len(ASSISTANT)
    if end < len(ASSISTANT):
        raise BadRow("transcript without 'Assistant:'")
    prompt = chosen[:end]
    if not rejected.startswith(prompt):
        raise BadRow("transcripts differ before the last answer")
    return prompt, chosen[end:], rejected[end:]


def split_messages(prompt: Any, chosen: Any, rejected: Any) -> tuple[tuple[tuple[str, str], ...], str, str]:
    """Take message lists apart: with `prompt`, the answers alone; without, two whole dialogues that share a start."""
    dialogues = []
    for answer in (chosen, rejected):
        turns = parse_messages(prompt or []) + parse_messages(answer)
        if not turns or turns[-1][0] != "assistant":
            raise BadRow("answer does not end with an assistant message")
        dialogues.append(turns)
    (*start, (_, chosen)), (*other, (_, rejected)) = dialogues
    if start != other:
        raise BadRow("dialogues differ before the last answer")
    return checked_turns(start), chosen, rejected


def parse_messages(messages: Any) -> list[tuple[str, str]]:
    if isinstance(messages, str):
        return list(parse_dialogue(messages))
    if not isinstance(messages, list):
        raise BadRow("messages are not a list")
    turns = []
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in ("system", "user", "assistant"):
            raise BadRow("message without a role of system, user or assistant")
        turns.append((message["role"], require_text(message.get("content"))))
    return turns


def checked_turns(turns: list[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    if not any(role == "user" for role, _ in turns):
        raise BadRow("no user turn")
    if any(not text for _, text in turns):
        raise BadRow("blank turn")
    if any(cue in "\n\n" + text for _, text in turns for cue in (HUMAN, ASSISTANT)):
        raise BadRow("turn that holds another turn")
    return tuple(turns)


def require_text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise BadRow("blank turn")
    return value.strip()


def in_test_split(pair: Pair) -> bool:
    """True for about one prompt in twenty, the same ones every time."""
    return first_turn_sha256(pair)[0] < 256 // 20


def half_of(pair: Pair) -> str:
    """ "first" or "second": the half of the data that a pair belongs to, the same one every time."""
    return "first" if first_turn_sha256(pair)[1] < 128 else "second"


def first_turn_sha256(pair: Pair) -> bytes:
    """A hash of what the user said first, so that no dialogue is on both sides of a split."""
    first = next(text for role, text in pair.turns if role == "user")
    return hashlib.sha256(first.encode("utf-8", "replace")).digest()


def report_drops(what: str, kept: int, drops: Counter[str]) -> None:
    """Print one line: how many rows are used, how many were dropped and why."""
    reasons = ", ".join(f"{count} {reason}" for reason, count in drops.most_common())
    print(f"{what}: {kept} rows" + (f", dropped {drops.total()} ({reasons})" if drops else ""))


def fingerprint(pairs: Iterable[Pair]) -> str:
    """SHA-256 over the pairs in order: two runs with the same value saw the same data."""
    digest = hashlib.sha256()
    for pair in pairs:
        digest.update(json.dumps([pair.turns, pair.chosen, pair.rejected]).encode())
    return digest.hexdigest()


# ---------------------------------------------------------------- text and tokens


def hh_prompt(turns: Iterable[tuple[str, str]]) -> str:
    """`\\n\\nHuman: ...\\n\\nAssistant:`, as rm-static's `prompt` column has it."""
    return "".join(text if role == "system" else f"{CUES[role]} {text}" for role, text in turns) + ASSISTANT


class PromptFormat:
    """How a dialogue is written for the model, and where an answer ends.

    `hh` writes `\\n\\nHuman: ...\\n\\nAssistant:` with a leading space in the response; a response ends at EOS or where the
    model starts the next `\\n\\nHuman:`. `model` uses the chat template that an Instruct base brings and ends at EOS; one
    that writes the day's date gets always the same, or a run would change overnight. Text from data is never read as a special token.
    """

    def __init__(self, name: str, tokenizer: PreTrainedTokenizerBase):
        self.name, self.tokenizer = name, tokenizer
        self.eos_token_id: int = tokenizer.eos_token_id
        self.pad_token_id: int = tokenizer.pad_token_id
        self.stop_text = HUMAN if name == "hh" else None
        # all_special_tokens has those with a role only (BOS, EOS, ...), not <|start_header_id|> and its like.
        self.special_texts = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        self.bos_ids = tokenizer("", add_special_tokens=True)["input_ids"][:1]
        if self.bos_ids != [tokenizer.bos_token_id]:
            self.bos_ids = []  # a tokenizer that adds nothing, or only EOS
        if name == "hh":
            tokenizer.chat_template = HH_CHAT_TEMPLATE.replace(
                "{%- if bos -%}", "{%- if true -%}" if self.bos_ids else "{%- if false -%}"
            )
        elif not tokenizer.chat_template:
            raise UserError("--prompt-format model: this base brings no chat template; use --prompt-format hh")
        else:
            self.template = NO_CLOCK + tokenizer.get_chat_template()

    def prompt_text(self, turns: Iterable[tuple[str, str]]) -> str:
        """The text of a prompt, without BOS, up to where the answer starts."""
        if self.name == "hh":
            return hh_prompt(turns)
        messages = [{"role": role, "content": text} for role, text in turns]
        try:
            settings = {"chat_template": self.template, "tokenize": False, "add_generation_prompt": True}
            return self.tokenizer.apply_chat_template(messages, **settings)
        except TemplateError as error:  # it may want no system turn, or roles that alternate
            raise BadRow(f"the base's chat template refuses it ({error})") from None

    def prompt_ids(self, turns: Iterable[tuple[str, str]]) -> list[int]:
        """Token ids of a prompt, with exactly one BOS if the tokenizer uses one."""
        text = self.prompt_text(turns)
        if self.name == "hh":
            return self.bos_ids + self.encode(text)
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]  # the template writes the special tokens

    def response_ids(self, text: str) -> list[int]:
        """Token ids of a response, without EOS."""
        return self.encode(f" {text}" if self.name == "hh" else text)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def decode(self, ids: list[int]) -> str:
        """The text of a response, stripped."""
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()

    def has_special_text(self, turns: Iterable[tuple[str, str]]) -> bool:
        """True when a turn spells a special token that the template of `model` would let through as one."""
        return self.name == "model" and any(token in text for _, text in turns for token in self.special_texts)


def tokenize_prompt(turns: tuple[tuple[str, str], ...], form: PromptFormat, max_tokens: int) -> list[int]:
    """Token ids of a prompt of at most `max_tokens`; a longer one loses its oldest turns, whole.

    Raises BadRow when the last user turn alone is too long.
    """
    if form.has_special_text(turns):
        raise BadRow("text that spells a special token")
    system = turns[:1] if turns[0][0] == "system" else ()
    starts = [i for i, (role, _) in enumerate(turns) if role == "user"]
    for start in starts:
        kept = turns if start == starts[0] else system + turns[start:]
        ids = form.prompt_ids(kept)
        if len(ids) <= max_tokens:
            return ids
    raise BadRow("prompt too long")


def tokenize_prompts(pairs: list[Pair], form: PromptFormat, max_tokens: int) -> list[list[int]]:
    """Token ids of each different prompt, at most `max_tokens`, in the pairs' order; drops are reported."""
    drops: Counter[str] = Counter()
    prompts = []
    for turns in dict.fromkeys(pair.turns for pair in pairs):
        try:
            prompts.append(tokenize_prompt(turns, form, max_tokens))
        except BadRow as reason:
            drops[str(reason)] += 1
    if drops:
        report_drops("prompts", len(prompts), drops)
    if not prompts:
        raise UserError(f"no prompt fits into {max_tokens} tokens: raise --max-prompt-length")
    return prompts


def tokenize_pairs(pairs: list[Pair], form: PromptFormat, max_length: int, what: str) -> list[TokenPair]:
    """Tokenise pairs to at most `max_length` tokens, prompt and response together.

    A response gets at most half of `max_length` and is cut at its end; the prompt gets what the longer response leaves,
    and is cut from the left at a turn boundary. Pairs that cutting makes identical are dropped; both are reported.
    """
    drops: Counter[str] = Counter()
    tokenized, room, cut = [], max_length // 2 - 1, 0  # and one for EOS
    for pair in pairs:
        answers = []
        for text in (pair.chosen, pair.rejected):
            ids = form.response_ids(text)
            cut += len(ids) > room
            answers.append(ids[:room] if len(ids) > room else [*ids, form.eos_token_id])
        try:
            prompt_ids = tokenize_prompt(pair.turns, form, max_length - 1 - max(map(len, answers)))
        except BadRow as reason:
            drops[str(reason)] += 1
            continue
        if answers[0] == answers[1]:
            drops["identical after cutting"] += 1
            continue
        tokenized.append(TokenPair(pair, prompt_ids, *answers))
    if drops:
        report_drops(what, len(tokenized), drops)
    if cut:
        print(f"{what}: {cut} of {2 * len(pairs)} responses cut to {room} tokens, half of --max-length")
    if not tokenized:
        raise UserError(f"no pair of {what} fits into {max_length} tokens: raise --max-length")
    return tokenized
