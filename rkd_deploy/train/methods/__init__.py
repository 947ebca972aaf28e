"""Training methods, one paper on one page: the loss as a pure function, the Method under it."""
