"""Every architecture that every method has to train."""

from tests.conformance.torch_architectures import TORCH
from tests.conformance.transformers_architectures import TRANSFORMERS

ARCHITECTURES = TORCH + TRANSFORMERS
