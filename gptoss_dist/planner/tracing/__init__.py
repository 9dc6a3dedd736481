"""The real training step on tensors that hold nothing: what it computes, sends and keeps."""
