"""Families: the networks written here, one paper a page."""
