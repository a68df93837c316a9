"""What can go wrong between us and the hub, said in one line each."""

import contextlib
import os
from collections.abc import Iterator

from rlhf.cli import UserError


@contextlib.contextmanager
def hub_errors(name: str, kind: str, flag: str) -> Iterator[None]:
    """Turn the hub client's errors about `name` (a "model" or "data set") into a UserError that says what to do."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise explain(error, name, kind, flag) from error


def explain(error: Exception, name: str, kind: str, flag: str) -> Exception:
    names, text, cause = set(), "", error
    while cause is not None:
        names |= {base.__name__ for base in type(cause).__mro__}
        text += f" {cause}"
        cause = cause.__cause__ or cause.__context__
    page = (
        f"{os.environ.get('HF_ENDPOINT', 'https://huggingface.co')}/{'datasets/' if kind == 'data set' else ''}{name}"
    )
    if "GatedRepoError" in names or "gated repo" in text:
        return UserError(
            f"{kind} {name} is gated: accept its licence at {page}, then run `hf auth login` or set HF_TOKEN to a token of that account"
        )
    if names & {
        "LocalEntryNotFoundError",
        "OfflineModeIsEnabled",
        "ConnectionError",
        "ConnectError",
        "TimeoutException",
    }:
        return UserError(
            f"{kind} {name} is not on this machine and the hub cannot be reached: check the network (or HF_HUB_OFFLINE), "
            f"or give a local folder with {flag}"
        )
    if names & {"RepositoryNotFoundError", "DatasetNotFoundError", "RevisionNotFoundError"}:
        return UserError(
            f"there is no {kind} {name} on the hub or on this machine: check the spelling of {flag}; a private one needs HF_TOKEN"
        )
    return error
