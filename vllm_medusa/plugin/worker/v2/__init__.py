"""Draft trees on vLLM's Model Runner V2: asynchronous, without forks, all on the device.

Read `runner` first, whose methods are in the order of a step.
"""
