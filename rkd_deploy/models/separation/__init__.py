"""Separation: S and its assistants from S0, within a budget."""
