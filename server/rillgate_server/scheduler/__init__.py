"""The batcher's control plane: who runs in the next step."""
