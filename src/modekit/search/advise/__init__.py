"""Advice before building: what each expert changed, what of that helps it, and which recipe follows.

advise.py        the steps in order
models.py        files: headers, then every byte once (drift.py); no torch
text.py          select text, words, and the base with experts' parts in it (part_scores.py, gains.py)
findings.py      numbers -> findings
rules.py         numbers -> a mixture with its reasons; recipe.py makes and writes the recipe
result.py        everything that was found
"""
