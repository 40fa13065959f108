"""Ways to keep an edit: patches, checkpoints with a card, factored layers, LoRA adapters."""
