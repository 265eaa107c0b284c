"""What an index becomes outside of this package: a feature table, a torch module or an ONNX graph."""
