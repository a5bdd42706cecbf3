"""Experts made, taken out of full models, and given back."""
