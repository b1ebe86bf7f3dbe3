"""Better sampling without training: what can be measured or searched once for a model and kept in a sampler card."""
