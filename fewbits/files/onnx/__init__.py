"""ONNX: a decoder graph whose weights are packed."""
