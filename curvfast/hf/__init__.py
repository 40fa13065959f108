"""Interface to transformers: models, tokenizers, checkpoints, the Trainer callback."""
