"""The config.json beside the heads: values that tensors do not give, and contradictions."""

import math
from pathlib import Path
from typing import Any

from vllm_medusa.errors import UserError
from vllm_medusa.heads.io.files import read_json

NATIVE_FORMAT = "vllm_medusa.heads/1"
#: Format of root-aware heads and of heads with a selector; readers of format 1 refuse it.
NATIVE_FORMAT_2 = "vllm_medusa.heads/2"
#: Format of heads that run in turn; readers of format 2 refuse it.
NATIVE_FORMAT_3 = "vllm_medusa.heads/3"
#: Format of heads with prefix attention; readers of format 3 refuse it.
NATIVE_FORMAT_4 = "vllm_medusa.heads/4"
#: Format of recurrent heads; readers of format 4 refuse it.
NATIVE_FORMAT_5 = "vllm_medusa.heads/5"
_NATIVE_FORMATS = (
    *(NATIVE_FORMAT, NATIVE_FORMAT_2, NATIVE_FORMAT_3, NATIVE_FORMAT_4, NATIVE_FORMAT_5),
)


class ConfigFile:
    """Checked access to config.json; an absent file is an empty one.

    ModelOpt keeps its counts in a nested "medusa" object, which is read like the top level.

    Raises:
        UserError: not a JSON object, or of a later version of our own format.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        values = read_json(path) if path.is_file() else {}
        nested = values.get("medusa")
        self._values: dict[str, Any] = values | (nested if isinstance(nested, dict) else {})
        written_as = self._values.get("format", NATIVE_FORMAT)
        if written_as not in _NATIVE_FORMATS:
            raise UserError(
                f"{path}: format is {written_as!r}, this version reads {NATIVE_FORMAT!r} to "
                f"{NATIVE_FORMAT_5!r}; update vllm-medusa"
            )

    def flag(self, name: str) -> bool:
        """A boolean, false if absent."""
        value = self._values.get(name) or False
        if not isinstance(value, bool):
            raise UserError(f"{self.path}: {name} is {value!r}; set it to true or false")
        return value

    def integer(self, *names: str) -> int | None:
        """A positive integer, the first of several spellings that is set, or None."""
        for name in names:
            value = self._values.get(name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UserError(f"{self.path}: {name} is {value!r}; set it to a positive integer")
            return value
        return None

    def logit_scale(self) -> float:
        """The factor on the heads' logits, 1 if absent."""
        value = self._values.get("logit_scale", 1.0)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not 0 < value < math.inf:
            raise UserError(f"{self.path}: logit_scale is {value!r}; set it to a positive number")
        return float(value)

    def base_model(self) -> str | None:
        """The target model that the heads were made for, as the config spells it."""
        speculators = self._values.get("speculators_config")
        verifier = speculators.get("verifier") if isinstance(speculators, dict) else None
        name = verifier.get("name_or_path") if isinstance(verifier, dict) else None
        name = name or self._values.get("base_model_name_or_path")
        return name if isinstance(name, str) else None

    def check_hidden_states(self) -> None:
        """Raise if the heads read other hidden states than the target's last ones (Hydra)."""
        offset = self._values.get("hidden_state_offset") or 0
        if offset != 0:
            raise UserError(
                f"{self.path}: hidden_state_offset is {offset!r}: the heads read an earlier layer "
                "of the target, which is not supported; use heads that were trained with 0"
            )

    def vocab_size(self) -> int | None:
        """The target's vocabulary, or None."""
        return self.integer("vocab_size", "medusa_vocab_size")

    def check_size(self, actual: int, *names: str) -> None:
        """Raise unless the size, by any of its spellings, is the tensors' or not given."""
        value = self.integer(*names)
        if value is not None and value != actual:
            raise UserError(
                f"{self.path}: {names[0]} is {value}, but the heads' tensors have {actual}; "
                "correct config.json, or use the heads that belong to it"
            )

    def check_count(self, what: str, actual: int, *names: str) -> tuple[str, ...]:
        """Compare a count with what the tensors hold.

        A larger count means that tensors are missing. A smaller one is a known fault of published
        configs (2 in the config, 5 in the tensors).

        Returns:
            A note if the config says fewer.
        """
        value = self.integer(*names)
        if value is None or value == actual:
            return ()
        if value > actual:
            raise UserError(
                f"{self.path}: says {value} {what}, but the checkpoint holds {actual}; export the "
                "heads again or correct config.json"
            )
        return (f"config.json says {value} {what} but the tensors hold {actual}, which are used",)
