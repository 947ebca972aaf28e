"""Writes a bundle as a model of NVIDIA's Triton server, with KServe's resource."""
