"""What a user did wrong, and what to do about it."""


class UserError(ValueError):
    """A setting, a file or a command that cannot be used.

    The message is one line that names the setting or file, what is wrong with it, and the remedy.
    The command line and the plugin print it without a traceback.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))
