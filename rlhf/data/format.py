"""How a dialogue is written for the model, and the token ids of prompts and answers.

A prompt and an answer are tokenised apart, as PPO needs them, and together must be the tokens of
the whole text, as everybody else tokenises it. That holds because an answer is tokenised as text
that goes on, and because it is checked: once a run with a dialogue of our own, and for each row
where the tokenizer may join the end of a prompt and the start of an answer.
"""

import json
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from rlhf.cli import UserError, one_line
from rlhf.data.rows import HUMAN, BadRow, Pair, Turns, hh_prompt
from rlhf.data.sources import reasons_of, report_drops
from rlhf.reporting import console

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

# The day that Llama 3's template falls back to: a run would change overnight with the real one.
NO_CLOCK = "{%- macro strftime_now(format) -%}26 Jul 2024{%- endmacro -%}"

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

# A dialogue to try a tokenizer and a template with; no text of it is part of another.
SYSTEM = ("system", "Be brief, and kind.")
QUESTION = ("user", "Why is the sky blue at noon?")
EARLIER = ("assistant", "Air scatters blue light most.")
FOLLOW_UP = ("user", "And red at dusk?")
ANSWER = "Because its path is longer then."
STARTS = ("A", "a", "7", "é", "日", "(", '"', "'s", "<", "-", "*", "☂", "😀")  # of answers


@dataclass(frozen=True)
class TokenPair:
    """A pair as token ids. A response that was cut to fit has no EOS; the others end with it."""

    pair: Pair
    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]


class PromptFormat:
    """How a dialogue is written for the model, and where an answer ends.

    `hh` writes `\\n\\nHuman: ...\\n\\nAssistant:` with a leading space in the response; a response ends at
    EOS or where the model starts the next `\\n\\nHuman:`. `model` uses the chat template that an
    Instruct base brings, and an answer ends with the token that the template ends it with. Text from
    data is never read as a special token.

    Attributes:
        eos_token_id: the token that ends an answer; `end_text` is its text.
        stop_text: text that ends an answer, too, or None.
        tokenizer: whose `chat_template` gives the ids of `prompt_ids`, now and when it is saved.

    Raises:
        UserError: no tokenizer of the tokenizers library, no chat template, or one that leaves out
            what the user said. Whatever else makes it unusable is raised by `check`.
    """

    def __init__(self, name: str, tokenizer: PreTrainedTokenizerBase):
        self.name, self.tokenizer = name, tokenizer
        self.pad_token_id: int = tokenizer.pad_token_id
        self.stop_text = HUMAN if name == "hh" else None
        # all_special_tokens has those with a role only (BOS, EOS, ...), not <|start_header_id|> and its like.
        self.special_texts = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        self.bos_ids = tokenizer("", add_special_tokens=True)["input_ids"][:1]
        if self.bos_ids != [tokenizer.bos_token_id]:
            self.bos_ids = []  # a tokenizer that adds nothing, or only EOS
        self.going_on = without_prefix(tokenizer)
        self.end_text: str = tokenizer.eos_token
        self.opening, self.closing = " ", ""  # what stands around an answer's text, before the token that ends it
        self.refusal = ""  # why it cannot be used
        if name == "hh":
            self.use_hh_template()
        else:
            self.read_template()
        self.eos_token_id: int = tokenizer.convert_tokens_to_ids(self.end_text)

    def use_hh_template(self) -> None:
        """Give the tokenizer the template that has the ids of `prompt_ids`."""
        bos = "true" if self.bos_ids else "false"
        template = HH_CHAT_TEMPLATE.replace("{%- if bos -%}", "{%- if " + bos + " -%}")
        # Some tokenizers put a space before a text, but not after BOS.
        spaced = template.replace("{{ bos_token }}", "{{ bos_token + ' ' }}")
        for tried in (spaced, template):
            self.tokenizer.chat_template = tried
            if all(self.template_ids(turns) == self.prompt_ids(turns) for turns in self.dialogues):
                return
        self.refusal = "no chat template gives what this tokenizer makes of the prompts"

    # ---------------------------------------------------------------- a base's own template

    def read_template(self) -> None:
        """Find out what the chat template writes around an answer, and which token ends it."""
        template = self.default_template()
        if "strftime_now" in template and NO_CLOCK not in template:
            template = NO_CLOCK + template
            self.tokenizer.chat_template = template  # what is served is what was trained
        self.template = template
        try:
            prompt = self.render([QUESTION])
            silent = self.render([QUESTION], add_generation_prompt=False)
            whole = self.render([QUESTION, ("assistant", ANSWER)], add_generation_prompt=False)
        except BadRow as reason:
            raise UserError(f"--prompt-format model: {reason}{self.wants_parts()}; use --prompt-format hh") from None
        if QUESTION[1] not in prompt and "messages" in template:
            raise UserError(
                f"--prompt-format model: the base's chat template leaves out what the user says{self.wants_parts()}; "
                "use --prompt-format hh"
            )
        if QUESTION[1] not in prompt:
            self.refusal = "the base's chat template leaves out what the user says"
        elif QUESTION[1] not in whole:
            self.refusal = "the base's chat template leaves out earlier turns"
        elif not whole.startswith(prompt):
            cue = prompt.removeprefix(silent)
            self.refusal = f"the base's chat template starts an answer with {cue!r} only where it is still to come"
        else:
            self.opening, found, rest = whole.removeprefix(prompt).partition(ANSWER)
            self.read_ending(found, rest)
            special = any(text in self.opening for text in self.special_texts)
            if special or (self.opening.strip() and prompt == silent):
                self.refusal = (
                    f"the base's chat template puts {self.opening!r} before an answer but not at the end of a prompt: "
                    "the model would have to write it itself"
                )

    def default_template(self) -> str:
        templates = self.tokenizer.chat_template
        if not templates:
            raise UserError("--prompt-format model: this base brings no chat template; use --prompt-format hh")
        if isinstance(templates, dict):
            if "default" not in templates:
                raise UserError(
                    f"--prompt-format model: this base brings the chat templates {', '.join(templates)} and no default; "
                    "use --prompt-format hh"
                )
            return templates["default"]
        return templates

    def read_ending(self, found: str, rest: str) -> None:
        """The token with which the template ends an answer, and the white space before it."""
        ends = [(rest.index(text), -len(text), text) for text in self.special_texts if text in rest]
        if not found:
            self.refusal = "the base's chat template leaves out what the assistant says"
        elif not ends or rest[: min(ends)[0]].strip():
            with_what = f"{rest!r}, which is no special token" if rest.strip() else "nothing"
            self.refusal = f"the base's chat template ends an answer with {with_what}: the model could not learn to stop"
        else:
            start, _, self.end_text = min(ends)
            self.closing = rest[:start]
            if self.tokenizer.convert_tokens_to_ids(self.end_text) == self.pad_token_id:
                self.refusal = f"{self.end_text}, which ends an answer, is also the token to pad with"

    def wants_parts(self) -> str:
        """A remark if the template writes texts only where each is in a list of parts."""
        messages = [{"role": "user", "content": [{"type": "text", "text": QUESTION[1]}]}]
        try:
            return " (it wants content as a list of parts)" if QUESTION[1] in self.render_messages(messages) else ""
        except BadRow:
            return ""

    def render(self, turns: Iterable[tuple[str, str]], add_generation_prompt: bool = True) -> str:
        messages = [{"role": role, "content": text} for role, text in turns]
        return self.render_messages(messages, add_generation_prompt)

    def render_messages(self, messages: list[dict[str, Any]], add_generation_prompt: bool = True) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                messages,
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except Exception as error:  # a template is a program: it may want no system turn, or have an error
            raise BadRow(f"the base's chat template refuses it ({one_line(error)})") from None

    def without_loss(self, turns: Turns) -> str:
        """The text of a prompt. Raises BadRow if the template leaves out a turn's text."""
        text = self.render(turns)
        place = 0
        for role, said in turns if "messages" in self.template else ():
            found = text.find(said) if role == "system" else text.find(said, place)
            if found < 0 or (role == "system" and not self.keeps_system):
                raise BadRow(f"the base's chat template leaves out or changes the {role}'s text")
            place = place if role == "system" else found + len(said)
        return text

    @cached_property
    def keeps_system(self) -> bool:
        """Whether the template writes a system text; a short one may be found by chance."""
        try:
            return SYSTEM[1] in self.render([SYSTEM, QUESTION])
        except BadRow:
            return True  # and says so itself

    # ---------------------------------------------------------------- text and ids

    def prompt_text(self, turns: Iterable[tuple[str, str]]) -> str:
        """The text of a prompt, up to where the answer starts; in `hh` without BOS.

        Raises:
            BadRow: the base's chat template refuses the turns, or leaves something out.
        """
        return hh_prompt(turns) if self.name == "hh" else self.without_loss(tuple(turns))

    def prompt_ids(self, turns: Iterable[tuple[str, str]]) -> list[int]:
        """Token ids of a prompt, with exactly one BOS at its start if the tokenizer uses one."""
        return self.whole_ids(self.prompt_text(turns))

    def whole_ids(self, text: str) -> list[int]:
        """Token ids of a text from the start of a prompt on."""
        if self.name == "hh":
            options = {"add_special_tokens": False, "split_special_tokens": True}
            return self.bos_ids + self.tokenizer(text, **options)["input_ids"]
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]  # the template writes the special tokens

    def response_text(self, text: str) -> str:
        """An answer as it goes on from a prompt, without what ends it."""
        return self.opening + text + self.closing

    def response_ids(self, text: str) -> list[int]:
        """Token ids of a response, without EOS."""
        if self.is_new_text:
            return self.tokenizer(self.response_text(text), add_special_tokens=False)["input_ids"]
        return self.encode(self.response_text(text))

    def encode(self, text: str) -> list[int]:
        """Token ids of a text that goes on from another, in which no special token is read."""
        if self.going_on is None:
            return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return self.going_on.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """The text of a response, stripped."""
        text = self.tokenizer.decode(ids, skip_special_tokens=True).strip()
        return text.removeprefix(self.opening.strip()).lstrip()

    def template_ids(self, turns: Iterable[tuple[str, str]], tokenizer: Any = None) -> list[int]:
        """What everybody else makes of a prompt: by the tokenizer's own chat template."""
        messages = [{"role": role, "content": text} for role, text in turns]
        options = {"add_generation_prompt": True, "return_dict": False}
        return list((tokenizer or self.tokenizer).apply_chat_template(messages, **options))

    def spells_special(self, turns: Iterable[tuple[str, str]]) -> bool:
        """True when a turn spells a special token that `model` would let through as one, or an answer its end."""
        everywhere = self.special_texts if self.name == "model" else []
        return any(
            token in text
            for role, text in turns
            for token in (*everywhere, *([self.end_text] if role == "assistant" else []))
        )

    # ---------------------------------------------------------------- checks

    @cached_property
    def dialogues(self) -> list[Turns]:
        """Prompts to try, of those that the template takes."""
        tried = (QUESTION,), (QUESTION, EARLIER, FOLLOW_UP), (SYSTEM, QUESTION)
        if self.name == "hh":
            return list(tried)
        taken = []
        for turns in tried:
            try:
                self.prompt_text(turns)
                taken.append(turns)
            except BadRow:  # such rows are dropped
                continue
        return taken

    @cached_property
    def is_new_text(self) -> bool:
        """Whether the tokenizer sees a text of its own in an answer, as some do after a special token."""
        if self.going_on is None or self.name == "hh":
            return False
        prompt = self.render([QUESTION])
        answer = self.tokenizer(self.response_text(ANSWER), add_special_tokens=False)["input_ids"]
        return self.whole_ids(prompt + self.response_text(ANSWER)) == self.whole_ids(prompt) + answer

    @cached_property
    def may_join(self) -> bool:
        """Whether a token might span the end of a prompt and the start of an answer."""
        backend = self.tokenizer.backend_tokenizer
        if backend.pre_tokenizer is None or backend.normalizer is not None:
            return True
        text = self.prompt_text((QUESTION,))
        end = max((text.rfind(token) + len(token) for token in self.special_texts if token in text), default=0)
        tail = text[end:][-40:]
        return not all(
            len(tail) in (start for _, (start, _) in backend.pre_tokenizer.pre_tokenize_str(tail + self.opening + first))
            for first in STARTS
        )

    def joins(self, prompt: str, prompt_ids: list[int], answer: str, answer_ids: list[int]) -> bool:
        """Whether prompt and answer have other tokens together than apart."""
        return self.may_join and self.whole_ids(prompt + self.response_text(answer)) != prompt_ids + answer_ids

    def check(self) -> None:
        """Try the format once a run, before anything is trained on it.

        Raises:
            UserError: what it writes is not what everybody else would make of it; says why.
        """
        if not self.checked:
            raise UserError(f"--prompt-format {self.name}: {self.refusal}" + self.way_out)

    @property
    def way_out(self) -> str:
        return "; use --prompt-format hh" if self.name == "model" else "; use another base"

    @cached_property
    def checked(self) -> bool:
        self.refusal = self.refusal or self.why_unusable()
        if not self.refusal and self.end_text != self.tokenizer.eos_token:
            console.print(
                f"An answer ends with {self.end_text}, as in the base's chat template, and not with its tokenizer's "
                f"EOS {self.tokenizer.eos_token}."
            )
        return not self.refusal

    def why_unusable(self) -> str:
        if (QUESTION, EARLIER, FOLLOW_UP) not in self.dialogues and self.drops_earlier():
            return "the base's chat template leaves out earlier turns"
        with tempfile.TemporaryDirectory() as folder:
            self.tokenizer.save_pretrained(folder)
            saved = AutoTokenizer.from_pretrained(folder)
        for turns in self.dialogues:
            prompt = self.prompt_text(turns)
            ids, answer = self.whole_ids(prompt), self.response_ids(ANSWER)
            if ids[0] == self.tokenizer.bos_token_id and ids[1] == ids[0]:
                return "prompts start with BOS twice"
            if self.whole_ids(prompt + self.response_text(ANSWER)) != ids + answer:
                return "this tokenizer makes other tokens of prompt and answer together than of each"
            for tokenizer in (self.tokenizer, saved):
                if self.template_ids(turns, tokenizer) != ids:
                    return "the saved chat template does not give the prompt's tokens"
            if self.name == "model" and not self.is_whole(turns, ids + answer):
                return "the base's chat template writes an answer that is there in another way than one to come"
        return ""

    def drops_earlier(self) -> bool:
        try:
            return not all(text in self.render([QUESTION, EARLIER, FOLLOW_UP]) for _, text in (QUESTION, EARLIER))
        except BadRow:
            return False  # and says so itself

    def is_whole(self, turns: Turns, ids: list[int]) -> bool:
        """Whether `ids` and the token that ends an answer are how the template writes the dialogue."""
        whole = self.whole_ids(self.render([*turns, ("assistant", ANSWER)], add_generation_prompt=False))
        return whole[: len(ids) + 1] == [*ids, self.eos_token_id]


def without_prefix(tokenizer: PreTrainedTokenizerBase) -> Tokenizer | None:
    """A copy that puts no space before a text, for text that goes on; None if the tokenizer puts none.

    Raises:
        UserError: a tokenizer that is not of the tokenizers library.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError("the base's tokenizer has no tokenizer.json: save it as a fast tokenizer first")
    parts = {name: getattr(backend, name) for name in ("normalizer", "pre_tokenizer")}
    before = {name: json.loads(part.__getstate__()) if part else None for name, part in parts.items()}
    after = {name: no_prefix(part) for name, part in before.items()}
    if after == before:
        return None
    copy = Tokenizer.from_str(json.dumps(json.loads(backend.to_str()) | after))
    copy.no_truncation()
    copy.no_padding()
    copy.encode_special_tokens = True
    return copy


def no_prefix(part: dict[str, Any] | None) -> dict[str, Any] | None:
    """The settings of a normalizer or pre-tokenizer without what puts a space before a text."""
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


def tokenize_prompt(turns: Turns, form: PromptFormat, max_tokens: int) -> list[int]:
    """Token ids of a prompt of at most `max_tokens`; a longer one loses its oldest turns, whole.

    Raises:
        BadRow: the last user turn alone is too long, or the format cannot write the prompt.
        UserError: the format can write none rightly.
    """
    return fit_prompt(turns, form, max_tokens)[1]


def fit_prompt(turns: Turns, form: PromptFormat, max_tokens: int) -> tuple[str, list[int]]:
    """The text and the token ids of as many of the last turns as fit; takes time linear in their length."""
    form.check()
    if form.spells_special(turns):
        raise BadRow("text that spells a special token")
    system = turns[:1] if turns[0][0] == "system" else ()
    starts = [i for i, (role, _) in enumerate(turns) if role == "user"]

    def written(count: int) -> tuple[str, list[int]]:
        """With the last `count` turns of the user's."""
        kept = turns if count == len(starts) else system + turns[starts[-count] :]
        text = form.prompt_text(kept)
        return text, form.whole_ids(text)

    best = written(len(starts))
    if len(best[1]) <= max_tokens:
        return best
    # From the end: twice as many turns as long as these fit, then halves between.
    fits, too_many = 0, len(starts)
    while too_many - fits > 1:
        count = min(2 * fits or 1, (fits + too_many) // 2)
        tried = written(count)
        if len(tried[1]) <= max_tokens:
            fits, best = count, tried
        else:
            too_many = count
    if not fits:
        raise BadRow("prompt too long")
    return best


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
        raise UserError(none_left("no prompt", drops, max_tokens, "--max-prompt-length"))
    return prompts


def tokenize_pairs(pairs: list[Pair], form: PromptFormat, max_length: int, what: str) -> list[TokenPair]:
    """Tokenise pairs to at most `max_length` tokens, prompt and response together.

    A response gets at most half of `max_length` and is cut at its end; the prompt gets what the longer
    response leaves, and is cut from the left at a turn boundary. Pairs that cannot be written, or that
    cutting makes identical, are dropped; drops and cuts are reported.
    """
    form.check()
    drops: Counter[str] = Counter()
    tokenized: list[TokenPair] = []
    room = max_length // 2 - 1  # and one for EOS
    cut = 0
    for pair in pairs:
        wholes = [form.response_ids(text) for text in (pair.chosen, pair.rejected)]
        cut += sum(len(ids) > room for ids in wholes)
        try:
            tokenized.append(tokenize_pair(pair, wholes, form, max_length))
        except BadRow as reason:
            drops[str(reason)] += 1
    if drops:
        report_drops(what, len(tokenized), drops)
    if not tokenized:
        raise UserError(none_left(f"no pair of {what}", drops, max_length, "--max-length"))
    if cut:
        console.print(
            f"{what}: {cut} of {2 * len(pairs)} responses cut to {room} tokens, half of --max-length"
        )
    return tokenized


def tokenize_pair(pair: Pair, wholes: list[list[int]], form: PromptFormat, max_length: int) -> TokenPair:
    """A pair as tokens; `wholes` are those of its responses, before they are cut and closed."""
    texts = (pair.chosen, pair.rejected)
    room = max_length // 2 - 1
    if form.spells_special([("assistant", text) for text in texts]):
        raise BadRow(f"answer that spells a special token, such as {form.end_text}")
    answers = [ids[:room] if len(ids) > room else [*ids, form.eos_token_id] for ids in wholes]
    prompt, prompt_ids = fit_prompt(pair.turns, form, max_length - 1 - max(map(len, answers)))
    if answers[0] == answers[1]:
        raise BadRow("identical after cutting")
    if any(form.joins(prompt, prompt_ids, *answer) for answer in zip(texts, wholes, strict=True)):
        raise BadRow("a token would span the end of the prompt and the start of the answer")
    return TokenPair(pair, prompt_ids, *answers)


def none_left(what: str, drops: Counter[str], max_tokens: int, flag: str) -> str:
    """The error where every prompt or pair was dropped."""
    if set(drops) <= {"prompt too long", "identical after cutting"}:
        return f"{what} fits into {max_tokens} tokens: raise {flag}"
    return f"{what} can be used: dropped {reasons_of(drops)}"
