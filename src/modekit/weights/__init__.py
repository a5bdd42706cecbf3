"""Numbers of tensors: casts, adapters folded in, low-rank parts, merges."""
