"""What can go wrong between us and the hub, said in one line each."""

import contextlib
import os
from collections.abc import Iterator

from rlhf.cli import UserError, causes_of, is_disk_full, one_line

from safetensors import SafetensorError

BROKEN = (OSError, ValueError, KeyError, TypeError, SafetensorError)  # what a damaged folder makes the libraries raise


@contextlib.contextmanager
def hub_errors(name: str, kind: str, flag: str) -> Iterator[None]:
    """Turn errors of loading `name` (a "model", "tokenizer" or "data set") into a UserError that says what to do."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        message = explain(error, name, kind, flag)
        broken = isinstance(error, BROKEN) or kind == "tokenizer"  # that library raises plain Exceptions
        if message is None and broken and not is_disk_full(error):
            message = f"the {kind} of {name} cannot be loaded ({one_line(error)})"
        if message is None:
            raise
        raise UserError(message) from error


def explain(error: Exception, name: str, kind: str, flag: str) -> str | None:
    """What to tell the user, or None for an error that has nothing to do with the hub."""
    causes = causes_of(error)
    names = {base.__name__ for cause in causes for base in type(cause).__mro__}
    text = " ".join(map(str, causes))
    page = (
        f"{os.environ.get('HF_ENDPOINT', 'https://huggingface.co')}/{'datasets/' if kind == 'data set' else ''}{name}"
    )
    if "GatedRepoError" in names or "is a gated dataset" in text:
        return f"{kind} {name} is gated: accept its licence at {page}, then run `hf auth login` or set HF_TOKEN to a token of that account"
    if names & {
        "LocalEntryNotFoundError",
        "OfflineModeIsEnabled",
        "ConnectionError",
        "ConnectError",
        "TimeoutException",
    }:
        return (
            f"{kind} {name} is not on this machine and the hub cannot be reached: check the network (or HF_HUB_OFFLINE), "
            f"or give a local folder with {flag}"
        )
    if names & {"RepositoryNotFoundError", "DatasetNotFoundError", "RevisionNotFoundError"}:
        return f"there is no {kind} {name}, or not the revision asked for, on the hub or on this machine: check the spelling of {flag}; a private one needs HF_TOKEN"
    return None
