"""TensorRT: strongly typed graphs, engine plans, and ahead-of-time compilation without a GPU."""
