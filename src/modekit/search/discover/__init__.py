"""Domains without labels: which groups of documents there are, what they are about, and which of them a mixture serves.

discover.py    the steps in order, what a mixture's router makes of a group, and what is written
result.py      settings and result
documents.py   documents read twice, a bounded sample kept; their words, and names of groups
grouping.py    points, k-means, the number of groups
"""
