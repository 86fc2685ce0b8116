"""The one exception that the calibration package raises for a user's mistake."""


class CalibrationError(ValueError):
    """Settings, prompts or measurements that no tree can be calibrated from.

    The message is a single line that names the setting, the value and the remedy, so that callers
    can print it without a traceback.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))
