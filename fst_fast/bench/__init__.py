"""Measures the ops where they run: ``python -m fst_fast.bench``, or ``fst-fast bench``."""
