"""One step on Model Runner V1: path forks, sampler, constraints."""
