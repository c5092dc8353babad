"""The verb purify, its loop, and what the loop is made of."""
