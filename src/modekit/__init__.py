"""modekit: one Mixture of Domain Experts from language models fine-tuned for different domains.

The command line (`modekit --help`) is a thin layer over these functions:

    modekit.recipes.read.load_recipe             recipe.yaml -> Recipe
    modekit.planning.make.make_plan              Recipe -> Plan, from configs and headers
    modekit.building.build.build                 Plan -> checkpoint folder
    modekit.checkpoint.checkpoint.open_checkpoint  folder -> Checkpoint
    modekit.routing.refit.refit                  another router for a Checkpoint
    modekit.evaluation.evaluate.evaluate           Checkpoint -> Results
    modekit.building.verify.verify               Checkpoint -> proof
    modekit.experts.specialize.specialize       base model + text -> specialist

After `import modekit`, transformers' Auto classes open checkpoints of the modekit architecture. Nothing heavy is imported
here, so that `modekit plan` starts without torch.
"""

from modekit.architecture import register

register()
