"""Retraining: what is new in a source, from which champion to go on, and who is at it."""
