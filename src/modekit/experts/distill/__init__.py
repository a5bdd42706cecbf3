"""Experts made from a teacher: `modekit specialize STUDENT OUT --teacher MODEL` (docs/training.md)."""
