"""The key/value cache's control plane: block pools and the prefix index."""
