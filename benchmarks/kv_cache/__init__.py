"""What the two-tier cache and its cost model are worth: `make bench-kv`."""
