"""Scripts that check, generate and demonstrate; nothing here is shipped to users."""
