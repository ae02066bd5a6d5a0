"""Loading a part of a model from safetensors files, which strategies share that divide weights."""
