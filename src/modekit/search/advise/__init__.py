"""Advice before building: what each expert changed, what of that helps it, and which recipe follows."""
