"""Steps on a GPU: laid out, launched, captured, drawn from, fetched."""
