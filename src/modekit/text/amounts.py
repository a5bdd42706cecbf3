"""How much held-out text is read per domain when nobody says how much."""

TABLE_TOKENS = 20_000
"""Of a table that shows what a mixture is worth (`eval`)."""
SAMPLE_TOKENS = 8_192
"""Of a loss that is measured beside other work: to choose by, to look at an expert, before and after a training."""
FORCED_TOKENS = 1_024
"""Of a comparison of every expert with its own model, on the text of every domain (`verify --deep`)."""
