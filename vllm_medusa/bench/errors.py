"""The one exception that the bench package raises for a user's mistake."""


class BenchError(ValueError):
    """A comparison that cannot be made, or one that `--strict` fails.

    The message is a single line that names the setting, its value and the remedy, so that callers
    can print it without a traceback.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))
