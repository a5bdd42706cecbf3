"""Text of a domain: documents, splits, token sequences, and which of it may be read for what."""
