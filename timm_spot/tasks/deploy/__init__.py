"""Models as other programs run them: ONNX files, quantised ones, programs compiled for budgets."""
