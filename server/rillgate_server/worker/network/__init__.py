"""The model's network: tokens and positions in, logits out."""
