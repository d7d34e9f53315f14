"""Digits trained plain and with Majority Kernels, over several seeds: ``python -m lightning_sop.zoo.demo``."""
