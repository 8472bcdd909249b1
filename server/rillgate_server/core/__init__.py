"""The plain types and pure functions that every other package builds on."""
