"""Runs an exported model, and judges it: what an app embeds, needing no training framework."""
