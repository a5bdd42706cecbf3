"""modekit: one Mixture of Domain Experts from language models fine-tuned for different domains.

The command line (`modekit --help`) is a thin layer over these functions:

    modekit.recipe.load_recipe          recipe.yaml -> Recipe
    modekit.plan.make_plan              Recipe -> Plan, from configs and headers
    modekit.build.build                 Plan -> checkpoint folder
    modekit.checkpoint.open_checkpoint  folder -> Checkpoint
    modekit.routing.fit.refit           another router for a Checkpoint
    modekit.evaluate.evaluate           Checkpoint -> Results
    modekit.verify.verify               Checkpoint -> proof
    modekit.specialize.specialize       base model + text -> specialist

After `import modekit`, transformers' Auto classes open checkpoints of the modekit architecture. Nothing heavy is imported
here, so that `modekit plan` starts without torch.
"""

from modekit.architecture import register

register()
