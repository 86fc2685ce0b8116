"""From texts to ranks to acceptance statistics: one definition for all tools.

docs/acceptance.md states it in words.
"""
