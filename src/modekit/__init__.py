"""modekit: one Mixture of Domain Experts from language models fine-tuned for different domains.

The eleven functions below are the public face (docs/python.md); the command line is a thin layer over the same code, and all
else is inner. After `import modekit`, transformers' Auto classes open checkpoints of the modekit architecture. Nothing heavy
is imported here, so that a plan needs no torch.
"""

from modekit.architecture import register
from modekit.errors import ModekitError
from modekit.public import add, build, evaluate, fit, load, plan, recipe, remove, router, train, verify
from modekit.run import Run

__all__ = [
    "ModekitError",
    "Run",
    "add",
    "build",
    "evaluate",
    "fit",
    "load",
    "plan",
    "recipe",
    "remove",
    "router",
    "train",
    "verify",
]

register()
