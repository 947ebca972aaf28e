"""Training: recipes in, run folders out."""
