"""Optimise ONNX models and prove the result."""
