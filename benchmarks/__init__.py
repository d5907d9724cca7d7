"""Benchmarks of the project, one schema for all of them: see benchmarks/README.md."""
