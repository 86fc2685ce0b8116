"""Draft trees on vLLM's Model Runner V2: no forks, asynchronous, nothing of a step on the host.

Read `runner` first, whose methods are in the order of a step.
"""
