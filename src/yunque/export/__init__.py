"""ONNX folders: graphs written node by node, one copy of the weights, parity with torch proved."""
