"""Answers over HTTP with an exported model, also by the Open Inference Protocol."""
