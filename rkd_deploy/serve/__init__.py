"""Serve: answers with an exported model, in an app or on a server, without PyTorch."""
