"""Reliability campaigns: each tries to break one promise many times and prints one line of figures.

``python -m scripts.campaigns.NAME [--count N] [--seed S] [--work DIR]``, from the repository's root.
Each is a function of a folder, a count and a seed, so that the tests run a small sample of the
same code. What a campaign finds is printed to stderr, and its exit code is 1.
"""
