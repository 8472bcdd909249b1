"""`make gpu-check`: what Rillgate reaches on an NVIDIA GPU, beside what the device can do."""
