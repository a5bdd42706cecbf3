"""Advice before building: what each expert changed, what of that helps it, and which recipe follows.

files    findings.py, checks.py, groups.py, drift.py     headers, then every byte once; no torch
text     texts.py, swapped.py, gain.py, words.py         the select split, on the base with parts of experts in it
rules    judge.py, rules.py, recipe_file.py              numbers -> findings, a mixture, a recipe with its reasons
run.py   all of it, into advice.py
"""
