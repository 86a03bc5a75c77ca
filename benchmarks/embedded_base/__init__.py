"""The builder of the embedded base: its pretraining text, tokenizer and training."""
