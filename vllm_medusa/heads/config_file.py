"""The config.json beside the heads: what tensors do not say, and what contradicts them."""

import math
from pathlib import Path
from typing import Any

from vllm_medusa.heads.errors import HeadsError
from vllm_medusa.heads.files import read_json


class ConfigFile:
    """Checked access to config.json; an absent file is an empty one.

    ModelOpt keeps its counts in a nested "medusa" object, which is read as if it were at the top.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        values = read_json(path) if path.is_file() else {}
        nested = values.get("medusa")
        self._values: dict[str, Any] = values | (nested if isinstance(nested, dict) else {})

    def flag(self, name: str) -> bool:
        value = self._values.get(name) or False
        if not isinstance(value, bool):
            raise HeadsError(f"{self.path}: {name} is {value!r}; set it to true or false")
        return value

    def integer(self, *names: str) -> int | None:
        """The first of several spellings that is set."""
        for name in names:
            value = self._values.get(name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise HeadsError(f"{self.path}: {name} is {value!r}; set it to a positive integer")
            return value
        return None

    def logit_scale(self) -> float:
        value = self._values.get("logit_scale", 1.0)
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not 0 < value < math.inf
        ):
            raise HeadsError(f"{self.path}: logit_scale is {value!r}; set it to a positive number")
        return float(value)

    def check_size(self, name: str, actual: int) -> None:
        """Raise unless the size is the tensors' or not given."""
        value = self.integer(name)
        if value is not None and value != actual:
            raise HeadsError(
                f"{self.path}: {name} is {value}, but the heads' tensors have {actual}; correct "
                "config.json, or use the heads that belong to it"
            )

    def check_count(self, what: str, actual: int, *names: str) -> tuple[str, ...]:
        """Compare a count with what the tensors hold.

        More than they hold means that some are missing. Fewer is a known fault of published
        configs (two heads said, five held).

        Returns:
            A note if the config says fewer.
        """
        value = self.integer(*names)
        if value is None or value == actual:
            return ()
        if value > actual:
            raise HeadsError(
                f"{self.path}: says {value} {what}, but the checkpoint holds {actual}; export the "
                "heads again or correct config.json"
            )
        return (f"config.json says {value} {what} but the tensors hold {actual}, which are used",)
