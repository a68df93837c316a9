"""How a script reads its flags, and how it fails: one clear line, exit code 2, no traceback."""

import argparse
import dataclasses
import inspect
import logging
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Annotated, TypeVar

import tyro

from rlhf.runs.advice import less_memory
from rlhf.runs.errors import Stopped, UserError, is_disk_full, is_out_of_memory, one_line

Config = TypeVar("Config")


def parse(
    config_class: type[Config],
    presets: dict[str, Config],
    doc: str,
    args: list[str] | None = None,
    first: Sequence[str] = (),
) -> Config:
    """Read a script's flags over its defaults, or over those of `--preset NAME`.

    Unknown and abbreviated flags exit with code 2. Help texts are the comments beside the fields. A
    `~` becomes the home folder even where the shell leaves it alone, as in `--output-dir=~/sft`.

    Args:
        args: the flags; None: those of the command line.
        first: the fields that `--help` shows first, in a group of their own.
    """
    preset_parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    description = doc.strip().splitlines()[0]
    if presets:
        preset_parser.add_argument("--preset", choices=sorted(presets), default=None)
        description += f" (--preset {{{','.join(presets)}}}: the small values of this file)"
    given, rest = preset_parser.parse_known_args(args)
    default = presets[given.preset] if presets and given.preset else config_class()
    texts = help_texts(config_class)
    flags = grouped(default, texts, first) if first else explained("Flags", default, texts)
    parsed = vars(tyro.cli(flags, args=rest, description=description))
    values = vars(parsed["common"]) | vars(parsed["other"]) if first else parsed
    for name, value in values.items():
        if isinstance(value, str) and value.startswith("~"):
            values[name] = os.path.expanduser(value)
    if presets:
        values["preset"] = given.preset
    return config_class(**values)


def help_texts(config_class: type) -> dict[str, str]:
    """The comment of each field of a dataclass: behind it, or on the lines right above it."""
    texts = {}
    above: list[str] = []
    for line in inspect.getsource(config_class).splitlines():
        field = re.match(r"    (\w+): .*?(?:  # (.*))?$", line)
        if field:
            name, behind = field.groups()
            texts[name] = behind or " ".join(above)
        comment = re.match(r"    # (.*)", line)
        above = [*above, comment.group(1)] if comment else []
    return texts


def explained(
    name: str,
    default: Config,
    texts: dict[str, str],
    fields: Sequence[str] | None = None,
    doc: str = "",
) -> type:
    """A class of some fields of `default` (None: all) that tyro shows with our help texts."""
    types = {field.name: field.type for field in dataclasses.fields(default)}
    knobs = []
    for field in types if fields is None else fields:
        kind = Annotated[types[field], tyro.conf.arg(help=texts.get(field))]
        knobs.append((field, kind, dataclasses.field(default=getattr(default, field))))
    return dataclasses.make_dataclass(name, knobs, namespace={"__doc__": doc}, frozen=True)


def grouped(default: Config, texts: dict[str, str], first: Sequence[str]) -> type:
    """A class of the fields of `default` in two groups: `common`, those in `first`, and `other`."""
    rest = [field.name for field in dataclasses.fields(default) if field.name not in first]
    groups = []
    for name, doc, fields in (
        ("common", "What people change first.", first),
        ("other", "All the rest.", rest),
    ):
        group = explained(name, default, texts, fields, doc)
        kind = tyro.conf.OmitArgPrefixes[group]
        groups.append((name, kind, dataclasses.field(default=group())))
    return dataclasses.make_dataclass("Flags", groups)


def run(
    main: Callable[[Config], None],
    config_class: type[Config],
    presets: dict[str, Config],
    doc: str,
    first: Sequence[str] = (),
) -> None:
    """Parse the flags and call `main`. An error that the user can fix is one line, exit code 2."""
    config = parse(config_class, presets, doc, first=first)
    quiet_libraries()
    try:
        main(config)
    except UserError as error:
        fail(str(error))
    except Stopped as stopped:
        number = stopped.args[0]
        print(
            f"\nStopped by {signal.Signals(number).name}. To continue, add --resume to the same "
            "command.",
            file=sys.stderr,
        )
        sys.exit(128 + number)
    except Exception as error:
        if is_disk_full(error):
            later = (
                "then --resume continues from the last state"
                if hasattr(config, "resume")
                else "nothing was replaced"
            )
            fail(f"the disk is full: free some space or choose another --output-dir; {later}")
        if is_out_of_memory(error):
            fail(f"the memory ran out ({one_line(error)}): {less_memory(vars(config))}")
        raise
    except KeyboardInterrupt:
        later = (
            "; --resume continues from the last state, if there is one"
            if hasattr(config, "resume")
            else ""
        )
        print(f"\nStopped; nothing was saved{later}.", file=sys.stderr)
        sys.exit(130)


def fail(message: str) -> None:
    who = "" if os.environ.get("RANK", "0") == "0" else f"process {os.environ['RANK']}: "
    print(f"{who}error: {message}", file=sys.stderr)
    sys.exit(2)


def quiet_libraries() -> None:
    """Leave the terminal to our own lines: no progress bars and no advice from libraries."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import transformers

    from rlhf.runs.hub import quiet_hub

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    quiet_hub()
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # which reports every font it finds
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings(
        "ignore", category=UserWarning, module=r"(torch|peft|trl|accelerate)\..*"
    )
