"""How every program of Hardpair reads its flags and reports a user's mistake: one line on stderr, exit code 2, no traceback.

Flags come from dataclasses (tyro); `parse` adds what a newcomer needs when a flag is misspelt: its name and the nearest one.
"""

import difflib
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import tyro

USER_ERROR_EXIT_CODE = 2

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

    Raises ValueError naming an unknown flag and the closest known one. `--help` prints and exits 0; a value of the wrong
    type is reported by tyro with exit code 2.
    """
    keywords = {} if default is tyro.MISSING_NONPROP else {"default": default}
    config, unknown = tyro.cli(
        config_type,
        prog=program,
        description=description,
        args=list(arguments),
        return_unknown_args=True,
        **keywords,
    )
    if unknown:
        raise ValueError(unknown_flag_message(unknown[0], known_flags(config_type, default), program))
    return config


def known_flags(config_type: Any, default: Any) -> list[str]:
    """Every `--flag` that the parser of `config_type` takes."""
    keywords = {} if default is tyro.MISSING_NONPROP else {"default": default}
    parser = tyro.extras.get_parser(config_type, **keywords)
    return [option for action in parser._actions for option in action.option_strings]


def unknown_flag_message(flag: str, known: Sequence[str], program: str) -> str:
    name = flag.split("=")[0]
    nearest = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {nearest[0]}?" if nearest else "it is not one of its flags;"
    return f"{program} does not know {name}; {hint} `{program} --help` lists them"


def run(main: Callable[[Sequence[str]], None], arguments: Sequence[str] | None = None) -> None:
    """Call `main(arguments)`; a ValueError or a missing file becomes one line and exit code 2."""
    try:
        main(sys.argv[1:] if arguments is None else arguments)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(USER_ERROR_EXIT_CODE)
