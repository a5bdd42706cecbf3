"""What mixtures of models with an encoder write: translations of held-out sources, scored by sacrebleu."""
