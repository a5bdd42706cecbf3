"""The text that a build needs: written by the experts where a recipe asks for that, and read once before anything is copied."""

from __future__ import annotations

from collections.abc import Collection

from modekit.planning.plan import Plan
from modekit.run import Run
from modekit.text.documents import is_local
from modekit.text.held_out import fit_documents
from modekit.text.written import texts_of


def complete_text(plan: Plan, known: Collection[str], run: Run) -> None:
    """Have written what experts write, and read all text on disk that the fit will read, so that what is wrong with it shows
    before gigabytes are copied, and of given text before hours of writing. That of the experts in `known`, with kept
    statistics, may be gone.
    """
    kinds = {expert.writes_text for expert in plan.recipe.experts} if plan.recipe.mixture.needs_text else set[bool]()
    for written in sorted(kinds):
        if written:
            write_texts(plan, run, but=known)
        run.begin("check the text")
        for number, expert in enumerate(plan.recipe.experts):
            local = expert.writes_text is written and all(is_local(spec, plan.root) for spec in texts_of(expert))
            if local and expert.name not in known:
                fit_documents(expert, plan.root, number, reads=plan.family.reads)


def write_texts(plan: Plan, run: Run, *, but: Collection[str] = ()) -> None:
    """Let the experts of a plan write the text that its recipe asks them for, if it reads any and they are not in `but`."""
    recipe = plan.recipe
    if recipe.mixture.needs_text and any(expert.writes_text and expert.name not in but for expert in recipe.experts):
        from modekit.routing import write_text  # this and others that need torch, as a build without text does not

        write_text.write_texts(recipe, plan.root, plan.sources, run, but=but)
