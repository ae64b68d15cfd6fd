"""From bytes to something a check can measure: load, find the taps, export to ONNX, run."""
