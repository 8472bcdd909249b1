"""Makes, trains and evaluates the demo model in models/demo; run from the repository root."""
