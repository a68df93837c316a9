"""Chat templates: the one for our own format, and what a base's template writes around texts."""

from collections.abc import Iterable
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf.data.rows import BadRow, Turns
from rlhf.runs.errors import UserError, one_line

# The date that Llama 3's template falls back to. With the real date, a run would change overnight.
NO_CLOCK = "{%- macro strftime_now(format) -%}26 Jul 2024{%- endmacro -%}"

# Jinja trims a literal newline after `%}`, so the newlines are inside the expressions.
HH_CHAT_TEMPLATE = (
    "{%- if bos -%}{{ bos_token }}{%- endif -%}{%- for message in messages -%}{%- if "
    "message['role'] == 'system' -%}{{ message['content'] | trim }}{%- elif message['role'] == "
    "'user' -%}{{ '\\n\\nHuman: ' + message['content'] | trim }}{%- else -%}{{ '\\n\\nAssistant: "
    "' + message['content'] | trim }}{%- endif -%}{%- endfor -%}{%- if add_generation_prompt "
    "-%}{{ '\\n\\nAssistant:' }}{%- endif -%}"
)

# A dialogue to try tokenizers and templates with. None of its texts is part of another.
SYSTEM = ("system", "Be brief, and kind.")
QUESTION = ("user", "Why is the sky blue at noon?")
EARLIER = ("assistant", "Air scatters blue light most.")
FOLLOW_UP = ("user", "And red at dusk?")
ANSWER = "Because its path is longer then."


def as_messages(turns: Iterable[tuple[str, str]]) -> list[dict[str, Any]]:
    return [{"role": role, "content": text} for role, text in turns]


class ChatTemplate:
    """The chat template that a base brings, and how it writes an answer.

    Attributes:
        opening: what it writes before an answer's text.
        closing: what it writes between the text and `end_text`.
        end_text: the special token that ends an answer.
        refusal: why nothing can be trained with it, or "".

    Raises:
        UserError: there is no template, it fails, or it leaves out what the user says.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, special_texts: list[str]):
        self.tokenizer = tokenizer
        self.opening = self.closing = self.refusal = ""
        self.end_text: str = tokenizer.eos_token
        self.text = default_template(tokenizer)
        if "strftime_now" in self.text and NO_CLOCK not in self.text:
            self.text = NO_CLOCK + self.text
            tokenizer.chat_template = self.text  # so that serving uses what was trained
        try:
            prompt = self.render([QUESTION])
            silent = self.render([QUESTION], add_generation_prompt=False)
            whole = self.dialogue([QUESTION], ANSWER)
        except BadRow as reason:
            raise unusable(f"{reason}{self.wants_parts()}") from None
        lost = "the base's chat template leaves out"
        if QUESTION[1] not in prompt and self.reads_messages:
            raise unusable(f"{lost} what the user says{self.wants_parts()}")
        if QUESTION[1] not in prompt:
            self.refusal = f"{lost} what the user says"
        elif ANSWER not in whole:
            self.refusal = f"{lost} what the assistant says"
        elif QUESTION[1] not in whole:
            self.refusal = f"{lost} earlier turns"
        elif not whole.startswith(prompt):
            self.refusal = (
                f"the base's chat template starts an answer with {prompt.removeprefix(silent)!r} "
                "only when the answer is still to be written"
            )
        else:
            self.opening, _, rest = whole.removeprefix(prompt).partition(ANSWER)
            self.read_ending(rest, special_texts)
            special = any(text in self.opening for text in special_texts)
            if special or (self.opening.strip() and prompt == silent):
                self.refusal = (
                    f"the base's chat template puts {self.opening!r} before an answer but not at "
                    "the end of a prompt: the model would have to write it itself"
                )

    def read_ending(self, rest: str, special_texts: list[str]) -> None:
        """Find the token that ends an answer in the text that follows one."""
        ends = [(rest.index(text), -len(text), text) for text in special_texts if text in rest]
        start, _, text = min(ends, default=(len(rest), 0, ""))
        if not text or rest[:start].strip():
            ending = f"{rest!r}, which is no special token" if rest.strip() else "nothing"
            self.refusal = (
                f"the base's chat template ends an answer with {ending}: the model could not "
                "learn to stop"
            )
            return
        self.closing = rest[:start]
        self.end_text = text
        if self.tokenizer.convert_tokens_to_ids(text) == self.tokenizer.pad_token_id:
            self.refusal = f"{text}, which ends an answer, is also the token to pad with"

    @property
    def reads_messages(self) -> bool:
        return "messages" in self.text

    def wants_parts(self) -> str:
        """A remark if the template writes texts only where each is in a list of parts."""
        parts = [{"role": "user", "content": [{"type": "text", "text": QUESTION[1]}]}]
        try:
            found = QUESTION[1] in self.render_messages(parts)
        except BadRow:
            found = False
        return " (it wants content as a list of parts)" if found else ""

    def render(self, turns: Iterable[tuple[str, str]], add_generation_prompt: bool = True) -> str:
        return self.render_messages(as_messages(turns), add_generation_prompt)

    def render_messages(self, messages: list[dict[str, Any]], cue: bool = True) -> str:
        options = {"chat_template": self.text, "tokenize": False, "add_generation_prompt": cue}
        try:
            return self.tokenizer.apply_chat_template(messages, **options)
        except Exception as error:  # a program: it may refuse a system turn, or have a bug
            raise BadRow(f"the base's chat template refuses it ({one_line(error)})") from None

    def dialogue(self, turns: Iterable[tuple[str, str]], answer: str) -> str:
        """The text of a dialogue with its answer."""
        return self.render([*turns, ("assistant", answer)], add_generation_prompt=False)

    def prompt(self, turns: Turns) -> str:
        """The text of a prompt.

        Raises:
            BadRow: the template refuses the turns, or does not write the text of one of them.
        """
        text = self.render(turns)
        place = 0
        for role, said in turns if self.reads_messages else ():
            found = text.find(said, 0 if role == "system" else place)
            if found < 0 or (role == "system" and not self.keeps_system):
                raise BadRow(f"the base's chat template leaves out or changes the {role}'s text")
            if role != "system":  # which may stand anywhere
                place = found + len(said)
        return text

    @cached_property
    def keeps_system(self) -> bool:
        """Whether the template writes a system text. (A short one could be found by chance.)"""
        try:
            return SYSTEM[1] in self.render([SYSTEM, QUESTION])
        except BadRow:
            return True  # its own error says so

    @cached_property
    def keeps_earlier(self) -> bool:
        """Whether the template writes all turns of a longer dialogue."""
        try:
            text = self.render([QUESTION, EARLIER, FOLLOW_UP])
        except BadRow:
            return True
        return QUESTION[1] in text and EARLIER[1] in text


def default_template(tokenizer: PreTrainedTokenizerBase) -> str:
    templates = tokenizer.chat_template
    if not templates:
        raise unusable("this base brings no chat template")
    if isinstance(templates, str):
        return templates
    if "default" not in templates:
        raise unusable(f"this base brings the chat templates {', '.join(templates)} and no default")
    return templates["default"]


def unusable(reason: str) -> UserError:
    return UserError(f"--prompt-format model: {reason}; use --prompt-format hh")


def use_hh_template(tokenizer: PreTrainedTokenizerBase, bos: bool, prompts: Any) -> bool:
    """Give the tokenizer the template of our own format; False if that cannot write the prompts.

    Args:
        prompts: pairs of turns and their token ids.
    """
    template = HH_CHAT_TEMPLATE.replace("if bos", f"if {str(bos).lower()}")
    # Some tokenizers put a space before a text, but not after BOS.
    spaced = template.replace("{{ bos_token }}", "{{ bos_token + ' ' }}")
    for tried in (spaced, template):
        tokenizer.chat_template = tried
        if all(template_ids(tokenizer, turns) == ids for turns, ids in prompts):
            return True
    return False


def is_hh_template(template: Any) -> bool:
    """Whether a tokenizer's template is that of our own format."""
    return isinstance(template, str) and template.endswith(
        HH_CHAT_TEMPLATE[HH_CHAT_TEMPLATE.index("{%- for") :]
    )


def template_ids(tokenizer: PreTrainedTokenizerBase, turns: Iterable[tuple[str, str]]) -> list[int]:
    """A prompt's token ids as any other program gets them: by the tokenizer's chat template."""
    options = {"add_generation_prompt": True, "return_dict": False}
    return list(tokenizer.apply_chat_template(as_messages(turns), **options))
