"""The room that a plan takes on the disk, and a build in memory."""

from __future__ import annotations

from modekit.planning.carry import LOST_TOKENS
from modekit.planning.plan import Plan
from modekit.recipes.fits import MOST_TOKENS
from modekit.sources.config import whole


def disk_needed(plan: Plan) -> int:
    """Bytes that a build writes: weights that are in no file which is there, and the statistics that it keeps."""
    own = plan.bytes_written - bytes_linked(plan) + statistics_bytes(plan)
    return own if plan.otherwise is None else max(own, disk_needed(plan.otherwise))


def bytes_linked(plan: Plan) -> int:
    """Bytes of weights in files that are taken as they are from a mixture that is there."""
    files = frozenset() if plan.reused is None else plan.reused.files
    return sum(shard.nbytes for shard in plan.shards if shard.file in files)


def statistics_bytes(plan: Plan) -> int:
    """Bytes of the statistics that a fit keeps of all domains."""
    mixture = plan.recipe.mixture
    if mixture.fit is None or not mixture.needs_text:
        return 0
    if not mixture.fit.runs_models:  # token ids, which are the same for all routers
        return plan.shape.experts * 4 * MOST_TOKENS
    kept = 16 + 2 * mixture.router.keep_tokens  # sum, mean of negatives, and inputs in float16
    return sum(plan.shape.experts * slot.shape[1] * kept for slot in plan.shape.slots)


def bytes_to_carry(plan: Plan) -> int:
    """Bytes of memory in which a build runs the base in float32, beside logits and copies of its head, for what is carried."""
    channels, words = plan.shape.channels, whole(plan.config, "vocab_size")
    if channels is None or channels.carry is None:
        return 0
    return 4 * (plan.sources[0].parameters + 4 * words * (channels.hidden + LOST_TOKENS))
