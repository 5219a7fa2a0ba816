"""TensorRT and TensorRT-RTX: engines that are opened or built on the box."""
