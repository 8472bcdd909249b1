"""The step loop and its executors."""
