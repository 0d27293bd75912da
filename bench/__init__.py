"""Benchmarks of bnfast against stock PyTorch. Not part of the installed package; see bench/README.md."""
