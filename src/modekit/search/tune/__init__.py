"""Which variant? A search over mixtures of the same experts, on held-out text, that builds nothing twice."""
