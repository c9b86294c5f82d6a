"""What the bindings of Flower and NVIDIA FLARE are made of."""
