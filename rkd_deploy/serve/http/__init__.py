"""Answers over HTTP with an exported model: images in, labels out, and the Open Inference Protocol beside it."""
