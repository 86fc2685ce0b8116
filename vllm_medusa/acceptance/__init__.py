"""From texts to ranks to acceptance statistics: one definition for all tools."""
