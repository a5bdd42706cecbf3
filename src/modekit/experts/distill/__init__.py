"""Experts made from a teacher: `modekit specialize STUDENT OUT --teacher MODEL` (docs/distill.md).

settings.py       towards what, at which temperature, by which weights
pair.py           student and teacher on disk: the same tokenizer, their digests
says.py           what a teacher says of tokens, beside the student or kept, and how a student is compared with it
kept_file.py      a teacher's log-probabilities on disk: written once, read by every student
weight.py         how much the text counts against the teacher, step by step
student.py        the student and its losses as one module, which Trainer trains
distill.py        all of it
"""
