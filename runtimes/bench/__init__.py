"""The benchmark: latency, throughput and memory beside the roofline of the box."""
