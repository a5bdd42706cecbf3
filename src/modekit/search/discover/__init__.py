"""Domains without labels: which groups of documents there are, and which of them a mixture serves."""
