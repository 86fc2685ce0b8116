"""The plugin's counters."""

from vllm_medusa.plugin.counters import Counters


def test_counters_start_at_nothing_and_tell_their_names() -> None:
    counters = Counters()
    names = {"forked_requests", "fork_paths", "forks_accepted", "chain_fallbacks"}
    assert counters.to_dict() == dict.fromkeys(names, 0)
    counters.forks_accepted += 2
    assert counters.to_dict()["forks_accepted"] == 2
