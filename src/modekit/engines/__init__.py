"""Engines that are not transformers: how a mixture gets into them, and the proof that it is the same mixture there."""
