"""Hostile files, crashes and broken data: ``PYTHONPATH=tests python -m hostile [SUITE ...]``."""
