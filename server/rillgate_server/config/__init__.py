"""Configuration: frozen groups, and where they are read from."""
