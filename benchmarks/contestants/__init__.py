"""What `benchmarks.compare_cpu` runs in turn, each in a process of its own."""
