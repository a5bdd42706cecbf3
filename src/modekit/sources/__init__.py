"""Models, adapters and tokenizers on disk or on the hub, read by config and header; the families that can be mixed."""
