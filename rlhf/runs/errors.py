"""Errors that the user can fix, and what an exception really was."""

import errno


class UserError(Exception):
    """Something the user can fix. The text says what is wrong, where, and what to do."""


class Stopped(Exception):
    """SIGINT or SIGTERM asked the run to end. The argument is the signal's number."""


def is_disk_full(error: BaseException) -> bool:
    """Whether `error` or its cause is ENOSPC, which some libraries only mention in the text."""
    return any(
        getattr(cause, "errno", None) == errno.ENOSPC or "No space left on device" in str(cause)
        for cause in causes_of(error)
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether something did not fit the device's memory. Often only torch's text says so."""
    text = str(error)
    return (
        type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in text  # on a CPU
        or "CUDA error: out of memory" in text  # of a graph itself
    )


def one_line(error: BaseException) -> str:
    """The first line of an exception's text, or its name if it has no text."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def causes_of(error: BaseException) -> list[BaseException]:
    """An exception, its cause, the cause of that, and so on."""
    causes: list[BaseException] = []
    while error is not None and error not in causes:
        causes.append(error)
        error = error.__cause__ or error.__context__
    return causes
