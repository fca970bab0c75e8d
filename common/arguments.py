"""Command lines of words and `--options`: what is wrong with one is one line, as with every other command."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NoReturn

from common.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """Argparse's, whose complaint is a `ConfigError` and not a page of usage."""

    def error(self, message: str) -> NoReturn:
        """Argparse calls it.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(f"{message} ({self.prog} --help lists what there is)")


def whole(least: int, most: int = 10**9) -> Callable[[str], int]:
    """A type of an argument: a whole number from `least` to `most`."""

    def number(text: str) -> int:
        if not text.lstrip("-").isdecimal() or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text!r}: give a whole number from {least} to {most}")
        return int(text)

    return number
