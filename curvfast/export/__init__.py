"""Export of edits: patches, checkpoints with a model card, factored layers, LoRA adapters."""
