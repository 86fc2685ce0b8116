"""The plugin's counters."""

from vllm_medusa.plugin.counters import Counters


def test_counters_start_at_nothing_and_tell_their_names() -> None:
    counters = Counters()
    names = {"forked_requests", "fork_paths", "commits", "chain_fallbacks"}
    assert counters.to_dict() == dict.fromkeys(names, 0)
    counters.commits += 2
    assert counters.to_dict()["commits"] == 2
