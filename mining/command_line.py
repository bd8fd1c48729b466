"""How every program of Hardpair reads its flags and reports a user's mistake: one line on stderr, exit code 2.

Flags come from dataclasses (tyro); `parse` adds what a newcomer needs when a flag is misspelt: its name and the nearest
one.
"""

import contextlib
import difflib
import io
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import tyro

USER_ERROR_EXIT_CODE = 2
# The launcher looks at its processes once a second; on a machine that is short of cores rank 0 comes seconds later.
LAUNCHER_GRACE_S = 10.0
# Notes on an error of one of several ranks that talk to each other (train.supervision.supervisor): then exactly one of
# them says it, and at once.
FIRST_TO_FAIL = "the first rank that failed"
NOT_FIRST = "another rank failed first"

Config = TypeVar("Config")


def parse(
    config_type: type[Config] | Callable[..., Config],
    *,
    program: str,
    description: str,
    arguments: Sequence[str],
    default: Any = tyro.MISSING_NONPROP,
) -> Config:
    """Parse `arguments` into `config_type`.

    Raises ValueError naming an unknown flag and the closest known one, a missing flag, or a value of the wrong type.
    `--help` prints and exits 0.
    """
    # Before tyro looks: for a misspelt required flag it would only say that the right one is missing.
    known = known_flags(config_type, default)
    misspelt = [argument for argument in arguments if is_flag(argument) and not is_known(argument, known)]
    if misspelt:
        raise ValueError(unknown_flag_message(misspelt[0], known, program))
    keywords = {} if default is tyro.MISSING_NONPROP else {"default": default}
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            config, unknown = tyro.cli(
                config_type,
                prog=program,
                description=description,
                args=list(arguments),
                return_unknown_args=True,
                **keywords,
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ValueError(in_one_line(complaint.getvalue())) from None
    if unknown:
        raise ValueError(unknown_flag_message(unknown[0], known, program))
    return config


def in_one_line(box: str) -> str:
    """The words of tyro's framed message without the frame and without the help that it repeats."""
    inside = [line for line in box.splitlines() if not line.startswith("\u256d")]
    words = " ".join(re.sub("[\u2500-\u257f]", " ", " ".join(inside)).split())
    return words.split(" Argument helptext:")[0].split(" For full helptext")[0]


def known_flags(config_type: Any, default: Any) -> list[str]:
    """Every `--flag` that the parser of `config_type` takes."""
    keywords = {} if default is tyro.MISSING_NONPROP else {"default": default}
    parser = tyro.extras.get_parser(config_type, **keywords)
    return [option for action in parser._actions for option in action.option_strings]


def is_flag(argument: str) -> bool:
    return argument.startswith("--") and len(argument) > 2


def is_known(flag: str, known: Sequence[str]) -> bool:
    """tyro takes `-` and `_` in names for the same."""
    name = flag.split("=")[0].replace("_", "-")
    return name in {option.replace("_", "-") for option in known}


def unknown_flag_message(flag: str, known: Sequence[str], program: str) -> str:
    name = flag.split("=")[0]
    return f"{program} does not know {name}; {nearest(name, known)} `{program} --help` lists them"


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for a misspelt name: the closest known one, or all of them when none is close."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    if close:
        return f"did you mean {close[0]}?"
    return f"known: {', '.join(known)};" if len(known) < 12 else "nothing known is close to it;"


def without_launcher_flags(arguments: Sequence[str]) -> list[str]:
    """Drop `--local_rank=N`, which the deepspeed launcher adds; the environment says the same."""
    return [argument for argument in arguments if not argument.startswith(("--local_rank=", "--local-rank="))]


def run(main: Callable[[Sequence[str]], None], arguments: Sequence[str] | None = None) -> None:
    """Call `main(arguments)`; a ValueError or a missing file becomes one line and exit code 2."""
    try:
        main(without_launcher_flags(sys.argv[1:] if arguments is None else arguments))
    except (ValueError, FileNotFoundError) as error:
        rank = int(os.environ.get("RANK", 0))
        notes = getattr(error, "__notes__", [])
        if NOT_FIRST in notes:
            sys.exit(USER_ERROR_EXIT_CODE)
        if rank and FIRST_TO_FAIL not in notes:
            # A mistake is mostly everybody's: the launcher ends this process while it waits, rank 0's line stands alone.
            time.sleep(LAUNCHER_GRACE_S)
        whose = f"error (rank {rank}): " if rank else "error: "
        print(whose + " ".join(str(error).split()), file=sys.stderr, flush=True)
        sys.exit(USER_ERROR_EXIT_CODE)
