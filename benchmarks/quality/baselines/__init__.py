"""Methods that Majority Kernels is compared with, where Lightning has none."""
