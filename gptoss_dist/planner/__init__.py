"""What a run will need: parameters, FLOPs, the device's peak, memory."""
