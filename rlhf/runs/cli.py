"""How a script reads its hyperparameters and how it fails: one clear line, exit code 2, no traceback."""

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
from typing import Annotated, Any, TypeVar

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
    """Read the flags of a script (`args`, or the command line's) over its defaults, or over those of `--preset NAME`.

    Unknown and abbreviated flags exit with code 2. Help texts are the comments beside the fields. A `~` is the home folder,
    also where the shell has left it alone, as in `--output-dir=~/sft`.

    Args:
        first: the fields that `--help` shows before the others, in a group of their own.
    """
    preset = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    description = doc.strip().splitlines()[0]
    if presets:
        preset.add_argument("--preset", choices=sorted(presets), default=None)
        description += f" (--preset {{{','.join(presets)}}}: the small values of this file)"
    chosen, rest = preset.parse_known_args(args)
    default = presets[chosen.preset] if presets and chosen.preset else config_class()
    if first:
        groups = vars(tyro.cli(in_two_groups(default, first), args=rest, description=description))
        config = config_class(**vars(groups["common"]), **vars(groups["other"]))
    else:
        config = tyro.cli(config_class, default=default, args=rest, description=description)
    home = {
        name: os.path.expanduser(x)
        for name, x in vars(config).items()
        if isinstance(x, str) and x[:1] == "~"
    }
    return dataclasses.replace(config, **home, **({"preset": chosen.preset} if presets else {}))


def in_two_groups(default: Any, first: Sequence[str]) -> type:
    """A class of two groups of fields, `common` and `other`, for which tyro has the same flags as for `default`."""
    comments = dict(re.findall(r"^    (\w+): .*?# (.*)$", inspect.getsource(type(default)), re.M))
    types = {field.name: field.type for field in dataclasses.fields(default)}

    def group(name: str, description: str, fields: Sequence[str]) -> tuple[str, Any, Any]:
        knobs = []
        for field in fields:
            kind = Annotated[types[field], tyro.conf.arg(help=comments.get(field))]
            knobs.append((field, kind, dataclasses.field(default=getattr(default, field))))
        made = dataclasses.make_dataclass(
            name, knobs, namespace={"__doc__": description}, frozen=True
        )
        return name, tyro.conf.OmitArgPrefixes[made], dataclasses.field(default=made())

    rest = [name for name in types if name not in first]
    common = group("common", "What people change first.", first)
    return dataclasses.make_dataclass("Flags", [common, group("other", "All the rest.", rest)])


def run(
    main: Callable[[Config], None],
    config_class: type[Config],
    presets: dict[str, Config],
    doc: str,
    first: Sequence[str] = (),
) -> None:
    """Parse the flags and call `main`; turn what the user can mend into one line and exit code 2."""
    config = parse(config_class, presets, doc, first=first)
    quiet_libraries()
    try:
        main(config)
    except UserError as error:
        fail(str(error))
    except Stopped as stopped:
        number = stopped.args[0]
        print(
            f"\nStopped by {signal.Signals(number).name}. To go on: add --resume to the same command.",
            file=sys.stderr,
        )
        sys.exit(128 + number)
    except Exception as error:
        if is_disk_full(error):
            later = (
                "then --resume goes on from the last state"
                if hasattr(config, "resume")
                else "nothing was replaced"
            )
            fail(f"the disk is full: free some space or choose another --output-dir; {later}")
        if is_out_of_memory(error):
            fail(f"the memory ran out ({one_line(error)}): {less_memory(config)}")
        raise
    except KeyboardInterrupt:
        later = (
            "; --resume goes on from the last state, if there was one"
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
    """Leave the terminal to our own lines: no library progress bars and no advice meant for library authors."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import datasets
    import transformers

    from rlhf.runs.hub import quiet_hub

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity_error()
    quiet_hub()
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it tells of the fonts that it finds
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings(
        "ignore", category=UserWarning, module=r"(torch|peft|trl|accelerate)\..*"
    )
