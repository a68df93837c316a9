"""The Hugging Face hub: what we fetch from it, and what can go wrong, in one line each."""

import contextlib
import functools
import logging
import os
import sys
from collections.abc import Iterator

import huggingface_hub.utils
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from rlhf.runs.errors import UserError, causes_of, is_disk_full, one_line
from rlhf.runs.processes import is_main
from rlhf.runs.terminal import console

# What the libraries raise for a damaged folder.
BROKEN = (OSError, ValueError, KeyError, TypeError, SafetensorError, StrictDataclassError)


def quiet_hub() -> None:
    """Let the hub's library report errors only, and report its retries in one line of ours."""
    huggingface_hub.utils.logging.set_verbosity_error()
    retries = logging.getLogger("huggingface_hub.utils._http")
    retries.setLevel(logging.WARNING)
    retries.addFilter(tell_of_retries)


def tell_of_retries(record: logging.LogRecord) -> bool:
    """A filter of the library's log that lets only errors through."""
    if record.levelno >= logging.ERROR:
        return True
    say_once("The hub does not answer; trying again for a while.")
    return False


@functools.cache
def say_once(line: str) -> None:
    console.print(line)


@contextlib.contextmanager
def fetching(what: str) -> Iterator[None]:
    """Say what is being fetched; on a terminal, the library's progress bars show how far it is."""
    console.print(f"Fetching {what} from the hub ...")
    bars = is_main() and sys.stderr.isatty() and "HF_HUB_DISABLE_PROGRESS_BARS" not in os.environ
    if bars:
        huggingface_hub.utils.enable_progress_bars()
    try:
        yield
    finally:
        if bars:
            huggingface_hub.utils.disable_progress_bars()


@contextlib.contextmanager
def hub_errors(name: str, kind: str, flag: str) -> Iterator[None]:
    """Turn an error in loading `name` (a "model", "tokenizer" or "data set") into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        message = explain(error, name, kind, flag)
        # The tokenizers library raises plain Exceptions.
        broken = isinstance(error, BROKEN) or kind == "tokenizer"
        if message is None and broken and not is_disk_full(error):
            message = f"the {kind} of {name} cannot be loaded ({one_line(error)})"
        if message is None:
            raise
        raise UserError(message) from error


def explain(error: Exception, name: str, kind: str, flag: str) -> str | None:
    """What to tell the user; None if the error has nothing to do with the hub."""
    causes = causes_of(error)
    names = {base.__name__ for cause in causes for base in type(cause).__mro__}
    text = " ".join(map(str, causes))
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    page = f"{endpoint}/{'datasets/' if kind == 'data set' else ''}{name}"
    if "GatedRepoError" in names or "is a gated dataset" in text:
        return (
            f"{kind} {name} is gated: accept its licence at {page}, then run `hf auth login` or "
            "set HF_TOKEN to a token of that account"
        )
    if names & {
        "LocalEntryNotFoundError",
        "OfflineModeIsEnabled",
        "ConnectionError",
        "TransportError",
    }:
        return (
            f"{kind} {name} is not on this machine and the hub cannot be reached: check the "
            f"network (or HF_HUB_OFFLINE), or give a local folder with {flag}"
        )
    if names & {"RepositoryNotFoundError", "DatasetNotFoundError", "RevisionNotFoundError"}:
        return (
            f"there is no {kind} {name}, or not the revision asked for, on the hub or on this "
            f"machine: check the spelling of {flag}; a private one needs HF_TOKEN"
        )
    return None
