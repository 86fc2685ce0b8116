"""The one exception that the data package raises for a user's mistake."""


class DataError(ValueError):
    """Prompts, rows or settings that cannot be used.

    The message is a single line that names the file, line or setting, its value and the remedy, so
    that callers can print it without a traceback.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))
