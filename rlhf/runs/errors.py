"""What the user can mend, and what an exception really was."""

import errno


class UserError(Exception):
    """Something the user can mend. The text says what is wrong, where, and what to do."""


class Stopped(Exception):
    """SIGINT or SIGTERM asked the run to end; its number is the argument."""


def is_disk_full(error: BaseException) -> bool:
    """True when `error`, or what caused it, is ENOSPC; safetensors and pyarrow report it only in their text."""
    return any(
        getattr(cause, "errno", None) == errno.ENOSPC or "No space left on device" in str(cause)
        for cause in causes_of(error)
    )


def is_out_of_memory(error: BaseException) -> bool:
    """True when a device had no memory left for a tensor; for the CPU's, torch says so only in the text."""
    return type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)


def one_line(error: BaseException) -> str:
    """The first line of an exception's text, or its name if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def causes_of(error: BaseException) -> list[BaseException]:
    """An exception, what caused it, what caused that, and so on."""
    causes: list[BaseException] = []
    while error is not None and error not in causes:
        causes.append(error)
        error = error.__cause__ or error.__context__
    return causes
