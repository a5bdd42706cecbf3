"""Which mixture: advice before a build, and a search over variants."""
