"""The room that a plan takes on the disk, and a build in memory."""

from __future__ import annotations

from modekit.planning.carry import SAMPLE_BYTES, SAMPLE_TOKENS
from modekit.planning.plan import Plan
from modekit.recipes.fits import MOST_TOKENS
from modekit.sources.config import whole
from modekit.sources.names import split_layer


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
    """Bytes of memory in which a build runs the base for what is carried, beside a sample; where not all is, then the result,
    beside the heads of base, expert and result.
    """
    channels = plan.shape.channels
    words = whole(plan.config, "vocab_size")
    if channels is None or channels.carry is None:
        return 0
    sample = SAMPLE_TOKENS * 4 * channels.layers * (channels.hidden + channels.heads * channels.head_dim)
    held = held_by_layers(plan)
    reading = 2 * min(sample, SAMPLE_BYTES) + 4 * held  # twice, while its parts are put together
    if channels.carry.is_exact:
        return reading
    heads = words * (3 * channels.hidden + channels.spare)
    return max(reading, 4 * (held + heads))


def held_by_layers(plan: Plan) -> int:
    """Numbers of a base that are in memory while it runs: embedding, head, and one layer."""
    base = plan.sources[0]
    words = whole(plan.config, "vocab_size")
    one = sum(ref.numel for name, ref in base.tensors.items() if split_layer(name)[0] == 0)
    return 2 * words * whole(base.config, plan.family.width) + one
