"""Which variant? A search over mixtures of the same experts, on held-out text, that builds nothing twice.

tune.py             the steps in order; folder.py keeps whose search it is
space.py            the axes, and the mixture of one choice
study.py            candidates: of selection.py (text), shared_weights.py; launch.py starts processes
results.py          settings and result; tune.py has the losses that are shown beside those it chose by
"""
