"""Advice before building: what each expert changed, what of that helps it, and which recipe follows.

files        examined.py, of checks.py, groups.py, drift.py: headers, then every byte once; no torch
text         measured.py, of texts.py, part_scores.py, gain.py, confusion.py: select text, on the base with experts' parts in it
judgement    findings.py, judge.py, rules.py: numbers -> findings, and a mixture with its reasons
result       advise.py: all of it, into advice.py; recipe_file.py writes the recipe
"""
