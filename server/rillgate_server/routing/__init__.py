"""Where a request goes: which replica, and when it moves (pure)."""
