"""ONNX graphs of decoders and encoders, with INT8 and INT4 weights."""
