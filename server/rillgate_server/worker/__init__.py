"""The data plane: tensors and the model."""
