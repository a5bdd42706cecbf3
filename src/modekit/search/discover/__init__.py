"""Domains without labels: which groups of documents there are, what they are about, and which of them a mixture serves.

settings     settings.py: what is asked
text         stream.py: documents read twice, a bounded sample kept; words.py, units.py: what is counted of a document
groups       space.py: where documents lie, by their units or by hidden states; evidence.py: what groups say of units;
             grouping.py: k-means, the best of several; choice.py: how many groups, by held-out likelihood;
             learned.py: all of that
words        names.py: what a group is about; serves.py: what a mixture's router makes of it
result       discover.py: all of it, into discovery.py and a folder
"""
