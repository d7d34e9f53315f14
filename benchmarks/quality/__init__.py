"""A study of quality: methods with tuned settings on several tasks, paired by seed; ``python -m benchmarks.quality -h``."""
