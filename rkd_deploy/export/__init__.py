"""Export: fusion of S and A, the ONNX graph, the bundle, and the gate that proves it."""
