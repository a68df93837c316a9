"""How a dialogue is written for the model, and the token ids of prompts and answers.

PPO needs prompt and answer tokenised apart. Together they must still give the tokens of the whole
text, as every other program tokenises it. So an answer is tokenised as a continuation, and the
result is checked: once per run with a dialogue of our own, and for each row if the tokenizer might
join the end of a prompt to the start of an answer.
"""

import hashlib
import json
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rlhf.data.rows import HUMAN, BadRow, Pair, Turns, hh_prompt
from rlhf.data.sources import reasons_of, report_drops
from rlhf.data.template import (
    ANSWER,
    EARLIER,
    FOLLOW_UP,
    QUESTION,
    SYSTEM,
    ChatTemplate,
    template_ids,
    use_hh_template,
)
from rlhf.runs.errors import UserError
from rlhf.runs.terminal import console

DIALOGUES = ((QUESTION,), (QUESTION, EARLIER, FOLLOW_UP), (SYSTEM, QUESTION))  # prompts to try
STARTS = ("A", "a", "7", "é", "日", "(", '"', "'s", "<", "-", "*", "☂", "😀")  # of answers


@dataclass(frozen=True)
class TokenPair:
    """A row as token ids. Responses end with EOS, unless they were cut to fit."""

    pair: Pair
    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int] | None = None  # if it has one


class PromptFormat:
    """How a dialogue is written for the model, and where an answer ends.

    `hh` writes `\\n\\nHuman: ...\\n\\nAssistant:` with a leading space in the response. A response
    ends at EOS, or where the model starts the next `\\n\\nHuman:`. `model` uses the chat template
    that an Instruct base brings, and an answer ends with that template's token. Text from data is
    never read as a special token.

    Attributes:
        tokenizer: its `chat_template` gives the same ids as `prompt_ids`, now and once saved.
        eos_token_id: the token that ends an answer; `end_text` is its text.
        stop_text: text that also ends an answer, or None.

    Raises:
        UserError: the tokenizer is not of the tokenizers library, there is no chat template, or it
            leaves out what the user says. `check` raises for everything else that is wrong.
    """

    def __init__(self, name: str, tokenizer: PreTrainedTokenizerBase):
        self.name = name
        self.tokenizer = tokenizer
        self.pad_token_id: int = tokenizer.pad_token_id
        self.stop_text = HUMAN if name == "hh" else None
        # all_special_tokens only has those with a role (BOS, EOS, ...), not <|start_header_id|>.
        added = tokenizer.added_tokens_decoder.values()
        self.special_texts = [token.content for token in added if token.special]
        self.going_on = without_prefix(tokenizer)
        self.bos_ids = self.ids_before_text()
        self.template: ChatTemplate | None = None
        self.opening = " "  # before an answer's text
        self.closing = ""  # after it, before the token that ends it
        self.end_text: str = tokenizer.eos_token
        self.refusal = ""  # why it cannot be used
        if name == "hh":
            prompts = [(turns, self.prompt_ids(turns)) for turns in DIALOGUES]
            if self.bos_ids not in ([], [tokenizer.bos_token_id]):
                self.refusal = (
                    f"the tokenizer begins a text with {tokenizer.decode(self.bos_ids)!r}, but its "
                    f"bos_token is {tokenizer.bos_token!r} (tokenizer_config.json can set it)"
                )
            elif not use_hh_template(tokenizer, bool(self.bos_ids), prompts):
                self.refusal = "no chat template gives the tokens of its prompts"
        else:
            self.template = ChatTemplate(tokenizer, self.special_texts)
            self.opening = self.template.opening
            self.closing = self.template.closing
            self.end_text = self.template.end_text
            self.refusal = self.template.refusal
        self.eos_token_id: int = tokenizer.convert_tokens_to_ids(self.end_text)

    # ---------------------------------------------------------------- text and ids

    def prompt_text(self, turns: Iterable[tuple[str, str]]) -> str:
        """The text of a prompt, up to where the answer starts; in `hh` without BOS.

        Raises:
            BadRow: the base's chat template refuses the turns, or leaves something out.
        """
        return self.template.prompt(tuple(turns)) if self.template else hh_prompt(turns)

    def prompt_ids(self, turns: Iterable[tuple[str, str]]) -> list[int]:
        """Token ids of a prompt, with exactly one BOS at its start if the tokenizer uses one."""
        return self.whole_ids(self.prompt_text(turns))

    def whole_ids(self, text: str) -> list[int]:
        """Token ids of a text that starts as a prompt does."""
        if self.template:  # which writes the special tokens
            return self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self.bos_ids + self.as_plain_text(text)

    def ids_before_text(self) -> list[int]:
        """What the tokenizer puts before a text: BOS, or nothing. (It may put EOS after it.)"""
        _, text = QUESTION
        whole = self.tokenizer(text)["input_ids"]
        return whole[: whole.index(self.as_plain_text(text)[0])]

    def response_text(self, text: str) -> str:
        """An answer as it continues a prompt, up to the token that ends it."""
        return self.opening + text + self.closing

    def response_ids(self, text: str) -> list[int]:
        """Token ids of a response, without EOS."""
        text = self.response_text(text)
        return self.as_plain_text(text) if self.starts_new_text else self.encode(text)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text that continues another, with no special token read in it."""
        if self.going_on is None:
            return self.as_plain_text(text)
        return self.going_on.encode(text, add_special_tokens=False).ids

    def as_plain_text(self, text: str) -> list[int]:
        """Token ids of a text of its own, in which no special token is read."""
        options = {"add_special_tokens": False, "split_special_tokens": True}
        return self.tokenizer(text, **options)["input_ids"]

    def decode(self, ids: list[int]) -> str:
        """The text of a response, stripped."""
        text = self.tokenizer.decode(ids, skip_special_tokens=True).strip()
        return text.removeprefix(self.opening.strip()).lstrip()

    def read_prompt(self, ids: list[int]) -> str:
        """The text of a prompt as the model reads it, without BOS."""
        begins = ids[:1] == [self.tokenizer.bos_token_id]
        return self.tokenizer.decode(ids[begins:])

    def spells_special(self, turns: Iterable[tuple[str, str]]) -> bool:
        """Whether an answer spells its own end, or any text a token that a template lets pass."""
        everywhere = self.special_texts if self.template else []
        return any(
            token in text
            for role, text in turns
            for token in (*everywhere, *([self.end_text] if role == "assistant" else []))
        )

    # ---------------------------------------------------------------- checks

    def check(self) -> None:
        """Try the format, once per run, before anything is trained with it.

        Raises:
            UserError: other programs would not read it the same way; says why.
        """
        if not self.checked:
            way_out = "use --prompt-format hh" if self.template else "use another base"
            raise UserError(f"--prompt-format {self.name}: {self.refusal}; {way_out}")

    @cached_property
    def checked(self) -> bool:
        self.refusal = self.refusal or self.why_unusable()
        if not self.refusal and self.end_text != self.tokenizer.eos_token:
            console.print(
                f"An answer ends with {self.end_text}, as in the base's chat template, "
                f"and not with its tokenizer's EOS {self.tokenizer.eos_token}."
            )
        return not self.refusal

    def why_unusable(self) -> str:
        if self.template and not self.template.keeps_earlier:
            return "the base's chat template leaves out earlier turns"
        with tempfile.TemporaryDirectory() as folder:
            self.tokenizer.save_pretrained(folder)
            saved = AutoTokenizer.from_pretrained(folder)
        for turns in DIALOGUES:
            try:
                prompt = self.prompt_text(turns)
            except BadRow:  # such rows are dropped
                continue
            ids = self.whole_ids(prompt)
            both = ids + self.response_ids(ANSWER)
            if ids[:2] == [self.tokenizer.bos_token_id] * 2:
                return "prompts start with BOS twice"
            if self.whole_ids(prompt + self.response_text(ANSWER)) != both:
                return "this tokenizer splits prompt and answer differently together than apart"
            if any(template_ids(each, turns) != ids for each in (self.tokenizer, saved)):
                return "the saved chat template does not give the prompt's tokens"
            if self.template:
                whole = self.whole_ids(self.template.dialogue(turns, ANSWER))
                if whole[: len(both) + 1] != [*both, self.eos_token_id]:
                    return (
                        "the base's chat template writes an answer differently in longer dialogues"
                    )
        return ""

    @cached_property
    def starts_new_text(self) -> bool:
        """Whether the tokenizer treats an answer as a new text, as after a special token."""
        if self.going_on is None or self.template is None:
            return False
        prompt = self.template.render([QUESTION])
        answer = self.response_text(ANSWER)
        apart = self.whole_ids(prompt) + self.as_plain_text(answer)
        return self.whole_ids(prompt + answer) == apart

    @cached_property
    def may_join(self) -> bool:
        """Whether a token might span the end of a prompt and the start of an answer.

        It cannot if the pre-tokenizer always cuts between them, whatever the answer starts with.
        """
        backend = self.tokenizer.backend_tokenizer
        if backend.pre_tokenizer is None or backend.normalizer is not None:
            return True
        text = self.prompt_text((QUESTION,))
        ends = [text.rfind(token) + len(token) for token in self.special_texts if token in text]
        tail = text[max(ends, default=0) :][-40:]
        cut = backend.pre_tokenizer.pre_tokenize_str
        return not all(
            any(start == len(tail) for _, (start, _) in cut(tail + self.opening + first))
            for first in STARTS
        )

    def writes(self, turns: Turns, prompt: str, answer: str) -> bool:
        """Whether the format's own template writes an answer as we do: some cut or move thoughts.

        Args:
            prompt: the text of `turns`.
        """
        if not self.template:
            return True
        ours = prompt + self.response_text(answer) + self.end_text
        return self.template.dialogue(turns, answer).startswith(ours)

    def joins(self, prompt: str, prompt_ids: list[int], answer: str, answer_ids: list[int]) -> bool:
        """Whether prompt and answer have different tokens together than apart."""
        if not self.may_join:
            return False
        return self.whole_ids(prompt + self.response_text(answer)) != prompt_ids + answer_ids


def without_prefix(tokenizer: PreTrainedTokenizerBase) -> Tokenizer | None:
    """A copy that puts no space before a text, for continuations; None if the original does not.

    Raises:
        UserError: a tokenizer that is not of the tokenizers library.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError(
            "the base's tokenizer has no tokenizer.json: save it as a fast tokenizer first"
        )
    parts = {name: getattr(backend, name) for name in ("normalizer", "pre_tokenizer")}
    before = {
        name: json.loads(part.__getstate__()) if part else None for name, part in parts.items()
    }
    after = {name: no_prefix(part) for name, part in before.items()}
    if after == before:
        return None
    copy = Tokenizer.from_str(json.dumps(json.loads(backend.to_str()) | after))
    copy.no_truncation()
    copy.no_padding()
    copy.encode_special_tokens = True
    return copy


def no_prefix(part: dict[str, Any] | None) -> dict[str, Any] | None:
    """The settings of a normalizer or pre-tokenizer, without what adds a space before a text."""
    match part:
        case {"type": "Prepend"}:
            return None
        case {"type": "Metaspace"}:
            return part | {"prepend_scheme": "never"}
        case {"type": "ByteLevel"}:
            return part | {"add_prefix_space": False}
        case {"type": "Sequence", "normalizers": inner}:
            return part | {"normalizers": [kept for kept in map(no_prefix, inner) if kept]}
        case {"type": "Sequence", "pretokenizers": inner}:
            return part | {"pretokenizers": [no_prefix(each) for each in inner]}
    return part


# ---------------------------------------------------------------- pairs and prompts


def tokenize_prompt(turns: Turns, prompt_format: PromptFormat, max_tokens: int) -> list[int]:
    """Token ids of a prompt, at most `max_tokens`. A longer prompt loses whole turns, oldest first.

    Raises:
        BadRow: the last user turn alone is too long, or the format cannot write the prompt.
        UserError: the format cannot write any prompt.
    """
    return cut_prompt(turns, prompt_format, max_tokens)[2]


def cut_prompt(
    turns: Turns, prompt_format: PromptFormat, max_tokens: int
) -> tuple[Turns, str, list[int]]:
    """As many last turns as fit, their text and its token ids, found in linear time."""
    prompt_format.check()
    if prompt_format.spells_special(turns):
        raise BadRow("text that spells a special token")
    system = turns[:1] if turns[0][0] == "system" else ()
    starts = [i for i, (role, _) in enumerate(turns) if role == "user"]

    def written(count: int) -> tuple[Turns, str, list[int]]:
        """The prompt from the user's last `count` turns on."""
        kept = turns if count == len(starts) else system + turns[starts[-count] :]
        text = prompt_format.prompt_text(kept)
        return kept, text, prompt_format.whole_ids(text)

    best = written(len(starts))
    if len(best[2]) <= max_tokens:
        return best
    # From the end: double the turns while they fit, then bisect.
    fits = 0
    too_many = len(starts)
    while too_many - fits > 1:
        count = min(2 * fits or 1, (fits + too_many) // 2)
        tried = written(count)
        if len(tried[2]) <= max_tokens:
            fits = count
            best = tried
        else:
            too_many = count
    if not fits:
        raise BadRow("prompt too long")
    return best


def tokenize_prompts(
    pairs: list[Pair], prompt_format: PromptFormat, max_tokens: int
) -> list[list[int]]:
    """Token ids of each distinct prompt, in order; reports those that were dropped."""
    drops: Counter[str] = Counter()
    prompts = []
    for turns in dict.fromkeys(pair.turns for pair in pairs):
        try:
            prompts.append(tokenize_prompt(turns, prompt_format, max_tokens))
        except BadRow as reason:
            drops[str(reason)] += 1
    if drops:
        report_drops("prompts", len(prompts), drops)
    if not prompts:
        raise UserError(none_left("no prompt", drops, max_tokens, "--max-prompt-length"))
    return prompts


def tokenize_pairs(
    pairs: list[Pair], prompt_format: PromptFormat, max_length: int, what: str
) -> list[TokenPair]:
    """Tokenise rows with one or two answers to at most `max_length` tokens, prompt and response.

    A response gets at most half of `max_length` and is cut at its end. The prompt gets what the
    longer response leaves, and loses whole turns, oldest first. A row is dropped if it cannot be
    written, or if its answers are identical after cutting. Drops and cuts are reported.

    Raises:
        UserError: the format cannot write any row, or no row is left.
    """
    prompt_format.check()
    drops: Counter[str] = Counter()
    tokenized: list[TokenPair] = []
    room = max_length // 2 - 1  # and one for EOS
    cut = responses = 0
    for pair in pairs:
        texts = [text for text in (pair.chosen, pair.rejected) if text is not None]
        wholes = [prompt_format.response_ids(text) for text in texts]
        responses += len(texts)
        cut += sum(len(ids) > room for ids in wholes)
        try:
            tokenized.append(tokenize_pair(pair, texts, wholes, prompt_format, max_length))
        except BadRow as reason:
            drops[str(reason)] += 1
    if drops:
        report_drops(what, len(tokenized), drops)
    if not tokenized:
        raise UserError(none_left(f"no row of {what}", drops, max_length, "--max-length"))
    if cut:
        console.print(
            f"{what}: {cut} of {responses} responses cut to {room} tokens, half of --max-length"
        )
    return tokenized


def fingerprint_tokens(pairs: Iterable[TokenPair]) -> str:
    """SHA-256 over rows as token ids: another tokenizer or template gives another one, too."""
    digest = hashlib.sha256()
    for pair in pairs:
        ids = pair.prompt_ids, pair.chosen_ids, pair.rejected_ids
        digest.update(json.dumps(ids).encode())
    return digest.hexdigest()


def tokenize_pair(
    pair: Pair,
    texts: list[str],
    wholes: list[list[int]],
    prompt_format: PromptFormat,
    max_length: int,
) -> TokenPair:
    """A row as tokens; `wholes` are its responses' tokens, before they are cut or closed."""
    room = max_length // 2 - 1
    if prompt_format.spells_special([("assistant", text) for text in texts]):
        raise BadRow(f"answer that spells a special token, such as {prompt_format.end_text}")
    answers = [
        ids[:room] if len(ids) > room else [*ids, prompt_format.eos_token_id] for ids in wholes
    ]
    turns, prompt, prompt_ids = cut_prompt(
        pair.turns, prompt_format, max_length - 1 - max(map(len, answers))
    )
    if len(answers) == 2 and answers[0] == answers[1]:
        raise BadRow("identical after cutting")
    if not all(prompt_format.writes(turns, prompt, text) for text in texts):
        raise BadRow("the base's chat template writes this answer differently")
    if any(
        prompt_format.joins(prompt, prompt_ids, *answer)
        for answer in zip(texts, wholes, strict=True)
    ):
        raise BadRow("a token would span the end of the prompt and the start of the answer")
    return TokenPair(pair, prompt_ids, *answers)


def none_left(what: str, drops: Counter[str], max_tokens: int, flag: str) -> str:
    """The error if every prompt or row was dropped."""
    if set(drops) <= {"prompt too long", "identical after cutting"}:
        return f"{what} fits into {max_tokens} tokens: raise {flag}"
    return f"{what} can be used: dropped {reasons_of(drops)}"
