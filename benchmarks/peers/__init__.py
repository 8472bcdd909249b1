"""Other servers of language models, in environments of their own under `.bench/`."""
