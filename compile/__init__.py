"""Exports a model to ONNX and TensorRT, and checks the result against PyTorch."""
