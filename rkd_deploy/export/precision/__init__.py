"""Precision: a float32 graph converted to a lower one, judged before it is kept."""
