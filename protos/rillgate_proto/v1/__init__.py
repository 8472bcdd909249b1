"""Version 1 of the protocol (wire package `rillgate.v1`)."""
