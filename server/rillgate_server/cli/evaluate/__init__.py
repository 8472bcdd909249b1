"""`rillgate evaluate`: how well a model answers, for any setting."""
