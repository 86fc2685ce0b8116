"""The one exception that the training package raises for a user's mistake."""


class TrainingError(ValueError):
    """A training that cannot begin or go on.

    The message is a single line that names the setting or file, its value and the remedy, so that
    callers can print it without a traceback.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))
