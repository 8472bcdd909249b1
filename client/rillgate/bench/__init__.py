"""The load generator behind `rillgate bench`; benchmarks of the project import it too."""
