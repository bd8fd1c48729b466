"""Flags and mistakes: help from the dataclass, one line for a misspelt flag, exit code 2."""

from dataclasses import dataclass

import pytest

from mining.command_line import parse, run


@dataclass(frozen=True)
class Config:
    """What it does."""

    shards: str
    """Where the shards are."""
    num_workers: int = 4
    """How many processes."""


def parse_config(*arguments: str) -> Config:
    return parse(Config, program="tool", description="A tool.", arguments=arguments)


def test_flags_fill_the_dataclass():
    assert parse_config("--shards", "a", "--num-workers", "2") == Config("a", 2)
    assert parse_config("--shards=a", "--num_workers=3") == Config("a", 3)


def test_misspelt_flag_is_named_with_the_nearest_one():
    with pytest.raises(ValueError, match="tool does not know --num-worker; did you mean --num-workers"):
        parse_config("--shards", "a", "--num-worker", "2")


def test_misspelt_required_flag_is_named_not_reported_as_missing():
    with pytest.raises(ValueError, match="tool does not know --shard; did you mean --shards"):
        parse_config("--shard=a")


def test_argument_that_belongs_to_no_flag_is_named():
    with pytest.raises(ValueError, match="tool does not know stray"):
        parse_config("--shards", "a", "stray")


def test_help_shows_the_fields_and_exits_zero(capsys):
    with pytest.raises(SystemExit) as exit_info:
        parse_config("--help")
    assert exit_info.value.code == 0
    shown = capsys.readouterr().out
    assert "A tool." in shown
    assert "How many processes." in shown


def test_value_of_the_wrong_type_is_one_line_that_names_the_flag():
    with pytest.raises(ValueError, match=r"^Error parsing --num-workers: .*'many'$"):
        parse_config("--shards", "a", "--num-workers", "many")


def test_missing_flag_is_one_line_that_names_it():
    with pytest.raises(ValueError, match=r"^Missing from tool: --shards"):
        parse_config()


@pytest.mark.parametrize("error", [ValueError("a\n  b"), FileNotFoundError("a b")])
def test_mistake_is_one_line_on_stderr_and_exit_code_two(capsys, error):
    def fail(arguments):
        raise error

    with pytest.raises(SystemExit) as exit_info:
        run(fail, [])
    assert exit_info.value.code == 2
    assert capsys.readouterr().err == "error: a b\n"


def test_fault_of_the_program_keeps_its_traceback():
    def fail(arguments):
        raise RuntimeError("ours")

    with pytest.raises(RuntimeError):
        run(fail, [])


def test_flag_that_the_launcher_adds_is_dropped():
    seen = []
    run(seen.extend, ["--local_rank=1", "--shards=a"])
    assert seen == ["--shards=a"]
