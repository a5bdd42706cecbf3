"""The demo: text that ships with modekit, models trained on the spot, mixtures of them."""
