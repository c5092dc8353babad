"""Measure what a model does, as numbers and as a page."""
