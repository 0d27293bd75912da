"""Benchmarks of bnfast against stock PyTorch. Not part of the installed package; see bench/README.md."""

import os

# What is measured is what a user has who has tuned nothing.
os.environ.setdefault("BNFAST_TUNING", "0")
