"""A bundle as a model of NVIDIA's Triton Inference Server, and the KServe resource that runs it in a cluster."""
