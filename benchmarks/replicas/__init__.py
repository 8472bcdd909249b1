"""What many replicas bring and cost: how evenly work spreads, what routing takes."""
