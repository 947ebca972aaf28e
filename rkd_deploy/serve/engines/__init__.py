"""Engines: TensorRT's and TensorRT-RTX's compiled form of an ONNX file, built where they run and without torch.

`build` makes one, `record` describes it in the JSON file beside it, `cache` keeps those that a backend built by itself.
"""
