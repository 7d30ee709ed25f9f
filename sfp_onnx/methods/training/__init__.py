"""Training on top, from the ONNX file alone: needs the optional extra ``train`` (PyTorch), which is imported by nothing else."""
