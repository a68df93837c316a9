"""The tokenizer of a base or a checkpoint, and what it must have."""

import json
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rlhf.data.format import PromptFormat
from rlhf.engine.base import read_config
from rlhf.runs.errors import UserError
from rlhf.runs.hub import hub_errors
from rlhf.runs.terminal import plain

PAD_TOKENS = (
    "<|finetune_right_pad_id|>",
    "<|pad|>",
    "<pad>",
    "[PAD]",
    "<|reserved_special_token_0|>",
)


def load_tokenizer(folder: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """A tokenizer with an EOS and another token for padding, or a model never learns to stop.

    Raises:
        UserError: it cannot be loaded, has no EOS, or has no token to pad with.
    """
    with hub_errors(folder, "tokenizer", "--base-model"):
        tokenizer = AutoTokenizer.from_pretrained(folder, revision=revision)
    if tokenizer.eos_token is None:
        raise UserError(f"the tokenizer of {folder} has no EOS token")
    if tokenizer.pad_token in (None, tokenizer.eos_token):
        tokenizer.pad_token = unused_token(tokenizer)
        if tokenizer.pad_token is None:
            raise UserError(
                f"the tokenizer of {folder} has no token to pad with but EOS: set its pad_token to "
                "an unused one"
            )
    if hasattr(tokenizer, "legacy"):  # of Llama 2's kind; transformers forgets to save it
        tokenizer.init_kwargs["legacy"] = tokenizer.legacy
    tokenizer.padding_side = "right"
    return tokenizer


def unused_token(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A token that occurs in no text: a usual pad token, or a special one that no template uses."""
    vocabulary = tokenizer.get_vocab()
    for token in (*PAD_TOKENS, tokenizer.unk_token):
        if token in vocabulary and token != tokenizer.eos_token:
            return token
    templates = json.dumps(tokenizer.chat_template, ensure_ascii=False)
    special = [
        token.content
        for _, token in sorted(tokenizer.added_tokens_decoder.items())
        if token.special
    ]
    taken = (tokenizer.bos_token, tokenizer.eos_token)
    free = [token for token in special if token not in taken and token not in templates]
    return next((token for token in free if "pad" in token.lower()), free[0] if free else None)


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, base: dict[str, Any]) -> None:
    """Raise UserError if the tokenizer has an id for which the base's embedding has no row."""
    rows = read_config(base).vocab_size
    beyond = sorted((id, token) for token, id in tokenizer.get_vocab().items() if id >= rows)
    if beyond:
        id, token = beyond[0]
        raise UserError(
            f"the tokenizer of {base['model']} has {len(beyond)} tokens more than the model has "
            f"embeddings ({rows}; the first is {plain(token)!r}, id {id}): resize the model's "
            "embeddings, or use the tokenizer it was trained with"
        )


def load_format(folder: str, run: dict[str, Any]) -> PromptFormat:
    """The prompt format of the checkpoint at `folder`; `run` is its run.json."""
    return PromptFormat(run["prompt_format"], load_tokenizer(folder))
