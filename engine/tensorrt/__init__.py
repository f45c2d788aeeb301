"""Networks as compiled TensorRT plans."""
