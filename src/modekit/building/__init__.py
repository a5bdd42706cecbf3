"""Plan -> checkpoint, and the proof of it."""
