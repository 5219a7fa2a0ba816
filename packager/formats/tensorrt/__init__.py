"""TensorRT: typed graphs, engine plans, and the compiler that needs no GPU."""
