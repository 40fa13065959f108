"""What knows transformers: models, tokenizers, checkpoints."""
