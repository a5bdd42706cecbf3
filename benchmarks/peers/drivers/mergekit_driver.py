"""mergekit, in its environment: JOB.json is {"seed", "moe": [[configuration, folder]], "merges": [[configuration, folder]]}."""

import json
import sys
from pathlib import Path

from mergekit.config import MergeConfiguration
from mergekit.merge import MergeOptions, run_merge
from mergekit.moe.config import MoEMergeConfig
from mergekit.scripts.moe import build

job = json.loads(Path(sys.argv[1]).read_text())
options = MergeOptions(random_seed=job["seed"], quiet=True, write_model_card=False)
options.apply_global_options()
for said, folder in job.get("merges", []):
    run_merge(MergeConfiguration.model_validate(said), folder, options)
for said, folder in job.get("moe", []):
    config = MoEMergeConfig.model_validate(said)
    build(config, folder, options, device="cpu", allow_all_same=len({each.source_model for each in config.experts}) == 1)
