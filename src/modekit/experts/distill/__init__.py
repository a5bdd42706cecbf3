"""Experts made from a teacher: `modekit specialize STUDENT OUT --teacher MODEL` (docs/distill.md).

settings.py       towards what, at which temperature, by which weights
inputs.py         student and teacher on disk, and the texts
kept_logits.py    a teacher's output, beside the student or kept on disk, and how a student is compared with it
student.py        the student and its losses as one module, which the engine trains
distill.py        all of it
"""
