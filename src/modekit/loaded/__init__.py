"""Mixtures and experts as models in memory."""
