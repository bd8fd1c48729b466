"""One line of the doctor's report."""

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warning", "broken"]


@dataclass(frozen=True)
class Finding:
    """What a check found; `remedy` says what to do about it and is empty where all is well."""

    check: str
    level: Level
    message: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.level:<8}{self.check}: {self.message}" + (f"; {self.remedy}" if self.remedy else "")


def ok(check: str, message: str) -> Finding:
    return Finding(check, "ok", message)


def warning(check: str, message: str, remedy: str) -> Finding:
    return Finding(check, "warning", message, remedy)


def broken(check: str, message: str, remedy: str) -> Finding:
    return Finding(check, "broken", message, remedy)
