"""The gateway process: the public services."""
