"""Errors of the user: what is wrong, and what to do."""

from __future__ import annotations

import reprlib


class UserError(ValueError):
    """A setting, a file or a command that cannot be used.

    The message is one line that names the setting or file, what is wrong with it, and the remedy.
    The command line and the plugin print it without a traceback.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


def shown(value: object, longest: int = 120) -> str:
    """Return a value as a message shows it: its ``repr``, cut where it is long or nested deeply.

    Args:
        value: what the user gave.
        longest: largest number of characters of the result.

    """
    shortener = reprlib.Repr()
    shortener.maxlevel = 5
    shortener.maxlist = shortener.maxtuple = shortener.maxdict = 16
    shortener.maxset = shortener.maxfrozenset = 16
    shortener.maxstring = shortener.maxother = shortener.maxlong = longest
    text = shortener.repr(value)
    half = (longest - 3) // 2
    return text if len(text) <= longest else f"{text[:half]}...{text[-half:]}"
