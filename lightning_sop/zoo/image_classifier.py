"""A LightningModule that classifies images with one of the zoo's networks."""

from typing import Literal, get_args

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy

from lightning_sop.zoo.nets import MLP, ImageShape, ResNet, ViT
from lightning_sop.zoo.optimizers import adamw_cosine

NetName = Literal["mlp", "resnet", "vit"]


class ImageClassifier(LightningModule):
    """Softmax classifier of images; logs loss (nats) and accuracy (0 to 1) of each stage.

    A batch is ``(images, labels)``: float (batch, channels, height, width) and int64 (batch,).
    All hyper-parameters are plain values, so a checkpoint of this module loads without any of the training code.

    Args:
        net: which network of ``lightning_sop.zoo.nets``.
        image_shape: channels, height, width, in pixels.
        num_classes: number of classes.
        width: hidden units (mlp), channels of the first stage (resnet), or features of a token (vit).
        depth: hidden layers (mlp), residual blocks per stage (resnet), or encoder layers (vit).
        dropout: dropout probability (mlp and vit).
        patch: side of a patch in pixels (vit).
        heads: attention heads per layer (vit).
        lr: learning rate of the built-in AdamW.
        weight_decay: weight decay of the built-in AdamW.

    Raises:
        ValueError: unknown network, or dropout for a residual network, which has none.
    """

    def __init__(
        self,
        net: NetName = "mlp",
        image_shape: ImageShape = (1, 8, 8),
        num_classes: int = 10,
        width: int = 64,
        depth: int = 2,
        dropout: float = 0.0,
        patch: int = 2,
        heads: int = 4,
        lr: float = 1e-3,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr = lr
        self.weight_decay = weight_decay
        self.net: nn.Module
        if net == "mlp":
            self.net = MLP(image_shape, num_classes, width=width, depth=depth, dropout=dropout)
        elif net == "resnet":
            if dropout:
                raise ValueError(f"dropout={dropout}: net='resnet' has no dropout; leave it at 0")
            self.net = ResNet(image_shape, num_classes, width=width, blocks=depth)
        elif net == "vit":
            self.net = ViT(image_shape, num_classes, patch=patch, width=width, depth=depth, heads=heads, dropout=dropout)
        else:
            raise ValueError(f"net={net!r} is unknown; choose one of {', '.join(get_args(NetName))}")
        # validate_args would read the labels back from the device in every step
        self.train_acc = MulticlassAccuracy(num_classes, average="micro", validate_args=False)
        self.val_acc = MulticlassAccuracy(num_classes, average="micro", validate_args=False)
        self.test_acc = MulticlassAccuracy(num_classes, average="micro", validate_args=False)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.net(images)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self._step(batch, "train", self.train_acc)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._step(batch, "val", self.val_acc)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._step(batch, "test", self.test_acc)

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Class probabilities (batch, num_classes)."""
        return self(batch[0]).softmax(dim=1)  # type: ignore[no-any-return]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        return adamw_cosine(self, self.lr, self.weight_decay)

    def _step(self, batch: tuple[Tensor, Tensor], stage: str, accuracy: MulticlassAccuracy) -> Tensor:
        images, labels = batch
        logits = self(images)
        loss = F.cross_entropy(logits, labels)
        accuracy.update(logits, labels)
        # by epoch only: within it no step waits for another rank or for the device
        self.log(f"{stage}_loss", loss, on_step=False, on_epoch=True, sync_dist=True, prog_bar=True)
        self.log(f"{stage}_acc", accuracy, on_step=False, on_epoch=True, prog_bar=stage != "train")
        return loss
