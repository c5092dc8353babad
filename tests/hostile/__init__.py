"""Hostile files, crashes and broken data: ``PYTHONPATH=tests:tests/support python -m hostile``."""
