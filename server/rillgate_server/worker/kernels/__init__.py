"""Products and glue in C++, for CPUs that have AVX-512 with VNNI and BF16; without them, torch."""
