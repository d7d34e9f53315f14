"""A LightningModule that predicts the next token of a text."""

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.text import Perplexity

from lightning_sop.zoo.nets import Decoder
from lightning_sop.zoo.optimizers import adamw_cosine


class LanguageModel(LightningModule):
    """Decoder-only language model; logs loss (nats per token) and, outside training, perplexity.

    A batch is ``(tokens, targets)``, both int64 (batch, length); a target is the token that follows.
    All hyper-parameters are plain values, so a checkpoint of this module loads without any of the training code.

    Args:
        vocabulary: number of distinct tokens; 256 for bytes.
        context: longest sequence, in tokens.
        width: features of a token.
        depth: number of layers.
        heads: attention heads per layer.
        dropout: dropout probability inside the layers.
        tied: whether the head shares the embedding's weight.
        lr: learning rate of the built-in AdamW.
        weight_decay: weight decay of the built-in AdamW.
    """

    def __init__(
        self,
        vocabulary: int = 256,
        context: int = 128,
        width: int = 128,
        depth: int = 4,
        heads: int = 4,
        dropout: float = 0.0,
        tied: bool = True,
        lr: float = 1e-3,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr = lr
        self.weight_decay = weight_decay
        self.net = Decoder(vocabulary, context, width=width, depth=depth, heads=heads, dropout=dropout, tied=tied)
        self.val_perplexity = Perplexity()
        self.test_perplexity = Perplexity()

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.net(tokens)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        tokens, targets = batch
        loss = next_token_loss(self(tokens), targets)
        # by epoch only: within it no step waits for another rank or for the device
        self.log("train_loss", loss, on_step=False, on_epoch=True, sync_dist=True, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "val", self.val_perplexity)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "test", self.test_perplexity)

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The likeliest next token at every position, int64 (batch, length)."""
        return self(batch[0]).argmax(dim=-1)  # type: ignore[no-any-return]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        return adamw_cosine(self, self.lr, self.weight_decay)

    def _evaluate(self, batch: tuple[Tensor, Tensor], stage: str, perplexity: Perplexity) -> None:
        tokens, targets = batch
        logits = self(tokens)
        perplexity.update(logits, targets)
        self.log(f"{stage}_loss", next_token_loss(logits, targets), sync_dist=True, prog_bar=True)
        self.log(f"{stage}_perplexity", perplexity)


def next_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats per token, of logits (batch, length, vocabulary) against targets (batch, length)."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())
