"""Small plain LightningModules and DataModules of real data; nothing in them knows of over-parametrization."""

from lightning_sop.zoo.cifar_jpeg import CifarJpeg
from lightning_sop.zoo.digits import Digits
from lightning_sop.zoo.idx_images import IdxImages
from lightning_sop.zoo.image_classifier import ImageClassifier
from lightning_sop.zoo.language_model import LanguageModel
from lightning_sop.zoo.loading import DataError
from lightning_sop.zoo.nets import MLP, Decoder, ResNet, ViT
from lightning_sop.zoo.python_source import PythonSource

__all__ = [
    "MLP",
    "CifarJpeg",
    "DataError",
    "Decoder",
    "Digits",
    "IdxImages",
    "ImageClassifier",
    "LanguageModel",
    "PythonSource",
    "ResNet",
    "ViT",
]
