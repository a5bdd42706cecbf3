"""Training of a finished mixture by gradient: `modekit train OUT`."""
