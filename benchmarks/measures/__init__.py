"""What the benchmarks measure: step time, memory of tensors, traffic between processes, the collapsed model."""
