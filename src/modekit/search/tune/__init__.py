"""Which variant? A search over mixtures of the same experts, on held-out text, that builds nothing twice.

asked        settings.py, space.py: how much is tried, and along which axes
candidates   study.py, candidate.py, of selection.py (text), shared_weights.py, switched_model.py; launch.py
result       scores.py, results.py: losses to be shown, and the table
all of it    tune.py; folder.py says whose search it is
"""
